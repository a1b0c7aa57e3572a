"""Glow with random weights, float64: each layer and the whole flow against the Jacobian by autograd and their inverse, the
first batch's statistics, and what training keeps of them. Random and not fresh: a fresh flow is nearly a rotation, of which
most faults leave no trace."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn

from genzoo.conditions import ClassLabels
from genzoo.data.dataset import Split
from genzoo.data.loader import Batches
from genzoo.distributions.discretization import bits_per_dim, dequantize
from genzoo.families.glow import FlowStep, Glow, InvertibleConv
from genzoo.families.glow import Split as Leaving
from genzoo.nn.coupling import ActNorm, EdgeConv, GlowNet, data_dependent_init
from genzoo.nn.mlp import MLP
from genzoo.training.budget import Budget
from genzoo.training.ema import EMA
from genzoo.training.module import GenerativeModule

conv = functools.partial(GlowNet, width=6)
small = functools.partial(MLP, width=16, depth=1)


def randomised(module: nn.Module, gain: float = 0.07) -> nn.Module:
    """Move every weight away from where it starts, and leave training mode."""
    for parameter in module.parameters():
        parameter.data += gain * torch.randn_like(parameter)
    return module.double().eval()


CASES = {
    "one channel": lambda: Glow((1, 8, 8), network=conv, levels=17, steps=2),
    "three channels": lambda: Glow((3, 4, 4), network=conv, levels=256, steps=3),
    "three scales": lambda: Glow((1, 8, 8), network=conv, levels=256, scales=3, steps=2),
    "not square": lambda: Glow((1, 4, 12), network=conv, levels=2, steps=2),
    "additive": lambda: Glow((1, 8, 8), network=conv, levels=17, steps=3, affine=False),
    "no logit": lambda: Glow((1, 8, 8), network=conv, levels=17, steps=2, logit=False),
    "plane": lambda: Glow((2,), network=small, steps=4),
    "odd vector": lambda: Glow((5,), network=small, steps=3),
}
every = pytest.mark.parametrize("name", CASES)


def case(name: str, n: int) -> tuple[Glow, Tensor]:
    model = randomised(CASES[name]())
    x = torch.randn(n, *model.shape, dtype=torch.float64)
    return model, x if model.levels is None else torch.tanh(x)


def slogdet(function, x: Tensor) -> float:
    jacobian = torch.func.jacfwd(lambda one: function(one[None])[0].flatten())(x).reshape(x.numel(), x.numel())
    return float(torch.linalg.slogdet(jacobian).logabsdet)


# The whole flow


@every
@torch.no_grad()
def test_the_range_of_log_det_is_logged(name):
    model, x = case(name, 5)
    log_det, terms = model.forward_and_log_det(x)[1] / model.dim, model.loss(x).terms
    assert (terms["log_det_min"], terms["log_det_max"]) == (log_det.min(), log_det.max())
    assert {"log_det_min", "log_det_max"} <= set(model.diagnostics)


@every
@torch.no_grad()
def test_log_det_is_that_of_the_jacobian(name):
    model, x = case(name, 2)
    log_det = model.forward_and_log_det(x)[1]
    for i in range(2):
        assert float(log_det[i]) == pytest.approx(slogdet(model.encode, x[i]), abs=1e-9)
    assert not torch.allclose(log_det[0], log_det[1])


@every
@torch.no_grad()
def test_the_way_back_is_the_inverse_in_both_orders(name):
    model, x = case(name, 16)
    torch.testing.assert_close(model.decode(model.encode(x)), x, atol=1e-9, rtol=0)
    z = torch.randn(16, model.dim, dtype=torch.float64) * (
        1.0 if model.logit is None else 0.2
    )  # where no sigmoid is flat
    torch.testing.assert_close(model.encode(model.decode(z)), z, atol=1e-8, rtol=0)


@every
@torch.no_grad()
def test_log_prob_is_the_change_of_variables(name):
    model, x = case(name, 5)
    z, log_det = model.forward_and_log_det(x)
    base = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(model.log_prob(x).value, base + log_det, atol=1e-9, rtol=0)
    torch.testing.assert_close(model.loss(x).total, -(base + log_det).mean() / model.dim, atol=1e-9, rtol=0)


def grid(n: int, reach: float) -> tuple[Tensor, float]:
    axis = reach * (2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1)
    return torch.cartesian_prod(axis, axis), (2 * reach / n) ** 2


@torch.no_grad()
def test_the_density_of_the_plane_integrates_to_one_for_each_class():
    model = randomised(Glow((2,), ClassLabels(3), network=small, steps=4))
    points, area = grid(500, 16.0)
    densities = [model.log_prob(points, torch.full((len(points),), c)).value.exp() for c in range(3)]
    for p in densities:
        assert float(p.sum() * area) == pytest.approx(1.0, abs=1e-4)
    assert (densities[0] - densities[1]).abs().max() > 1e-3


@torch.no_grad()
def test_samples_of_the_plane_follow_the_density():
    """Moments of the samples against those of the density on a grid."""
    model = randomised(Glow((2,), network=small, steps=4))
    points, area = grid(600, 16.0)
    p = model.log_prob(points).value.exp() * area
    x = model.sample(100_000).x
    mean = (p[:, None] * points).sum(0)
    spread = (p[:, None] * (points - mean) ** 2).sum(0)
    assert ((x.mean(0) - mean).abs() < 5 * (spread / len(x)).sqrt()).all()
    torch.testing.assert_close(x.var(0), spread, rtol=0.05, atol=0)


@torch.no_grad()
def test_uniform_bytes_score_8_bits_under_an_identity():
    """Without a logit, and with a uniform base: the fresh flow turns pixels alone, and log det W of a rotation is 0."""
    model = Glow((3, 8, 8), network=conv, levels=256, steps=2, affine=False, logit=False).double().eval()
    x = dequantize(torch.randint(256, (20, 3, 8, 8)), 256).double()
    z, log_det = model.forward_and_log_det(x)
    assert not torch.equal(z, x.flatten(1))
    torch.testing.assert_close(z.square().sum(1), x.square().flatten(1).sum(1), rtol=1e-6, atol=0)
    bits = bits_per_dim(log_det - model.dim * math.log(2.0), model.dim, 256)
    torch.testing.assert_close(bits, torch.full((20,), 8.0).double(), atol=1e-6, rtol=0)


def test_a_fresh_flow_shrinks_what_an_affine_coupling_moves_by_sigmoid_2():
    """Half of the elements in each of the steps; all else is a rotation."""
    model = Glow((4,), network=functools.partial(small, zero_init=True), steps=3).double().eval()
    log_det = model.forward_and_log_det(torch.randn(5, 4, dtype=torch.float64))[1]
    expected = 3 * 2 * math.log(1 / (1 + math.exp(-2)))
    torch.testing.assert_close(log_det, torch.full_like(log_det, expected), atol=1e-6, rtol=0)


# Its layers


@pytest.mark.parametrize("channels", [1, 2, 5, 12])
@torch.no_grad()
def test_the_factors_of_a_1x1_convolution_start_as_a_rotation_and_always_give_its_determinant(channels):
    layer = InvertibleConv(channels).double()
    eye = torch.eye(channels, dtype=torch.float64)
    torch.testing.assert_close(layer.matrix() @ layer.matrix().T, eye, atol=1e-6, rtol=0)
    randomised(layer, 0.5)
    torch.testing.assert_close(layer.log_det, torch.linalg.slogdet(layer.matrix()).logabsdet, atol=1e-10, rtol=0)
    torch.testing.assert_close(layer.inverse_matrix() @ layer.matrix(), eye, atol=1e-9, rtol=0)
    torch.testing.assert_close(layer.matrix() @ layer.inverse_matrix(), eye, atol=1e-9, rtol=0)


def test_every_number_of_the_matrix_is_free():
    """As many weights as entries, and no two of them do the same: the Jacobian from factors to matrix has full rank."""
    layer = randomised(InvertibleConv(4), 0.3)
    jacobian = torch.autograd.functional.jacobian(
        lambda factors: torch.func.functional_call(_Matrix(layer), {"layer.factors": factors}, ()), layer.factors
    ).reshape(16, 16)
    assert torch.linalg.matrix_rank(jacobian) == 16


class _Matrix(nn.Module):
    def __init__(self, layer: InvertibleConv):
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.matrix()


@pytest.mark.parametrize("affine", [True, False])
@torch.no_grad()
def test_a_step_returns_its_jacobian_and_has_an_inverse(affine):
    step = randomised(FlowStep(conv, (4, 3, 2), affine, None))
    x = torch.randn(3, 4, 3, 2, dtype=torch.float64)
    z, log_det = step(x, None)
    for i in range(3):
        assert float(log_det[i]) == pytest.approx(slogdet(lambda one: step(one, None)[0], x[i]), abs=1e-9)
    torch.testing.assert_close(step.inverse(z, None), x, atol=1e-9, rtol=0)


@torch.no_grad()
def test_what_a_1x1_convolution_and_an_actnorm_add_is_the_sides_times_their_own():
    step = randomised(FlowStep(conv, (4, 3, 5), affine=False, condition=None))
    expected = 15 * (torch.linalg.slogdet(step.mix.matrix()).logabsdet + step.norm.log_scale.sum())
    log_det = step(torch.randn(2, 4, 3, 5, dtype=torch.float64), None)[1]
    torch.testing.assert_close(log_det, expected.expand(2), atol=1e-9, rtol=0)


@torch.no_grad()
def test_half_of_the_channels_leave_standardised_by_the_other_half():
    split = randomised(Leaving(4))
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    kept, z, log_det = split(x)
    assert torch.equal(kept, x[:, :2])
    mean, log_std = split.moments(x[:, :2]).chunk(2, dim=1)
    law = torch.distributions.Normal(mean, log_std.exp()).log_prob(x[:, 2:])
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(law.flatten(1).sum(1), standard.flatten(1).sum(1) + log_det, atol=1e-9, rtol=0)
    torch.testing.assert_close(split.inverse(kept, z), x, atol=1e-12, rtol=0)


@torch.no_grad()
def test_what_never_leaves_is_standardised_by_its_class():
    model = randomised(Glow((1, 4, 4), ClassLabels(3), network=conv, levels=17, scales=1, steps=1))
    x, y = torch.tanh(torch.randn(6, 1, 4, 4)).double(), torch.arange(6) % 3
    with_law = model.forward_and_log_det(x, y)
    mean, log_std = model.top_prior.weight[y].view(6, 8, 1, 1).chunk(2, dim=1)
    model.top_prior.weight.zero_()
    without = model.forward_and_log_det(x, y)
    z = without[0].view(6, 4, 2, 2)
    torch.testing.assert_close(with_law[0].view(6, 4, 2, 2), (z - mean) / log_std.exp(), atol=1e-9, rtol=0)
    torch.testing.assert_close(with_law[1], without[1] - 4 * log_std.flatten(1).sum(1), atol=1e-9, rtol=0)


@torch.no_grad()
def test_a_convolution_sees_the_border_as_one_more_channel_that_is_one_outside():
    layer = randomised(EdgeConv(3, 5, scaled=True))
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    padded = torch.ones(2, 4, 8, 6, dtype=torch.float64)
    padded[:, :, 1:-1, 1:-1] = 0
    padded[:, :3] = 0
    padded[:, :3, 1:-1, 1:-1] = x
    weight = torch.cat([layer.image.weight, layer.edge.weight], dim=1)
    expected = torch.conv2d(padded, weight, layer.image.bias) * torch.exp(3 * layer.scale)
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=0)
    assert not EdgeConv(3, 5, scaled=True)(x.float()).any()


# The first batch


def initialized(norm: ActNorm, x: Tensor) -> Tensor:
    """Initialise a norm from a batch, and return its output."""
    with data_dependent_init(norm) as needed:
        assert needed
        return norm(x)


def test_the_first_batch_leaves_an_actnorm_with_mean_zero_and_variance_one():
    norm = ActNorm(3).double()
    x = torch.randn(16, 3, 5, 4, dtype=torch.float64) * torch.tensor([0.1, 2.0, 30.0])[:, None, None] + 7
    z = initialized(norm, x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.var((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(norm.inverse(z), x, atol=1e-9, rtol=0)
    assert torch.equal(norm(x + 1), norm(x + 1)) and not torch.allclose(norm(x + 1), z)


@pytest.mark.parametrize("training", [True, False])
def test_no_batch_initialises_but_the_one_that_is_meant_to(training):
    norm, x = ActNorm(3).train(training), 5 + torch.randn(8, 3, 2, 2)
    assert torch.equal(norm(x), x) and torch.equal(norm(x), x)
    z = initialized(norm, x)
    assert not torch.equal(z, x) and not norm.initializing
    assert torch.equal(norm(x + 1), norm(x + 1)) and torch.equal(norm(x), z)
    with data_dependent_init(nn.Linear(2, 2)) as needed:
        assert not needed


def test_a_constant_channel_stays_finite():
    z = initialized(ActNorm(2), torch.full((4, 2, 3, 3), 5.0))
    assert z.isfinite().all() and not z.any()


@pytest.mark.parametrize("way", ["state dict", "deep copy"])
def test_an_initialised_actnorm_is_not_initialised_again(way):
    norm, first, second = ActNorm(3), torch.randn(8, 3, 2, 2), 4 + 2 * torch.randn(8, 3, 2, 2)
    initialized(norm, first)
    if way == "state dict":
        other = ActNorm(3)
        initialized(other, second)  # initialised by other data: the weights that are loaded win
        other.load_state_dict(norm.state_dict())
    else:
        other = copy.deepcopy(norm)
    assert torch.equal(other.train()(second), norm(second))


def test_an_actnorm_that_gets_fresh_weights_is_initialised_again():
    """The trainer measures its speed by a few steps, and then puts the fresh weights back."""
    norm, x = ActNorm(3), 4 + 2 * torch.randn(8, 3, 2, 2)
    fresh = copy.deepcopy(norm.state_dict())
    initialized(norm, torch.randn(8, 3, 2, 2))
    norm.load_state_dict(fresh)
    torch.testing.assert_close(initialized(norm, x).mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)


def training(model: Glow) -> GenerativeModule:
    x = torch.randint(17, (64, *model.shape)).to(torch.uint8)
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    return GenerativeModule(model, adam, Batches(Split(x, None), 32, seed=0), Budget(seconds=60), ema_half_life=32)


def test_the_first_step_of_training_initialises_every_actnorm_by_its_own_input_and_the_average_follows(monkeypatch):
    model = Glow((1, 4, 4), network=conv, levels=17, scales=1, steps=2)
    module = training(model)
    module.cost("train", None)
    norms = {name: layer for name, layer in model.named_modules() if isinstance(layer, ActNorm)}
    assert len(norms) == 2 * 3 and not any(norm.bias.any() or norm.scale.any() for norm in norms.values())

    seen: dict[ActNorm, Tensor] = {}
    init_statistics = ActNorm.init_statistics

    def watch(norm: ActNorm, x: Tensor) -> None:
        assert norm not in seen, "initialised twice"
        init_statistics(norm, x)
        seen[norm] = ((x + norm.bias) * norm.log_scale.exp()).detach()

    monkeypatch.setattr(ActNorm, "init_statistics", watch)
    module.plan.planned_steps = 10
    module.step()
    assert set(seen) == set(norms.values())
    for out in seen.values():
        torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(out.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(out.var((0, 2, 3), correction=0), torch.ones(out.shape[1]), atol=1e-3, rtol=0)
    averaged = dict(module.ema.model.named_modules())
    for name, norm in norms.items():
        assert norm.bias.all() and torch.equal(averaged[name].bias, norm.bias)
        assert norm.scale.all() and torch.equal(averaged[name].scale, norm.scale)


def test_the_average_of_a_trained_flow_is_one_too():
    model = Glow((1, 4, 4), network=conv, levels=17, scales=1, steps=1).double()
    ema = EMA(model, 0.9)
    ema.watch("model", model)
    model.initialize(torch.rand(16, 1, 4, 4).double())
    for _ in range(4):
        model.loss(torch.rand(16, 1, 4, 4).double()).total.backward()
        ema.update("model")
    x = torch.rand(3, 1, 4, 4).double()
    torch.testing.assert_close(ema.model.log_prob(x).value, model.eval().log_prob(x).value, atol=1e-9, rtol=0)


# Precision, refusals


def test_half_precision_networks_leave_the_flow_invertible():
    """Under autocast the nets round, the flow does not: what it says of its Jacobian stays what it does."""
    model, x = case("one channel", 8)
    model, x = model.float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_det = model.forward_and_log_det(x)
        back = model.decode(z)
    assert z.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(back, x, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Glow((1, 6, 8), network=conv), "divisible by 4, not 6x8"),
        (lambda: Glow((1,), network=small), "at least two dimensions"),
        (lambda: Glow((2,), network=small, steps=0), "at least 1, not 2 and 0"),
    ],
)
def test_what_cannot_be_built_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
