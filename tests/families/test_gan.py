r"""The Wasserstein GAN with gradient penalty, where its optimum, its penalty and their gradients are closed forms.

A linear critic ``w.x`` between data and samples a shift ``s`` apart has the loss ``-w.s + lambda (|w| - 1)^2``, least
at ``w = (1 + |s| / (2 lambda)) s/|s|``. A quadratic one, ``sum w x^2 / 2``, has another slope ``|w x|`` at each point,
so that it sees which points the penalty is taken at, and that its norm is one sample's over all dimensions.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from genzoo.families.gan import WGANGP, gradient_penalty
from genzoo.prob.measure import bin_centre
from genzoo.prob.random import generator
from tests.exact import network

SHAPE = (3, 4, 4)


class Linear(nn.Module):
    """The critic ``w.x``, (B, 1)."""

    def __init__(self, in_shape, out_shape, num_classes):
        super().__init__()
        self.w = nn.Parameter(0.3 * torch.randn(math.prod(in_shape), dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x.flatten(1) @ self.w[:, None]


class Quadratic(Linear):
    """The critic ``sum w x^2 / 2``."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x**2 / 2)


class Shift(nn.Module):
    """The generator ``b`` + the first numbers of ``z``."""

    def __init__(self, in_shape, out_shape, num_classes):
        super().__init__()
        self.shape = tuple(out_shape)
        self.b = nn.Parameter(torch.zeros(math.prod(out_shape), dtype=torch.float64))

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return (z[:, : len(self.b)] + self.b).view(-1, *self.shape)


def wgan(critic=Linear, shape=SHAPE, **kwargs) -> WGANGP:
    return WGANGP(Shift, critic, shape, latent_dim=kwargs.pop("latent_dim", math.prod(shape)), **kwargs).double()


def test_a_linear_critic_of_a_shift_of_two_has_slope_1_1():
    """The generator gives 0 and the data are 2: the least critic loss is at w = 1 + 2/(2*10)."""
    model = WGANGP(network(lambda z, y: torch.zeros(len(z), 1).double()), Linear, (1,), latent_dim=1).double()
    x = torch.full((64, 1), 2.0, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.critic.parameters(), lr=0.03)
    for _ in range(200):
        optimizer.zero_grad()
        model.loss(x, turn="critic").total.backward()
        optimizer.step()
    assert float(model.critic.w.detach()) == pytest.approx(1.1, abs=1e-9)


