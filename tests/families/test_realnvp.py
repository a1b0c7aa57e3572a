"""The flow with random weights, float64: its inverse, its Jacobian by autograd, its total mass, and which elements each
coupling moves. Random and not fresh: a fresh flow is nearly the identity, of which most faults leave no trace."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import ClassLabels
from genzoo.distributions.discretization import bits_per_dim, dequantize
from genzoo.distributions.transforms import BatchNorm
from genzoo.families.coupling_flow import Coupling
from genzoo.families.coupling_flow import Scale as CouplingScale
from genzoo.families.realnvp import AdditiveCoupling, AffineCoupling, RealNVP
from genzoo.nn.coupling import FullResolution, NormalizedConv, RealNVPNet
from genzoo.nn.embeddings import embed
from genzoo.nn.mlp import MLP

Scale = functools.partial(CouplingScale, AffineCoupling)


class Conv(nn.Module):
    """A small convolutional net that may have a condition."""

    def __init__(self, in_shape, out_shape, condition):
        super().__init__()
        self.first = nn.Conv2d(in_shape[0], 8, 3, padding=1)
        self.embed_y = embed(condition, 8)
        self.second = nn.Conv2d(8, out_shape[0], 3, padding=1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.first(x)
        if self.embed_y is not None:
            h = h + self.embed_y(y)[:, :, None, None]
        return self.second(torch.tanh(h))


def zero(in_shape, out_shape, condition) -> nn.Module:
    """A net that starts as zero, as those of the configurations do."""
    net = Conv(in_shape, out_shape, condition) if len(in_shape) == 3 else small(in_shape, out_shape, condition)
    last = net.second if isinstance(net, Conv) else net.head
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return net


def small(in_shape, out_shape, condition) -> nn.Module:
    return MLP(in_shape, out_shape, condition, width=16, depth=1)


def randomised(model: RealNVP, gain: float = 1.5) -> RealNVP:
    for name, parameter in model.named_parameters():
        if name.endswith(("bound", "log_scale")):
            nn.init.uniform_(parameter, 0.3, 0.8)
        elif parameter.ndim > 1:
            parameter.data.mul_(gain)
    return model.double()


def settled(model: RealNVP) -> RealNVP:
    """Give the running averages of batch norms something to say, and leave training mode."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.mean.normal_()
            module.variance.uniform_(0.5, 2.0)
    return model.eval()


CASES = {
    "one channel": lambda: RealNVP((1, 8, 8), network=Conv, levels=17),
    "three channels": lambda: RealNVP((3, 8, 8), network=Conv, levels=256),
    "three scales": lambda: RealNVP((2, 8, 8), network=Conv, levels=256, scales=3, couplings=2),
    "MNIST": lambda: RealNVP((1, 28, 28), network=Conv, levels=256),
    "not square": lambda: RealNVP((1, 4, 12), network=Conv, levels=2),
    "full resolution": lambda: RealNVP((3, 4, 8), network=Conv, levels=256, full_resolution=True),
    "batch norm": lambda: settled(RealNVP((1, 8, 8), network=Conv, levels=17, full_resolution=True, batch_norm=True)),
    "plane": lambda: RealNVP((2,), network=small, couplings=4),
    "normalised plane": lambda: settled(RealNVP((2,), network=small, couplings=4, batch_norm=True)),
    "odd vector": lambda: RealNVP((5,), network=small, couplings=3),
    "additive": lambda: RealNVP((5,), network=small, couplings=4, coupling="additive"),
    "additive image": lambda: RealNVP((1, 8, 8), network=Conv, levels=17, coupling="additive"),
    "additive, full resolution": lambda: RealNVP(
        (3, 4, 8), network=Conv, levels=256, coupling="additive", full_resolution=True
    ),
}
every = pytest.mark.parametrize("name", CASES)


def case(name: str, n: int) -> tuple[RealNVP, Tensor]:
    model = randomised(CASES[name]())
    x = torch.randn(n, *model.shape, dtype=torch.float64)
    return model, x if model.levels is None else torch.tanh(x)


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
    for i in range(2 if model.dim < 500 else 1):
        jacobian = torch.func.jacfwd(lambda one: model.encode(one[None])[0])(x[i]).view(model.dim, model.dim)
        assert float(torch.linalg.slogdet(jacobian).logabsdet) == pytest.approx(float(log_det[i]), abs=1e-9)
    constant = name == "additive"  # of vectors, which have no logit
    assert torch.allclose(log_det[0], log_det[1]) == constant


