r"""R3GAN, whose equilibrium, losses and penalties are closed forms.

Dirac-GAN: data at 0, ``G(z) = theta`` and ``D(x) = psi x``. The Jacobian of gradient flow at the equilibrium, its eigenvalues
``-gamma +- sqrt(gamma^2 - 1/4)``, and the steps of gradient descent that follow from them.
"""

from __future__ import annotations

import cmath
import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import ClassLabels
from genzoo.data.densities import GaussianMixture
from genzoo.families.r3gan import R3GAN
from genzoo.nn.dcgan import DCGANCritic
from genzoo.nn.mlp import MLP
from genzoo.nn.r3gan import R3GANCritic, R3GANGenerator
from genzoo.numerics.random import generator

GAMMAS = [0.0, 0.1, 0.5, 2.0]


class Dirac(nn.Module):
    """The generator ``theta``, whatever the noise."""

    def __init__(self, in_shape, out_shape, condition):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(out_shape, dtype=torch.float64))

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return self.theta.expand(len(z), *self.theta.shape)


class Linear(nn.Module):
    """The critic ``psi x``, (B, 1)."""

    def __init__(self, in_shape, out_shape, condition):
        super().__init__()
        self.psi = nn.Parameter(torch.zeros(math.prod(in_shape), dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x.flatten(1) @ self.psi[:, None]


class Cubic(Linear):
    """The critic ``psi x^3``, flat at 0 and nowhere else."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x**3)


def dirac(gamma: float, psi: float = 0.0, theta: float = 0.0, critic: Any = Linear, **settings) -> R3GAN:
    model = R3GAN((1,), generator=Dirac, critic=critic, latent_dim=1, gamma=gamma, **settings).double()
    with torch.no_grad():
        model.critic.psi.fill_(psi)
        model.generator.theta.fill_(theta)
    return model


def flow(gamma: float, psi: float, theta: float) -> Tensor:
    """Return minus the gradients of both losses, (2,)."""
    model, x = dirac(gamma, psi, theta), torch.zeros(3, 1, dtype=torch.float64)
    slopes = []
    for turn, network in model.networks().items():
        (slope,) = torch.autograd.grad(model.loss(x, turn=turn).total, list(network.parameters()))
        slopes.append(-slope)
    return torch.cat(slopes)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_dirac_gan_has_the_eigenvalues_of_the_theorem(gamma):
    """With R1 and R2 the equilibrium attracts; without them the eigenvalues are +-i/2."""
    assert flow(gamma, 0.0, 0.0).tolist() == [0.0, 0.0], "an equilibrium"
    h = 1e-5  # the velocity is odd: the error of central differences is of order h^2
    columns = [(flow(gamma, *at) - flow(gamma, *(-v for v in at))) / (2 * h) for at in [(h, 0.0), (0.0, h)]]
    jacobian = torch.stack(columns, dim=1)
    expected = torch.tensor([[-2 * gamma, -0.5], [0.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=1e-9)
    root = cmath.sqrt(gamma**2 - 0.25)
    found = sorted(torch.linalg.eigvals(jacobian).tolist(), key=lambda v: (v.real, v.imag))
    closed = sorted([-gamma - root, -gamma + root], key=lambda v: (v.real, v.imag))
    assert all(
        abs(a - b) < 2e-5 for a, b in zip(found, closed, strict=True)
    )  # to the root of the error where they coincide, at 1/2
    assert all(v.real < -1e-6 for v in found) == (gamma > 0)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 1.0])
def test_descent_near_the_equilibrium_is_the_linear_map_of_its_eigenvalues(gamma):
    """Alternating steps: of the critic by the first row of the Jacobian, of the generator by the second with the new critic."""
    model, rate, x = dirac(gamma, psi=1e-6, theta=2e-6), 0.1, torch.zeros(4, 1, dtype=torch.float64)
    optimizers = {name: torch.optim.SGD(part.parameters(), lr=rate) for name, part in model.networks().items()}
    critic = torch.tensor([[1 - 2 * gamma * rate, -rate / 2], [0, 1]], dtype=torch.float64)
    generator_ = torch.tensor([[1, 0], [rate / 2, 1]], dtype=torch.float64)
    step = generator_ @ critic
    state = torch.tensor([1e-6, 2e-6], dtype=torch.float64)
    for i in range(400):
        turn = model.turn(i)
        assert turn == ("generator" if i % 2 else "critic")
        optimizers[turn].zero_grad()
        model.loss(x, turn=turn, rng=generator(i)).total.backward()
        optimizers[turn].step()
    expected = torch.linalg.matrix_power(step, 200) @ state
    now = torch.cat([model.critic.psi, model.generator.theta]).detach()
    torch.testing.assert_close(now, expected, rtol=1e-6, atol=1e-16)
    assert (float(now.norm()) < 0.2 * float(state.norm())) == (gamma > 0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_losses_are_their_formulas(gamma):
    psi, theta = 0.7, -1.3
    model = dirac(gamma, psi, theta)
    x = torch.tensor([[0.4], [-2.0], [1.1]], dtype=torch.float64)
    total, terms, _ = model.loss(x, turn="critic")
    margins = [psi * (v - theta) for v in x[:, 0].tolist()]
    expected = sum(math.log(1 + math.exp(-m)) for m in margins) / 3
    assert float(terms["penalty"]) == pytest.approx(2 * psi**2, rel=1e-12)
    assert total.item() == pytest.approx(expected + gamma / 2 * 2 * psi**2, rel=1e-12)
    assert float(terms["accuracy"]) == pytest.approx(2 / 3)
    assert float(terms["distance"]) == pytest.approx(sum(margins) / 3, rel=1e-12)
    total = model.loss(x, turn="generator").total
    assert total.item() == pytest.approx(sum(math.log(1 + math.exp(m)) for m in margins) / 3, rel=1e-12)
    total.backward()
    slope = -psi * sum(1 / (1 + math.exp(-m)) for m in margins) / 3
    assert float(model.generator.theta.grad) == pytest.approx(slope, rel=1e-12), (
        "the gradient goes through the sample alone"
    )


def test_both_sides_are_penalised():
    """A critic that is flat at the data has a slope at the samples, and the other way round."""
    for at_data, at_samples in [(0.0, 1.5), (1.5, 0.0)]:
        model = dirac(1.0, psi=0.5, theta=at_samples, critic=Cubic)
        x = torch.full((5, 1), at_data, dtype=torch.float64)
        penalty = model.loss(x, turn="critic").terms["penalty"]
        assert float(penalty) == pytest.approx((0.5 * 3 * 1.5**2) ** 2, rel=1e-12)


def test_the_penalty_is_of_each_sample_over_all_of_its_dimensions():
    """Squares are summed over dimensions and averaged over samples, and their gradient reaches the critic."""
    shape, gamma = (2, 3, 3), 0.3
    model = R3GAN(shape, generator=Dirac, critic=Cubic, latent_dim=1, gamma=gamma).double()
    with torch.no_grad():
        model.critic.psi.copy_(torch.randn(18, generator=generator("psi")).double())
        model.generator.theta.copy_(torch.randn(shape, generator=generator("theta")).double())
    x = torch.randn(7, *shape, generator=generator("x"), dtype=torch.float64)
    loss = model.loss(x, turn="critic")
    psi = model.critic.psi.detach().clone().requires_grad_()
    fake = model.generator.theta.detach().expand(7, *shape)
    slopes = [(3 * psi * v.flatten(1) ** 2).square().sum(1).mean() for v in (x, fake)]
    margin = (x.flatten(1) ** 3 - fake.flatten(1) ** 3) @ psi
    expected = F.softplus(-margin).mean() + gamma / 2 * (slopes[0] + slopes[1])
    torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=0)
    loss.total.backward()
    torch.testing.assert_close(model.critic.psi.grad, torch.autograd.grad(expected, psi)[0], rtol=1e-10, atol=1e-12)


def test_a_loss_has_the_same_value_in_inference_mode_and_an_evaluation():
    model = R3GAN((2,), ClassLabels(3), gamma=0.7).double()
    x, y = torch.randn(6, 2, dtype=torch.float64), torch.arange(6) % 3
    expected = model.loss(x, y, turn="critic", rng=generator(0)).total
    with torch.inference_mode():
        found = model.eval().loss(x.clone(), y.clone(), turn="critic", rng=generator(0)).total
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_pairs_have_one_condition():
    """A sample is compared with data of its own class."""
    seen = []

    class Spy(Linear):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            seen.append(y)
            return super().forward(x)

    model = R3GAN((1,), ClassLabels(5), generator=Dirac, critic=Spy, latent_dim=1).double()
    x, y = torch.randn(4, 1, dtype=torch.float64), torch.tensor([3, 1, 4, 0])
    model.loss(x, y, turn="critic")
    assert seen[0].tolist() == [3, 1, 4, 0, 3, 1, 4, 0]
    model.loss(x, y, turn="generator")
    assert [v.tolist() for v in seen[1:]] == [[3, 1, 4, 0]] * 2


def test_the_weight_of_the_penalties_is_annealed_by_a_cosine_and_resumed():
    model, x = dirac(0.4, psi=1.0, final_gamma=0.1, annealing=100), torch.zeros(10, 1, dtype=torch.float64)
    found = []
    for step in range(13):
        found.append(float(model.loss(x, turn="critic").total.detach()) - math.log(2))
        model.after_step({}, 10)
        if step == 6:
            state = copy.deepcopy(model.state_dict())
            model = dirac(0.4, psi=1.0, final_gamma=0.1, annealing=100)
            model.load_state_dict(state)
    expected = [0.1 + 0.15 * (1 + math.cos(math.pi * min(1, step / 10))) for step in range(13)]
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"gamma": -1.0}, "gamma must not be negative, not -1.0"),
        ({"final_gamma": -0.1, "annealing": 5}, "final_gamma must not be negative, not -0.1"),
        ({"final_gamma": 0.1}, "final_gamma=0.1 needs annealing, the images until it is reached"),
        ({"critic": DCGANCritic}, "the critic must not have batch norm"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        R3GAN((1, 16, 16), levels=256, **settings)


# Networks


def test_the_networks_have_the_layers_of_the_paper_s_model_of_cifar10():
    """Eight blocks of 768 channels, twice as many inside, in 96 groups; the numbers of weights by hand."""
    settings = {"width": 768, "max_width": 768, "blocks": 2}
    block = 2 * 768 * 1536 + 1536 * 16 * 9 + 2 * 1536
    with torch.device("meta"):
        networks = R3GANGenerator((64,), (3, 32, 32), **settings), R3GANCritic((3, 32, 32), (1,), **settings)
        classes = R3GANCritic((3, 32, 32), (1,), ClassLabels(10), **settings)
    counts = [sum(p.numel() for p in network.parameters()) for network in (*networks, classes)]
    assert counts[0] == 8 * block + 768 * 16 + 64 * 768 + 768 * 3
    assert counts[1] == 8 * block + 3 * 768 + 768 * 16 + 768
    assert counts[2] == counts[1] + 768 * 767 + 10 * 768
    assert networks[0].blocks[0][0].mix.groups == 96


@pytest.mark.parametrize("build", [R3GANGenerator, R3GANCritic])
def test_residual_branches_begin_at_zero_and_keep_the_scale_of_he_over_the_number_of_blocks(build):
    network = build(*(((64,), (3, 32, 32)) if build is R3GANGenerator else ((3, 32, 32), (1,))), width=64, blocks=2)
    blocks = [block for stage in network.blocks for block in stage]
    assert len(blocks) == 8
    for block in blocks:
        assert not block.narrow.weight.any()
        for layer, fan_in in ((block.widen, block.widen.in_channels), (block.mix, 16 * 9)):
            assert float(layer.weight.std()) == pytest.approx(math.sqrt(2 / 1.04 / fan_in) * 8**-0.25, rel=0.03)
            assert not layer.bias.any()
        h = torch.randn(2, block.widen.in_channels, 4, 4)
        assert torch.equal(block(h), h)


def test_features_keep_their_scale_through_the_networks():
    """Without norms: the output of a new critic of noise has about unit variance, and so has that of a new generator."""
    torch.manual_seed(0)
    critic, maker = R3GANCritic((3, 32, 32), (1,)), R3GANGenerator((64,), (3, 32, 32))
    with torch.no_grad():
        images = maker(torch.randn(64, 64))
        assert 0.3 < float(images.std()) < 3
        smooth = torch.randn(64, 3, 1, 1).expand(-1, -1, 32, 32)  # no averaging over pixels
        assert 0.05 < float(critic(smooth).std()) < 5


@pytest.mark.parametrize("wrong", [{"width": 12}, {"blocks": 0}, {"expansion": 0}, {"group_width": 0}])
def test_impossible_networks_are_refused(wrong):
    name, value = next(iter(wrong.items()))
    message = "group_width=16 does not divide 24" if name == "width" else f"{name} must be at least 1, not {value}"
    with pytest.raises(ValueError, match=message):
        R3GANCritic((1, 8, 8), (1,), **wrong)


def test_it_covers_all_of_eight_gaussians_where_the_data_lie():
    """A few seconds of training: every mode has its fraction of the samples, and most samples lie within four sigma of one."""
    torch.manual_seed(0)
    density = GaussianMixture()
    data = density.sample(20_000, generator("data"))
    small = lambda *shapes: MLP(*shapes, width=64, depth=2)  # noqa: E731
    model = R3GAN((2,), generator=small, critic=small, latent_dim=2, gamma=0.02)
    adams = {
        name: torch.optim.Adam(part.parameters(), lr=1e-3, betas=(0.0, 0.9), fused=True)
        for name, part in model.networks().items()
    }
    average = copy.deepcopy(model.generator).requires_grad_(False)
    for step in range(1600):
        turn = model.turn(step)
        for name, part in model.networks().items():
            part.requires_grad_(name == turn)
        adams[turn].zero_grad()
        model.loss(data[torch.randint(20_000, (128,))], turn=turn).total.backward()
        adams[turn].step()
        if turn == "generator":
            torch._foreach_lerp_(list(average.parameters()), list(model.generator.parameters()), 0.01)
    model.generator.load_state_dict(average.state_dict())
    distance, mode = torch.cdist(model.sample(4000, rng=generator("samples")).x.double(), density.means).min(1)
    near = distance <= 4 * 0.2
    assert near.double().mean() > 0.9
    assert (torch.bincount(mode[near], minlength=8) / 4000).min() > 0.05