@pytest.mark.parametrize("penalty", [10.0, 2.0])
def test_in_many_dimensions_the_critic_points_along_the_shift(penalty):
    model = WGANGP(network(lambda z, y: torch.zeros(len(z), *SHAPE).double()), Linear, SHAPE, penalty=penalty).double()
    shift = torch.randn(SHAPE, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.critic.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(shift.expand(8, *SHAPE), turn="critic").total
        loss.backward()
        return loss

    optimizer.step(closure)
    s = shift.flatten()
    torch.testing.assert_close(model.critic.w, (1 + s.norm() / (2 * penalty)) * s / s.norm(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch", [1, 7])
def test_the_penalty_of_a_linear_critic_is_the_squared_distance_of_its_norm_from_one(batch):
    """A norm over the batch, or over the channels alone, is another number."""
    critic = Linear(SHAPE, (1,), 0)
    x, fake = torch.randn(2, batch, *SHAPE, dtype=torch.float64)
    value = gradient_penalty(critic, x, fake, None, torch.rand(batch, dtype=torch.float64))
    torch.testing.assert_close(value, (critic.w.norm() - 1) ** 2, atol=1e-12, rtol=0)


def test_the_penalty_is_taken_per_sample_at_its_own_place_between_data_and_samples():
    critic = Quadratic(SHAPE, (1,), 0)
    x, fake = torch.randn(2, 6, *SHAPE, dtype=torch.float64)
    a = torch.linspace(0, 1, 6, dtype=torch.float64)
    slopes = [(critic.w * (a[i] * x[i] + (1 - a[i]) * fake[i]).flatten()).norm() for i in range(6)]
    expected = torch.stack([(slope - 1) ** 2 for slope in slopes]).mean()
    torch.testing.assert_close(gradient_penalty(critic, x, fake, None, a), expected, atol=1e-12, rtol=0)


def test_the_gradient_of_the_penalty_reaches_the_critics_weights():
    """d/dw mean (|w x| - 1)^2 = mean 2 (|w x| - 1) w x^2 / |w x|, which needs the graph of the inner gradient."""
    critic = Quadratic(SHAPE, (1,), 0)
    x, fake = torch.randn(2, 6, *SHAPE, dtype=torch.float64)
    a = torch.rand(6, dtype=torch.float64)
    gradient_penalty(critic, x, fake, None, a).backward()
    x_hat = (a.view(-1, 1, 1, 1) * x + (1 - a).view(-1, 1, 1, 1) * fake).flatten(1)
    w = critic.w.detach()
    norm = (w * x_hat).norm(dim=1, keepdim=True)
    expected = (2 * (norm - 1) * w * x_hat**2 / norm).mean(0)
    torch.testing.assert_close(critic.w.grad, expected, atol=1e-12, rtol=0)


def test_the_places_are_uniform_between_data_and_samples():
    """With the critic x^2/2, data at 3 and samples at 1 the penalty is E (3a + (1 - a) - 1)^2 = E (2a)^2 = 4/3."""
    model = WGANGP(network(lambda z, y: torch.ones(len(z), 1).double()), Quadratic, (1,)).double()
    nn.init.ones_(model.critic.w)
    n = 100_000
    penalty = float(model.loss(torch.full((n, 1), 3.0).double(), turn="critic").terms["penalty"])
    assert penalty == pytest.approx(4 / 3, abs=5 * math.sqrt(16 / 5 - 16 / 9) / math.sqrt(n))


def test_the_critics_loss_is_the_samples_minus_the_data_plus_the_penalty():
    model = wgan(Quadratic, penalty=7.0)
    x = torch.randn(9, *SHAPE, dtype=torch.float64)
    loss, terms = model.loss(x, turn="critic", rng=generator(0))
    z = torch.randn(9, 48, generator=generator(0), dtype=torch.float64)
    fake = z.view(-1, *SHAPE)
    distance = model.critic(x).mean() - model.critic(fake).mean()
    torch.testing.assert_close(terms["distance"], distance.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(loss, 7 * terms["penalty"] - distance, atol=1e-12, rtol=0)


def test_the_generators_loss_is_minus_the_critics_opinion_of_its_samples():
    model = wgan(Quadratic)
    x = torch.randn(9, *SHAPE, dtype=torch.float64)
    loss = model.loss(x, turn="generator", rng=generator(0)).total
    fake = torch.randn(9, 48, generator=generator(0), dtype=torch.float64).view(-1, *SHAPE)
    torch.testing.assert_close(loss, -model.critic(fake).mean(), atol=1e-12, rtol=0)
    assert torch.equal(model.loss(x + 5, turn="generator", rng=generator(0)).total, loss)  # data are not looked at


def test_descending_its_loss_moves_the_generator_uphill_on_the_critic():
    model = wgan()
    model.loss(torch.zeros(4, *SHAPE).double(), turn="generator").total.backward()
    torch.testing.assert_close(model.generator.b.grad, -model.critic.w.detach(), atol=1e-12, rtol=0)


def test_on_the_critics_turn_no_gradient_reaches_the_generator():
    model = wgan(Quadratic)
    model.loss(torch.randn(5, *SHAPE, dtype=torch.float64), turn="critic").total.backward()
    assert model.generator.b.grad is None
    assert model.critic.w.grad.abs().min() > 0


def test_on_the_generators_turn_a_frozen_critic_still_passes_the_gradient_on():
    """The trainer freezes the player whose turn it is not."""
    model = wgan()
    model.critic.requires_grad_(False)
    model.loss(torch.zeros(4, *SHAPE).double(), turn="generator").total.backward()
    assert model.critic.w.grad is None
    assert model.generator.b.grad.abs().min() > 0


def test_the_critic_takes_five_turns_for_each_of_the_generators():
    model = wgan()
    assert [model.turn(step) for step in range(12)] == (["critic"] * 5 + ["generator"]) * 2
    assert [wgan(n_critic=1).turn(step) for step in range(4)] == ["critic", "generator"] * 2


def test_images_leave_the_generator_through_a_tanh_and_meet_the_critic_as_snapped_data():
    seen = []

    def critic(x: Tensor, y: Tensor | None) -> Tensor:
        seen.append(x.detach())
        return x.flatten(1).sum(1, keepdim=True)

    model = WGANGP(Shift, network(critic), (1, 2, 2), levels=17, latent_dim=4).double()
    centre = bin_centre(torch.randint(17, (6, 1, 2, 2)), 17, torch.float64)
    model.loss(centre + 0.9 / 17, turn="critic", rng=generator(0))
    z = torch.randn(6, 4, generator=generator(0), dtype=torch.float64)
    torch.testing.assert_close(seen[0][:6], centre, atol=1e-12, rtol=0)
    torch.testing.assert_close(seen[0][6:], z.view(6, 1, 2, 2).tanh(), atol=1e-12, rtol=0)
    torch.testing.assert_close(model.decode(z), z.view(6, 1, 2, 2).tanh(), atol=1e-12, rtol=0)
    assert torch.equal(model.sample(6, rng=generator(0)).x, model.decode(z))


def test_classes_go_with_their_own_data_and_samples():
    seen = []

    def critic(x: Tensor, y: Tensor) -> Tensor:
        seen.append((x.detach()[:, 0], y))
        return x.sum(1, keepdim=True)

    generate = network(lambda z, y: 10.0 + y[:, None].double())
    model = WGANGP(generate, network(critic), (1,), num_classes=5, latent_dim=1).double()
    y = torch.tensor([4, 0, 2])
    model.loss(y[:, None].double(), y, turn="critic")
    (both, labels), (between, given) = seen
    assert torch.equal(both, torch.cat([y, 10 + y]).double())
    assert torch.equal(labels, torch.cat([y, y]))
    assert torch.equal(given, y)
    assert ((between >= y) & (between <= 10 + y)).all()
    assert model.sample(3, y).x[:, 0].tolist() == [14, 10, 12]


@pytest.mark.parametrize("turn", [None, "both"])
def test_it_must_be_somebodys_turn(turn):
    with pytest.raises(ValueError, match="'critic' or 'generator'"):
        wgan().loss(torch.zeros(2, *SHAPE).double(), turn=turn)