@every
@torch.no_grad()
def test_the_way_back_is_the_inverse_in_both_orders(name):
    model, x = case(name, 16)
    torch.testing.assert_close(model.decode(model.encode(x)), x, atol=1e-9, rtol=0)
    z = torch.randn(16, model.dim, dtype=torch.float64)
    torch.testing.assert_close(model.encode(model.decode(z)), z, atol=1e-8, rtol=0)


@every
@torch.no_grad()
def test_log_prob_is_the_change_of_variables(name):
    model, x = case(name, 5)
    z, log_det = model.forward_and_log_det(x)
    base = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(model.log_prob(x).value, base + log_det, atol=1e-9, rtol=0)
    assert model.log_prob(x).stderr is None
    torch.testing.assert_close(model.loss(x).total, -(base + log_det).mean() / model.dim, atol=1e-9, rtol=0)


@torch.no_grad()
def test_the_density_of_the_plane_integrates_to_one():
    model, n, reach = randomised(RealNVP((2,), network=small, couplings=4)), 500, 14.0
    axis = reach * (2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1)
    mass = model.log_prob(torch.cartesian_prod(axis, axis)).value.exp().sum() * (2 * reach / n) ** 2
    assert float(mass) == pytest.approx(1.0, abs=1e-4)


@torch.no_grad()
def test_samples_of_the_plane_follow_the_density():
    """Moments of the samples against those of the density on a grid."""
    model, n, reach = randomised(RealNVP((2,), network=small, couplings=4)), 600, 14.0
    axis = reach * (2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1)
    points = torch.cartesian_prod(axis, axis)
    p = model.log_prob(points).value.exp() * (2 * reach / n) ** 2
    x = model.sample(100_000).x
    mean = (p[:, None] * points).sum(0)
    spread = (p[:, None] * (points - mean) ** 2).sum(0)
    assert ((x.mean(0) - mean).abs() < 5 * (spread / len(x)).sqrt()).all()
    torch.testing.assert_close(x.var(0), spread, rtol=0.05, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The measure of images.


def test_uniform_bytes_score_8_bits_under_the_law_that_the_logit_gives_them():
    """A fresh flow is the logit alone. Swap its normal base for the law of logit(p), p uniform on [.05, .95]: then the
    flow's density is that of uniform data, 2^-D, and every image scores 8.000 bits/dim."""
    model = RealNVP((3, 8, 8), network=zero, levels=256).double()
    x = dequantize(torch.randint(256, (20, 3, 8, 8)), 256).double()
    z, log_det = model.forward_and_log_det(x)
    base = (-F.softplus(z) - F.softplus(-z) - math.log(0.9)).sum(1)
    bits = bits_per_dim(base + log_det, model.dim, 256)
    torch.testing.assert_close(bits, torch.full((20,), 8.0).double(), atol=1e-9, rtol=0)


@torch.no_grad()
def test_a_fresh_image_flow_gives_the_interval_the_mass_of_its_normal_base():
    """By the change of variables, P(|N| < logit .95) in each dimension."""
    model = RealNVP((1, 2, 2), network=zero, levels=256, scales=1).double()
    n = 12
    axis = 2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1
    x = torch.cartesian_prod(axis, axis, axis, axis).view(-1, 1, 2, 2)
    mass = float(model.log_prob(x).value.exp().mean() * 2**4)
    assert mass == pytest.approx(math.erf(math.log(19) / math.sqrt(2)) ** 4, rel=1e-2)


def test_a_fresh_flow_of_points_is_the_normal_law():
    x = torch.randn(9, 4, dtype=torch.float64)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
    torch.testing.assert_close(RealNVP((4,), network=zero).double().log_prob(x).value, expected, atol=1e-12, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Which elements move.


def pixels_moved(scale: CouplingScale, coupling: Coupling, shape: tuple[int, ...]) -> Tensor:
    """Which pixels of the scale's input a coupling moves, (C, H, W), seen by moving them."""
    x = torch.randn(1, *shape, dtype=torch.float64)
    blocks = F.pixel_unshuffle(x, 2)
    return F.pixel_shuffle(coupling(blocks, None)[0] - blocks, 2)[0] != 0


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 6)])
def test_the_first_couplings_of_a_scale_alternate_between_the_colours_of_a_checkerboard(shape):
    scale = Scale(Conv, shape, 3, 3, None).double()
    rows, columns = torch.arange(shape[1]), torch.arange(shape[2])
    odd = ((rows[:, None] + columns) % 2 == 1).expand(shape)
    assert torch.equal(pixels_moved(scale, scale.couplings[0], shape), odd)
    assert torch.equal(pixels_moved(scale, scale.couplings[1], shape), ~odd)
    assert torch.equal(pixels_moved(scale, scale.couplings[2], shape), odd)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 6)])
