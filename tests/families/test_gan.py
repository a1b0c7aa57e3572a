r"""Adversarial families, where their losses, optima, penalties and gradients are closed forms.

GAN: with ``p`` and ``q`` the laws of data and samples, the best classifier is ``log p/q`` and its loss
``2 log 2 - 2 JSD(p, q)``; the best hinge critic is ``sign(p - q)`` and its loss ``2 sum min(p, q)``.

WGAN: a linear critic ``w.x`` with clipped weights between data and samples a shift ``s`` apart ends at ``w = c sign s``,
where the distance is ``c |s|_1``.

WGANGP: the same critic with a penalty has the loss ``-w.s + lambda (|w| - 1)^2``, least at
``w = (1 + |s| / (2 lambda)) s/|s|``. A quadratic one, ``sum w x^2 / 2``, has another slope ``|w x|`` at each point, so that
it sees which points the penalty is taken at, and that its norm is one sample's over all dimensions.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import ClassLabels
from genzoo.data.densities import GaussianMixture
from genzoo.distributions.discretization import bin_center
from genzoo.families.gan import GAN, WGAN, WGANGP, gradient_penalty
from genzoo.nn.dcgan import DCGANCritic
from genzoo.nn.mlp import MLP
from genzoo.numerics.random import generator
from tests.exact import network

SHAPE = (3, 4, 4)


class Linear(nn.Module):
    """The critic ``w.x``, (B, 1)."""

    def __init__(self, in_shape, out_shape, condition):
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

    def __init__(self, in_shape, out_shape, condition):
        super().__init__()
        self.shape = tuple(out_shape)
        self.b = nn.Parameter(torch.zeros(math.prod(out_shape), dtype=torch.float64))

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return (z[:, : len(self.b)] + self.b).view(-1, *self.shape)


def wgan(critic=Linear, shape=SHAPE, family: Any = WGANGP, **kwargs) -> Any:
    kwargs.setdefault("latent_dim", math.prod(shape))
    return family(shape, generator=Shift, critic=critic, **kwargs).double()


every = pytest.mark.parametrize("family", [GAN, WGAN, WGANGP])
identity = network(lambda x, y: x)  # its input is its output: of a critic, data and samples are the logits


# GAN


def classifier(loss: str) -> GAN:
    """A GAN of the line whose critic and generator are the identity."""
    return GAN((1,), generator=identity, critic=identity, latent_dim=1, loss=loss).double()  # type: ignore[arg-type]


LOGITS = torch.tensor([[-3.0], [-0.4], [0.2], [0.9], [2.5]], dtype=torch.float64)
FAKES = torch.tensor([[-2.0], [-1.1], [-0.3], [0.7], [4.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "loss, critic, generator_, slope_data, slope_fake, slope_generator",
    [
        (
            "non_saturating",
            lambda a, b: math.log(1 + math.exp(-a)) + math.log(1 + math.exp(b)),
            lambda b: math.log(1 + math.exp(-b)),
            lambda a: -1 / (1 + math.exp(a)),
            lambda b: 1 / (1 + math.exp(-b)),
            lambda b: -1 / (1 + math.exp(b)),
        ),
        (
            "hinge",
            lambda a, b: max(0.0, 1 - a) + max(0.0, 1 + b),
            lambda b: -b,
            lambda a: -1.0 if a < 1 else 0.0,
            lambda b: 1.0 if b > -1 else 0.0,
            lambda b: -1.0,
        ),
    ],
)
def test_the_losses_and_their_slopes_in_the_logits_are_their_closed_forms(
    loss, critic, generator_, slope_data, slope_fake, slope_generator
):
    model = classifier(loss)
    x, fake = LOGITS.clone().requires_grad_(), FAKES.clone().requires_grad_()
    a, b = LOGITS[:, 0].tolist(), FAKES[:, 0].tolist()

    total, terms, _ = model.critic_loss(x, fake, None, None)
    assert float(terms["critic"]) == pytest.approx(sum(map(critic, a, b)) / 5, abs=1e-12) == total.item()
    on_x, on_fake = torch.autograd.grad(total, [x, fake])
    assert on_x[:, 0].tolist() == pytest.approx([slope_data(v) / 5 for v in a], abs=1e-12)
    assert on_fake[:, 0].tolist() == pytest.approx([slope_fake(v) / 5 for v in b], abs=1e-12)
    assert float(terms["accuracy"]) == pytest.approx(0.5 * (3 / 5 + 3 / 5))

    total = model.generator_loss(x, fake, None)
    assert total.item() == pytest.approx(sum(map(generator_, b)) / 5, abs=1e-12)
    (on_fake,) = torch.autograd.grad(total, fake)
    assert on_fake[:, 0].tolist() == pytest.approx([slope_generator(v) / 5 for v in b], abs=1e-12)


def test_a_critic_that_is_very_sure_still_teaches_the_generator():
    """log(1 - sigmoid) would have lost its slope, and a sigmoid before the logarithm its value."""
    model, fake = classifier("non_saturating"), torch.tensor([[-1000.0]], requires_grad=True)
    loss = model.generator_loss(fake, fake, None)
    assert loss.item() == 1000
    assert float(torch.autograd.grad(loss, fake)[0]) == -1


def test_a_loss_looks_at_its_own_draw_of_the_noise():
    model, x = classifier("non_saturating"), LOGITS
    z = torch.randn(5, 1, generator=generator(4), dtype=torch.float64)
    loss = model.loss(x, turn="critic", rng=generator(4)).total
    torch.testing.assert_close(loss, model.critic_loss(x, z, None, None).total, atol=0, rtol=0)
    loss = model.loss(x, turn="generator", rng=generator(4)).total
    torch.testing.assert_close(loss, F.softplus(-z).mean(), atol=1e-15, rtol=0)


class Parabola(nn.Module):
    """The critic ``a + b x + c x^2``, which holds the log ratio of any two normal laws."""

    def __init__(self, in_shape, out_shape, condition):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.w[0] + self.w[1] * x + self.w[2] * x**2


def test_the_best_classifier_is_the_log_ratio_and_its_value_twice_the_jensen_shannon_divergence():
    """Data N(0, 1) and samples N(1, 1.5^2), as the midpoints of 20,000 slices of equal mass."""
    p, q = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(1.0, 1.5)
    slices = ((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)[:, None]
    model = GAN((1,), generator=identity, critic=Parabola, latent_dim=1).double()
    optimizer = torch.optim.LBFGS(model.critic.parameters(), max_iter=100, tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.critic_loss(p.icdf(slices), q.icdf(slices), None, None).total
        loss.backward()
        return loss

    optimizer.step(closure)
    x = torch.linspace(-12, 14, 20_001, dtype=torch.float64)
    middle = torch.logaddexp(p.log_prob(x), q.log_prob(x)) - math.log(2)
    kl = [torch.trapezoid(law.log_prob(x).exp() * (law.log_prob(x) - middle), x) for law in (p, q)]
    jsd = float(sum(kl) / 2)
    assert -float(closure()) == pytest.approx(2 * jsd - 2 * math.log(2), rel=1e-3)
    # log N(x; 0, 1) - log N(x; 1, 1.5^2)
    expected = [math.log(1.5) + 1 / (2 * 1.5**2), -1 / 1.5**2, -0.5 + 1 / (2 * 1.5**2)]
    assert model.critic.w.tolist() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("loss", ["non_saturating", "hinge"])
def test_on_two_points_the_best_critic_and_its_loss_are_known(loss):
    """Data are at the points with shares .7 and .3, samples with .2 and .8; a critic is a table."""

    class Table(nn.Module):
        def __init__(self, in_shape, out_shape, condition):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.w[x.long()]

    model = GAN((1,), generator=identity, critic=Table, latent_dim=1, loss=loss).double()
    x, fake = (torch.tensor([0] * n + [1] * (10 - n))[:, None].double() for n in (7, 2))
    optimizer = torch.optim.SGD(model.critic.parameters(), lr=0.05)
    for _ in range(1200):
        optimizer.zero_grad()
        model.critic_loss(x, fake, None, None).total.backward()
        optimizer.step()
    p, q = torch.tensor([0.7, 0.3]).double(), torch.tensor([0.2, 0.8]).double()
    best, least = (p / q).log(), -(p * (p / (p + q)).log() + q * (q / (p + q)).log()).sum()
    if loss == "hinge":
        best, least = (p - q).sign(), 2 * torch.minimum(p, q).sum()
    torch.testing.assert_close(model.critic.w.detach(), best, atol=0.03, rtol=0)
    assert float(model.critic_loss(x, fake, None, None).total) == pytest.approx(float(least), abs=0.03)


@pytest.mark.parametrize("family", [GAN, WGAN])
def test_data_and_samples_meet_a_critic_with_batch_norm_apart(family):
    """Mixed in one batch, either half would be normalised by the other."""
    critic = lambda *shapes: DCGANCritic(*shapes, width=4, refine=True)  # noqa: E731
    model = family((1, 8, 8), generator=Shift, critic=critic, latent_dim=64).double()
    x = 3 * torch.randn(16, 1, 8, 8, dtype=torch.float64) + 5
    loss = model.loss(x, turn="critic", rng=generator(0)).total
    fake = torch.randn(16, 64, generator=generator(0), dtype=torch.float64).view(x.shape)
    a, b = model.critic(x), model.critic(fake)
    expected = F.softplus(-a).mean() + F.softplus(b).mean() if family is GAN else (b - a).mean()
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    mixed = model.critic(torch.cat([x, fake])).chunk(2)
    assert (mixed[0] - a).abs().max() > 1e-3 * a.abs().max(), "batch norm does nothing here"


@pytest.mark.parametrize("family", [GAN, WGAN])
def test_a_turn_leaves_no_trace_in_the_other_players_state(family):
    """Batch norm's running statistics are state too: a critic's would drift with every sample it is shown."""
    critic = lambda *shapes: DCGANCritic(*shapes, width=4, refine=True)  # noqa: E731
    model = family((1, 8, 8), generator=Shift, critic=critic, latent_dim=64).double().train()
    before = copy.deepcopy(model.critic.state_dict())
    model.loss(torch.zeros(4, 1, 8, 8).double(), turn="generator").total.backward()
    assert all(torch.equal(value, before[name]) for name, value in model.critic.state_dict().items())


# WGAN


def test_a_clipped_linear_critic_ends_in_a_corner_where_the_distance_is_that_of_the_city_block():
    model = WGAN(
        SHAPE, generator=network(lambda z, y: torch.zeros(len(z), *SHAPE).double()), critic=Linear, clip=0.01
    ).double()
    shift = torch.randn(SHAPE, dtype=torch.float64)
    optimizer = torch.optim.RMSprop(model.critic.parameters(), lr=5e-4)
    model.initialize(shift.expand(8, *SHAPE))
    for _ in range(100):
        optimizer.zero_grad()
        loss, terms, aux = model.loss(shift.expand(8, *SHAPE), turn="critic")
        loss.backward()
        optimizer.step()
        model.after_step(aux, 8)
    assert float(terms["distance"]) == pytest.approx(0.01 * float(shift.abs().sum()), rel=1e-12)
    assert float(loss) == -float(terms["distance"])
    torch.testing.assert_close(model.critic.w.detach(), 0.01 * shift.flatten().sign(), atol=1e-12, rtol=0)


def test_the_generator_meets_clipped_weights_and_moves_none():
    model = wgan(Quadratic, family=WGAN, clip=0.05)
    with torch.no_grad():
        model.critic.w.copy_(torch.linspace(-0.07, 0.07, 48))
    before = model.critic.w.detach().clone()
    x = torch.randn(9, *SHAPE, dtype=torch.float64)
    model.initialize(x)
    assert torch.equal(model.critic.w, before.clamp(-0.05, 0.05))
    loss = model.loss(x, turn="generator", rng=generator(0)).total
    fake = torch.randn(9, 48, generator=generator(0), dtype=torch.float64)
    expected = -(fake**2 / 2 @ before.clamp(-0.05, 0.05)).mean()
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    model.loss(x, turn="critic")
    assert torch.equal(model.critic.w, before.clamp(-0.05, 0.05))
    with torch.no_grad():
        model.critic.w.copy_(before)
    model.loss(x, turn="generator"), model.loss(x, turn="critic")
    assert torch.equal(model.critic.w, before), "a loss clips nothing"
    model.after_step({}, 9)
    assert torch.equal(model.critic.w, before.clamp(-0.05, 0.05))


def test_the_turns_are_the_steps_of_the_papers_algorithm():
    """Algorithm 1 by hand: RMSprop, clipping after each of the critic's steps, five of them for one of the generator's."""
    model = wgan(Quadratic, family=WGAN, clip=0.02)
    w, b = (p.detach().clone().requires_grad_() for p in (model.critic.w, model.generator.b))
    with torch.no_grad():
        w.clamp_(-0.02, 0.02)
    ours = {name: torch.optim.RMSprop(part.parameters(), lr=0.01) for name, part in model.networks().items()}
    theirs = {"critic": torch.optim.RMSprop([w], lr=0.01), "generator": torch.optim.RMSprop([b], lr=0.01)}
    clipped = 0
    model.initialize(torch.zeros(7, *SHAPE).double())
    for step in range(36):
        turn = model.turn(step)
        x = 0.3 * torch.randn(7, *SHAPE, generator=generator("x", step), dtype=torch.float64) + 0.5
        for player in model.networks().values():
            player.requires_grad_(player is model.networks()[turn])
        ours[turn].zero_grad()
        loss = model.loss(x, turn=turn, rng=generator("z", step))
        loss.total.backward()
        ours[turn].step()
        model.after_step(loss.aux, len(x))

        fake = torch.randn(7, 48, generator=generator("z", step), dtype=torch.float64) + b
        theirs[turn].zero_grad()
        on_fake = (fake**2 / 2 @ w).mean()
        (-on_fake if turn == "generator" else on_fake - (x.flatten(1) ** 2 / 2 @ w).mean()).backward()
        theirs[turn].step()
        if turn == "critic":
            clipped += int((w.abs() > 0.02).sum())
            with torch.no_grad():
                w.clamp_(-0.02, 0.02)
        torch.testing.assert_close(model.critic.w.detach(), w.detach(), atol=1e-12, rtol=0)
        torch.testing.assert_close(model.generator.b.detach(), b.detach(), atol=1e-12, rtol=0)
    assert clipped > 100, "clipping was never put to the test"


# WGANGP


def test_a_linear_critic_of_a_shift_of_two_has_slope_1_1():
    """The generator gives 0 and the data are 2: the least critic loss is at w = 1 + 2/(2*10)."""
    model = WGANGP(
        (1,), generator=network(lambda z, y: torch.zeros(len(z), 1).double()), critic=Linear, latent_dim=1
    ).double()
    x = torch.full((64, 1), 2.0, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.critic.parameters(), lr=0.03)
    for _ in range(200):
        optimizer.zero_grad()
        model.loss(x, turn="critic").total.backward()
        optimizer.step()
    assert float(model.critic.w.detach()) == pytest.approx(1.1, abs=1e-9)


@pytest.mark.parametrize("penalty", [10.0, 2.0])
def test_in_many_dimensions_the_critic_points_along_the_shift(penalty):
    model = WGANGP(
        SHAPE, generator=network(lambda z, y: torch.zeros(len(z), *SHAPE).double()), critic=Linear, penalty=penalty
    ).double()
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
    critic = Linear(SHAPE, (1,), None)
    x, fake = torch.randn(2, batch, *SHAPE, dtype=torch.float64)
    value = gradient_penalty(critic, x, fake, None, torch.rand(batch, dtype=torch.float64))
    torch.testing.assert_close(value, (critic.w.norm() - 1) ** 2, atol=1e-12, rtol=0)


def test_the_penalty_is_taken_per_sample_at_its_own_place_between_data_and_samples():
    critic = Quadratic(SHAPE, (1,), None)
    x, fake = torch.randn(2, 6, *SHAPE, dtype=torch.float64)
    a = torch.linspace(0, 1, 6, dtype=torch.float64)
    slopes = [(critic.w * (a[i] * x[i] + (1 - a[i]) * fake[i]).flatten()).norm() for i in range(6)]
    expected = torch.stack([(slope - 1) ** 2 for slope in slopes]).mean()
    torch.testing.assert_close(gradient_penalty(critic, x, fake, None, a), expected, atol=1e-12, rtol=0)


def test_the_gradient_of_the_penalty_reaches_the_critics_weights():
    """d/dw mean (|w x| - 1)^2 = mean 2 (|w x| - 1) w x^2 / |w x|, which needs the graph of the inner gradient."""
    critic = Quadratic(SHAPE, (1,), None)
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
    model = WGANGP((1,), generator=network(lambda z, y: torch.ones(len(z), 1).double()), critic=Quadratic).double()
    nn.init.ones_(model.critic.w)
    n = 100_000
    penalty = float(model.loss(torch.full((n, 1), 3.0).double(), turn="critic").terms["penalty"])
    assert penalty == pytest.approx(4 / 3, abs=5 * math.sqrt(16 / 5 - 16 / 9) / math.sqrt(n))


def test_the_critics_loss_is_the_samples_minus_the_data_plus_the_penalty():
    model = wgan(Quadratic, penalty=7.0)
    x = torch.randn(9, *SHAPE, dtype=torch.float64)
    loss, terms, _ = model.loss(x, turn="critic", rng=generator(0))
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


# All of them


@every
def test_descending_its_loss_moves_the_generator_uphill_on_the_critic(family):
    model = wgan(family=family)
    with torch.no_grad():
        model.critic.w.clamp_(-0.01, 0.01)  # WGAN's own limit
    model.loss(torch.zeros(4, *SHAPE).double(), turn="generator").total.backward()
    uphill = F.cosine_similarity(model.generator.b.grad, -model.critic.w.detach(), dim=0)
    assert float(uphill) == pytest.approx(1, abs=1e-12)
    if family is not GAN:
        torch.testing.assert_close(model.generator.b.grad, -model.critic.w.detach(), atol=1e-12, rtol=0)


@every
def test_on_the_critics_turn_no_gradient_reaches_the_generator(family):
    model = wgan(Quadratic, family=family)
    model.loss(torch.randn(5, *SHAPE, dtype=torch.float64), turn="critic").total.backward()
    assert model.generator.b.grad is None
    assert model.critic.w.grad.abs().min() > 0


@every
def test_on_the_generators_turn_a_frozen_critic_still_passes_the_gradient_on(family):
    """The trainer freezes the player whose turn it is not."""
    model = wgan(family=family)
    model.critic.requires_grad_(False)
    model.loss(torch.zeros(4, *SHAPE).double(), turn="generator").total.backward()
    assert model.critic.w.grad is None
    assert model.generator.b.grad.abs().min() > 0


@pytest.mark.parametrize("family, n_critic", [(GAN, 1), (WGAN, 5), (WGANGP, 5)])
def test_the_critic_takes_its_turns_before_each_of_the_generators(family, n_critic):
    cycle = ["critic"] * n_critic + ["generator"]
    assert [wgan(family=family).turn(step) for step in range(12)] == (cycle * 6)[:12]
    assert [wgan(family=family, n_critic=2).turn(step) for step in range(6)] == ["critic", "critic", "generator"] * 2


def test_images_leave_the_generator_through_a_tanh_and_meet_the_critic_as_snapped_data():
    seen = []

    def critic(x: Tensor, y: Tensor | None) -> Tensor:
        seen.append(x.detach())
        return x.flatten(1).sum(1, keepdim=True)

    model = WGANGP((1, 2, 2), generator=Shift, critic=network(critic), levels=17, latent_dim=4).double()
    centre = bin_center(torch.randint(17, (6, 1, 2, 2)), 17, torch.float64)
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
    model = WGANGP((1,), ClassLabels(5), generator=generate, critic=network(critic), latent_dim=1).double()
    y = torch.tensor([4, 0, 2])
    model.loss(y[:, None].double(), y, turn="critic")
    (both, labels), (between, given) = seen
    assert torch.equal(both, torch.cat([y, 10 + y]).double())
    assert torch.equal(labels, torch.cat([y, y]))
    assert torch.equal(given, y)
    assert ((between >= y) & (between <= 10 + y)).all()
    assert model.sample(3, y).x[:, 0].tolist() == [14, 10, 12]


@every
@pytest.mark.parametrize("turn", ["", "both"])
def test_it_must_be_somebodys_turn(family, turn):
    with pytest.raises(ValueError, match=f"turn must be one of critic, generator, not '{turn}'"):
        wgan(family=family).loss(torch.zeros(2, *SHAPE).double(), turn=turn)


@every
def test_without_a_turn_the_loss_is_that_of_the_first_step(family):
    model, x = wgan(Quadratic, family=family), torch.randn(5, *SHAPE, dtype=torch.float64)
    first, critic, generator_ = (model.loss(x, turn=t, rng=generator(0)).total for t in (None, "critic", "generator"))
    assert torch.equal(first, critic) and not torch.equal(first, generator_)


@pytest.mark.parametrize(
    "family, wrong, message",
    [
        (GAN, {"latent_dim": 0}, "latent_dim and n_critic must be at least 1, not 0 and 1"),
        (GAN, {"loss": "minimax"}, "loss must be 'non_saturating' or 'hinge', not 'minimax'"),
        (WGAN, {"n_critic": 0}, "latent_dim and n_critic must be at least 1, not 48 and 0"),
        (WGAN, {"clip": 0.0}, "clip must be positive, not 0.0"),
        (WGANGP, {"penalty": -1.0}, "penalty must not be negative, not -1.0"),
        (WGANGP, {"critic": DCGANCritic, "shape": (1, 16, 16)}, "the critic must not have batch norm"),
    ],
)
def test_what_makes_no_sense_is_refused(family, wrong, message):
    with pytest.raises(ValueError, match=message):
        wgan(family=family, **wrong)


def test_a_gan_covers_all_of_eight_gaussians():
    """A few seconds of training: every mode has its share, and nearly all samples lie within four sigma of one."""
    torch.manual_seed(0)
    law = GaussianMixture()
    data = law.sample(20_000, generator("data"))
    small = lambda *shapes: MLP(*shapes, width=64, depth=2)  # noqa: E731
    model = GAN((2,), generator=small, critic=small, latent_dim=2)
    optimizers = {
        name: torch.optim.Adam(part.parameters(), lr=1e-3, betas=(0.0, 0.9), fused=True)
        for name, part in model.networks().items()
    }
    average = copy.deepcopy(model.generator).requires_grad_(False)
    for step in range(1600):
        turn = model.turn(step)
        for name, part in model.networks().items():
            part.requires_grad_(name == turn)
        optimizers[turn].zero_grad()
        model.loss(data[torch.randint(20_000, (128,))], turn=turn).total.backward()
        optimizers[turn].step()
        if turn == "generator":
            torch._foreach_lerp_(list(average.parameters()), list(model.generator.parameters()), 0.01)
    model.generator.load_state_dict(average.state_dict())
    distance, mode = torch.cdist(model.sample(4000, rng=generator("samples")).x.double(), law.means).min(1)
    near = distance <= 4 * 0.2
    assert near.double().mean() > 0.95
    assert (torch.bincount(mode[near], minlength=8) / 4000).min() > 0.05
