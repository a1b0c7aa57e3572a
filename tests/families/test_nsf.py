"""Neural spline flows with random weights, float64: inverse, Jacobian by autograd, total mass, and the tails."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels
from genzoo.distributions.elementwise import RationalQuadraticSpline
from genzoo.families.nsf import NSF, SplineCoupling
from genzoo.nn.mlp import MLP
from genzoo.nn.resnet import ConvNet

conv = functools.partial(ConvNet, width=8, blocks=1)
small = functools.partial(MLP, width=16, depth=1, zero_init=True)
CASES = {
    "plane": lambda: NSF((2,), network=small, couplings=4, bound=2.0),
    "odd vector": lambda: NSF((5,), network=small, bins=4),
    "one channel": lambda: NSF((1, 8, 8), network=conv, levels=17, couplings=2),
    "three channels": lambda: NSF((3, 4, 8), network=conv, levels=256, couplings=2),
}
every = pytest.mark.parametrize("name", CASES)


def randomised(model: NSF, gain: float = 0.1) -> NSF:
    for parameter in model.parameters():
        parameter.data += gain * torch.randn_like(parameter)
    return model.double().eval()


def case(name: str, n: int) -> tuple[NSF, Tensor]:
    model = randomised(CASES[name]())
    x = torch.randn(n, *model.shape, dtype=torch.float64)
    return model, x if model.levels is None else torch.tanh(x)


@every
@torch.no_grad()
def test_log_det_is_that_of_the_jacobian(name):
    model, x = case(name, 2)
    log_det = model.forward_and_log_det(x)[1]
    for i in range(2):
        jacobian = torch.func.jacfwd(lambda one: model.encode(one[None])[0])(x[i]).view(model.dim, model.dim)
        assert float(log_det[i]) == pytest.approx(float(torch.linalg.slogdet(jacobian).logabsdet), abs=1e-10)
    assert not torch.allclose(log_det[0], log_det[1])


@every
@torch.no_grad()
def test_the_inverse_is_exact_in_both_orders(name):
    model, x = case(name, 16)
    torch.testing.assert_close(model.decode(model.encode(x)), x, atol=1e-10, rtol=0)
    z = torch.randn(16, model.dim, dtype=torch.float64)
    torch.testing.assert_close(model.encode(model.decode(z)), z, atol=1e-8, rtol=0)


@torch.no_grad()
def test_the_density_of_the_plane_integrates_to_one_for_each_class():
    model, n, reach = randomised(NSF((2,), ClassLabels(2), network=small, couplings=3)), 250, 10.0
    axis = reach * (2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1)
    points = torch.cartesian_prod(axis, axis)
    densities = [model.log_prob(points, torch.full((n * n,), c)).value.exp() for c in range(2)]
    for p in densities:
        assert float(p.sum() * (2 * reach / n) ** 2) == pytest.approx(1.0, abs=1e-3)
    assert (densities[0] - densities[1]).abs().max() > 1e-3


@torch.no_grad()
def test_beyond_its_bound_the_flow_is_the_identity():
    model = case("plane", 1)[0]
    x = torch.tensor([[2.5, -3.0], [-7.0, 100.0]]).double()
    z, log_det = model.forward_and_log_det(x)
    assert torch.equal(z, x) and not log_det.any()


@torch.no_grad()
def test_a_coupling_transforms_each_moved_element_by_the_spline_of_the_others():
    spline = RationalQuadraticSpline(5, 3.0)
    coupling = SplineCoupling(small, (5,), [0, 3], None, spline=spline).double()
    for parameter in coupling.parameters():
        parameter.normal_(std=0.3)
    x = torch.randn(6, 5).double()
    z, log_det = coupling(x, None)
    params = coupling.net(x[:, [1, 2, 4]]).view(6, spline.num_params, 2)
    expected, ladj = spline.forward(x[:, [0, 3]], params.flatten(1))
    torch.testing.assert_close(z[:, [0, 3]], expected)
    torch.testing.assert_close(log_det, ladj.sum(1))
    assert torch.equal(z[:, [1, 2, 4]], x[:, [1, 2, 4]])


@torch.no_grad()
def test_a_fresh_flow_of_vectors_is_the_standard_normal_distribution():
    x = torch.randn(9, 4, dtype=torch.float64)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
    torch.testing.assert_close(NSF((4,), network=small).double().log_prob(x).value, expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    ("shape", "words", "message"),
    [
        ((1, 6, 8), {}, "divisible by 4, not 6x8"),
        ((1,), {}, "at least two dimensions"),
        ((2,), {"bins": 0}, "bins must be from 1"),
        ((2,), {"bound": -1.0}, "bound must be positive"),
        ((2,), {"couplings": 0}, "at least 1"),
    ],
)
def test_impossible_options_are_rejected(shape, words, message):
    with pytest.raises(ValueError, match=message):
        NSF(shape, network=small, **words)