def test_the_last_couplings_of_a_scale_alternate_between_the_halves_of_the_channels(shape):
    scale = Scale(Conv, shape, 2, 2, None).double()
    x = torch.randn(1, *scale.out_shape, dtype=torch.float64)
    half = torch.arange(4 * shape[0]) >= 2 * shape[0]
    for coupling, moved in zip(scale.couplings[2:], (half, ~half), strict=True):
        assert torch.equal((coupling(x, None)[0] != x)[0].flatten(1).all(1), moved)
        assert torch.equal((coupling(x, None)[0] != x)[0].flatten(1).any(1), moved)


def test_a_coupling_scales_what_it_moves_and_reads_only_what_it_keeps():
    coupling = AffineCoupling(small, (5,), [0, 3], None).double()
    x = torch.randn(5, dtype=torch.float64)
    jacobian = torch.func.jacfwd(lambda one: coupling(one[None], None)[0][0])(x)
    moved, kept = [0, 3], [1, 2, 4]
    assert torch.equal(jacobian[kept], torch.eye(5, dtype=torch.float64)[kept])
    assert torch.equal(jacobian[moved][:, moved], jacobian[moved][:, moved].diag().diag())
    assert (jacobian[moved][:, kept] != 0).all()
    log_det = coupling(x[None], None)[1]
    torch.testing.assert_close(jacobian[moved][:, moved].diag().log().sum(), log_det[0], atol=1e-12, rtol=0)


@torch.no_grad()
def test_the_log_scale_is_bounded_by_a_learned_factor():
    coupling = AffineCoupling(lambda i, o, c: nn.Linear(1, 2), (2,), [1], None).double()
    coupling.net.forward = lambda a, y: torch.tensor([[1e9, 0.0]]).double().expand(len(a), 2)
    assert float(coupling(torch.ones(1, 2).double(), None)[1]) == 1.0
    coupling.bound.data.fill_(0.25)
    assert float(coupling(torch.ones(1, 2).double(), None)[1]) == 0.25


@pytest.mark.parametrize("name", [name for name in CASES if name != "MNIST"])  # of 784 rows, built as "one channel"
@torch.no_grad()
def test_no_latent_is_an_element_that_passed_by_unmoved(name):
    """Each coordinate of z is bent by other elements of x: no row of the Jacobian has a single entry."""
    model, x = case(name, 1)
    jacobian = torch.func.jacfwd(lambda one: model.encode(one[None])[0])(x[0]).view(model.dim, model.dim)
    assert ((jacobian.abs() > 1e-12).sum(1) > 1).all()


def test_half_of_the_channels_leave_at_each_scale_but_the_last():
    """Latents that left at the first scale do not depend on the second scale's weights."""
    model, x = case("one channel", 3)
    before = model.encode(x)
    for parameter in model.blocks[1].parameters():
        parameter.data.add_(0.1)
    changed = (model.encode(x) != before).any(0)
    assert not changed[:32].any()
    assert changed[32:].all()


# ---------------------------------------------------------------------------------------------------------------------
# As in the paper.


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 6)])
def test_at_full_resolution_the_colours_alternate_and_the_last_scale_has_one_checkerboard_more(shape):
    model = RealNVP(shape, network=Conv, levels=256, scales=1, full_resolution=True).double()
    (scale,) = model.blocks
    rows, columns = torch.arange(shape[1]), torch.arange(shape[2])
    odd = ((rows[:, None] + columns) % 2 == 1).expand(shape)
    assert len(scale.couplings) == 4
    for i, coupling in enumerate(scale.couplings):
        assert torch.equal(pixels_moved(scale, coupling, shape), odd if i % 2 == 0 else ~odd)
    first, last = RealNVP((1, 8, 8), network=Conv, levels=256, full_resolution=True).blocks
    assert [isinstance(c.net, FullResolution) for c in first.couplings] == [True] * 3 + [False] * 3
    assert [isinstance(c.net, FullResolution) for c in last.couplings] == [True] * 4


def test_the_net_of_a_checkerboard_sees_the_image_with_the_moving_colour_blank_and_a_mask():
    seen = []

    class Witness(nn.Module):
        def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
            seen.append(x)
            return x.new_ones(len(x), 4, *x.shape[2:]).cumsum(1)  # log scales 1, 2 and shifts 3, 4 of two colours

    moved = [4 * c + i for c in range(2) for i in (1, 2)]
    net = FullResolution(lambda i, o, c: Witness(), (2, 4, 6), moved, (4, 2, 3), (8, 2, 3), None)
    x = torch.randn(3, 2, 4, 6)
    answer = net(F.pixel_unshuffle(x, 2)[:, [0, 3, 4, 7]], None)
    even = ((torch.arange(4)[:, None] + torch.arange(6)) % 2 == 0).float()
    assert torch.equal(seen[0], torch.cat([x * even, even.expand(3, 1, 4, 6)], dim=1))
    assert torch.equal(answer, torch.tensor([1.0, 1, 2, 2, 3, 3, 4, 4])[:, None, None].expand(3, 8, 2, 3))


def test_at_full_resolution_the_diagonal_pixels_of_all_channels_go_on():
    """Those of the last scale that depend on its weights are all of the first colour, in each of the channels."""
    scale = Scale(zero, (3, 4, 4), 1, 0, None, full_resolution=True)
    x = torch.arange(48.0).view(1, 3, 4, 4)
    kept = scale(x, None)[0][:, :6]
    pixels = torch.cat([x[:, :, 0::2, 0::2], x[:, :, 1::2, 1::2]], dim=1)
    assert torch.equal(kept, pixels)
    assert torch.equal(scale.inverse(scale(x, None)[0], None), x)


@torch.no_grad()
def test_a_batch_norm_uses_the_batch_in_training_and_its_averages_elsewhere():
    norm, x = BatchNorm(3).double(), 2 + 3 * torch.randn(8, 3, 4, 5, dtype=torch.float64)
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    z, log_det = norm(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.var((0, 2, 3), correction=0), variance / (variance + 1e-4), atol=1e-9, rtol=0)
    torch.testing.assert_close(log_det, -20 * 0.5 * torch.log(variance + 1e-4).sum(), atol=1e-9, rtol=0)
    torch.testing.assert_close(norm.mean, 0.1 * mean, atol=1e-9, rtol=0)
    torch.testing.assert_close(norm.variance, 0.9 + 0.1 * variance, atol=1e-9, rtol=0)

    for module in (norm, norm.eval()):  # the way back is the same in training
        back = module.inverse(z)
        expected = z * (0.9 + 0.1 * variance + 1e-4).sqrt()[:, None, None] + 0.1 * mean[:, None, None]
        torch.testing.assert_close(back, expected, atol=1e-9, rtol=0)
    z, log_det = norm(x)
    torch.testing.assert_close(norm.inverse(z), x, atol=1e-9, rtol=0)
    torch.testing.assert_close(log_det, -20 * 0.5 * torch.log(norm.variance + 1e-4).sum(), atol=1e-9, rtol=0)
    before = norm.mean.clone()
    norm(x)
    assert torch.equal(norm.mean, before)


def test_the_running_averages_are_learned_travel_and_score_alike():
    model = RealNVP((2,), network=small, couplings=3, batch_norm=True).double()
    x = 3 + torch.randn(256, 2, dtype=torch.float64)
    for _ in range(80):
        trained = model.loss(x).total
    torch.testing.assert_close(model.eval().loss(x).total, trained, rtol=1e-3, atol=0)
    other = RealNVP((2,), network=small, couplings=3, batch_norm=True).double().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.log_prob(x).value, model.log_prob(x).value)


def test_the_penalty_is_of_bounds_and_magnitudes():
    net = functools.partial(RealNVPNet, width=4, blocks=1)
    model = RealNVP((1, 4, 4), network=net, levels=17, scales=1, couplings=1, scale_penalty=0.5).double().eval()
    x = torch.tanh(torch.randn(3, 1, 4, 4)).double()
    bounds = 2 * 2.0  # two couplings move two elements each, by at most a factor e
    magnitudes = 2 * (
        4 * 9 / 6 + 2 * 4 / 6 + 4 / 6
    )  # one 3x3 convolution, two skips and a head in each net, all of 4 filters
    total, terms, _ = model.loss(x)
    assert float(total) == pytest.approx((float(terms["nll"]) + 0.5 * (bounds + magnitudes)) / 16, rel=1e-6)


def test_a_normalised_convolution_does_not_care_for_the_length_of_its_filters():
    layer, x = NormalizedConv(3, 5, 3, magnitude=True).double(), torch.randn(2, 3, 6, 6).double()
    out = layer(x)
    expected = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 3, padding=1).double())
    expected.parametrizations.weight.original0.data.copy_(layer.magnitude)
    expected.parametrizations.weight.original1.data.copy_(layer.v)
    expected.bias.data.zero_()
    torch.testing.assert_close(out, expected(x), atol=1e-10, rtol=0)
    layer.v.data.mul_(7)
    torch.testing.assert_close(layer(x), out, atol=1e-10, rtol=0)


@pytest.mark.parametrize("condition", [None, ClassLabels(3)])
def test_every_weight_of_the_paper_s_net_works_and_in_evaluation_no_image_sees_another(condition):
    net = RealNVPNet((2, 4, 4), (4, 4, 4), condition, width=6, blocks=2).double()
    x, y = torch.randn(4, 2, 4, 4, dtype=torch.float64), torch.arange(4) % 3 if condition else None
    (net(x, y) * torch.randn(4, 4, 4, 4)).sum().backward()
    assert not [key for key, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert {key for key, p in net.named_parameters() if not p.requires_grad} == {
        f"{norm}.weight" for norm in ("norm_in", "norm_out", *(f"blocks.{i}.{j}" for i in (0, 1) for j in (0, 3)))
    }
    (gradient,) = torch.autograd.grad(net.eval()(x.requires_grad_(), y)[1].square().sum(), x)
    assert (gradient.flatten(1).abs().sum(1) > 0).tolist() == [False, True, False, False]


def test_widths_double_when_rows_halve():
    def width(rows: int) -> int:
        return RealNVPNet((3, rows, rows), (6, rows, rows), width=8, side=32, blocks=1).head.v.shape[1]

    assert (width(32), width(16), width(8)) == (8, 16, 32)


# ---------------------------------------------------------------------------------------------------------------------
# Classes and refusals.


@torch.no_grad()
def test_each_class_has_a_density_of_its_own_that_integrates_to_one():
    torch.manual_seed(3)
    model, n, reach = randomised(RealNVP((2,), ClassLabels(3), network=small)), 400, 14.0
    axis = reach * (2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1)
    points = torch.cartesian_prod(axis, axis)
    densities = [model.log_prob(points, torch.full((n * n,), c)).value.exp() for c in range(3)]
    for p in densities:
        assert float(p.sum() * (2 * reach / n) ** 2) == pytest.approx(1.0, abs=1e-3)
    assert (densities[0] - densities[1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_class_is_undone_by_the_same_class():
    model = randomised(RealNVP((1, 4, 4), ClassLabels(4), network=Conv, levels=17))
    x, y = torch.tanh(torch.randn(8, 1, 4, 4)).double(), torch.arange(8) % 4
    z = model.encode(x, y)
    torch.testing.assert_close(model.decode(z, y), x, atol=1e-10, rtol=0)
    assert ((model.decode(z, (y + 1) % 4) - x).flatten(1).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize(
    ("shape", "message"), [((1, 6, 8), "divisible by 4, not 6x8"), ((1,), "at least two dimensions")]
)
def test_shapes_that_cannot_be_split_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        RealNVP(shape, network=Conv)


# ---------------------------------------------------------------------------------------------------------------------
# Additive couplings.


@torch.no_grad()
def test_additive_couplings_preserve_volume_and_the_final_scaling_alone_changes_it():
    model = randomised(RealNVP((5,), network=small, couplings=4, coupling="additive"))
    x = torch.randn(3, 5, dtype=torch.float64)
    assert all(isinstance(coupling, AdditiveCoupling) for coupling in model.blocks)
    for i in range(3):
        jacobian = torch.func.jacfwd(lambda one: model.encode(one[None])[0])(x[i])
        assert float(torch.linalg.slogdet(jacobian).logabsdet) == pytest.approx(float(model.log_scale.sum()), abs=1e-10)
    torch.testing.assert_close(model.forward_and_log_det(x)[1], model.log_scale.sum().expand(3), atol=0, rtol=1e-12)


def test_the_final_scaling_learns_the_scale_of_the_data():
    model = RealNVP((2,), network=zero, couplings=2, coupling="additive").double()
    x = torch.randn(4000, 2, dtype=torch.float64) * torch.tensor([0.1, 3.0])
    optimizer = torch.optim.Adam([model.log_scale], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        model.loss(x).total.backward()
        optimizer.step()
    torch.testing.assert_close(torch.exp(-model.log_scale), x.square().mean(0).sqrt(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"coupling": "cubic"}, "affine or additive, not 'cubic'"),
        ({"coupling": "additive", "scale_penalty": 0.1}, "no log scales"),
        ({"scale_penalty": -1.0}, "scale_penalty must not be negative"),
    ],
)
def test_impossible_couplings_are_rejected(words, message):
    with pytest.raises(ValueError, match=message):
        RealNVP((2,), network=small, **words)
