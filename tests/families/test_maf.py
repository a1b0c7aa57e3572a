"""Masked autoregressive flows with random weights, float64: inverse, Jacobian by autograd, total mass, and the order."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels, Vector
from genzoo.families.maf import MAF
from genzoo.nn.made import MADE
from genzoo.nn.mlp import MLP

small = functools.partial(MADE, width=16)
CASES = {
    "plane": lambda: MAF((2,), network=small),
    "spline plane": lambda: MAF((2,), network=small, transform="spline", bound=2.0),
    "one number": lambda: MAF((1,), network=small),
    "one number, spline": lambda: MAF((1,), network=small, transform="spline"),
    "random order": lambda: MAF((5,), network=small, order="random"),
    "spline": lambda: MAF((5,), network=small, transform="spline", order="random", bins=5),
    "image": lambda: MAF((1, 4, 4), network=small, levels=17),
    "spline image": lambda: MAF((3, 2, 4), network=small, levels=256, transform="spline", layers=3),
}
every = pytest.mark.parametrize("name", CASES)


def randomised(model: MAF, gain: float = 0.1) -> MAF:
    for parameter in model.parameters():
        parameter.data += gain * torch.randn_like(parameter)
    return model.double().eval()


def case(name: str, n: int) -> tuple[MAF, Tensor]:
    model = randomised(CASES[name]())
    x = torch.randn(n, *model.shape, dtype=torch.float64)
    return model, x if model.levels is None else torch.tanh(x)


def jacobian(function, x: Tensor) -> Tensor:
    return torch.func.jacfwd(lambda one: function(one[None])[0].flatten())(x).reshape(x.numel(), x.numel())


@every
@torch.no_grad()
def test_log_det_is_that_of_the_jacobian(name):
    model, x = case(name, 3)
    log_det = model.forward_and_log_det(x)[1]
    for i in range(3):
        expected = torch.linalg.slogdet(jacobian(model.encode, x[i])).logabsdet
        assert float(log_det[i]) == pytest.approx(float(expected), abs=1e-10)
    # With one dimension an affine flow has no input that its scale could depend on.
    assert name == "one number" or not torch.allclose(log_det[0], log_det[1])


@every
@torch.no_grad()
def test_the_inverse_is_exact_in_both_orders(name):
    model, x = case(name, 16)
    torch.testing.assert_close(model.decode(model.encode(x)), x, atol=1e-10, rtol=0)
    z = torch.randn(16, model.dim, dtype=torch.float64) * (1.0 if model.logit is None else 0.3)
    torch.testing.assert_close(model.encode(model.decode(z)), z, atol=1e-9, rtol=0)


@every
@torch.no_grad()
def test_log_prob_is_the_change_of_variables(name):
    model, x = case(name, 5)
    z, log_det = model.forward_and_log_det(x)
    base = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(model.log_prob(x).value, base + log_det, atol=1e-10, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("transform", ["affine", "spline"])
@pytest.mark.parametrize("condition", [ClassLabels(3), Vector(2)])
def test_the_density_of_the_plane_integrates_to_one_for_each_condition(transform, condition):
    model = randomised(MAF((2,), condition, network=small, layers=3, transform=transform))
    n, reach = 250, 10.0
    axis = reach * (2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1)
    points = torch.cartesian_prod(axis, axis)
    asked = [torch.tensor(0), torch.tensor(2)] if isinstance(condition, ClassLabels) else list(torch.randn(2, 2))
    densities = [model.log_prob(points, y.expand(n * n, *y.shape)).value.exp() for y in asked]
    for p in densities:
        assert float(p.sum() * (2 * reach / n) ** 2) == pytest.approx(1.0, abs=1e-3)
    # The marginal of the first coordinate depends on the condition too.
    first = [p.view(n, n).sum(1) * 2 * reach / n for p in densities]
    assert (first[0] - first[1]).abs().max() > 1e-3


@torch.no_grad()
def test_samples_of_the_plane_have_the_moments_of_the_density():
    model, n, reach = case("spline plane", 1)[0], 250, 10.0
    axis = reach * (2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1)
    points = torch.cartesian_prod(axis, axis)
    p = model.log_prob(points).value.exp() * (2 * reach / n) ** 2
    x = model.sample(10_000).x
    mean = (p[:, None] * points).sum(0)
    variance = (p[:, None] * (points - mean) ** 2).sum(0)
    assert ((x.mean(0) - mean).abs() < 5 * (variance / len(x)).sqrt()).all()
    torch.testing.assert_close(x.var(0), variance, rtol=0.1, atol=0)


@torch.no_grad()
def test_a_layer_is_triangular_in_its_own_order():
    model = randomised(MAF((6,), network=small, layers=3, order="random"))
    for layer in model.layers:
        ordered = jacobian(lambda x, layer=layer: layer(x, None)[0], torch.randn(6).double())[:, layer.order]
        assert not ordered[torch.ones(6, 6).triu(1).bool()].any() and (ordered.diag() > 0).all()
        assert (ordered != 0)[torch.ones(6, 6).tril().bool()].all()


def test_the_order_is_reversed_or_permuted_between_layers():
    reverse, permuted = MAF((9,), layers=3).layers, MAF((9,), layers=3, order="random").layers
    assert [layer.order.tolist() for layer in reverse] == [list(range(9)), *[list(range(8, -1, -1))] * 2]
    assert [sorted(layer.order.tolist()) for layer in permuted] == [list(range(9))] * 3
    assert len({tuple(layer.order.tolist()) for layer in permuted}) == 3


@torch.no_grad()
def test_an_affine_layer_is_eq_3_of_the_paper():
    """x_i = u_i exp(a_i) + m_i, where a and m are functions of the preceding x, computed one by one."""
    model = randomised(MAF((4,), network=small, layers=1))
    u = torch.randn(1, 4).double()
    x = model.decode(u)
    a, m = model.layers[0].net(x).view(2, 4)
    a = a / (1 + a.abs() / math.log(1000))
    torch.testing.assert_close(x[0], u[0] * a.exp() + m, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_fresh_flow_is_the_standard_normal_distribution():
    x = torch.randn(9, 4, dtype=torch.float64)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
    for transform in ("affine", "spline"):
        model = MAF((4,), transform=transform).double()
        torch.testing.assert_close(model.log_prob(x).value, expected, atol=1e-11, rtol=0)


@torch.no_grad()
def test_a_sample_takes_as_many_passes_as_dimensions():
    calls = []
    model = MAF((5,), network=small, layers=2)
    for layer in model.layers:
        layer.net.register_forward_hook(lambda *_: calls.append(1))
    assert model.sample(3).nfe == 5 and len(calls) == 2 * 5
    calls.clear()
    model.log_prob(torch.randn(3, 5))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, not 0"),
        ({"transform": "cubic"}, "affine or spline, not 'cubic'"),
        ({"order": "sorted"}, "reverse or random, not 'sorted'"),
        ({"transform": "spline", "bins": 0}, "bins"),
        ({"network": MLP}, r"masked network \(MADE\), not MLP"),
    ],
)
def test_impossible_options_are_rejected(words, message):
    with pytest.raises(ValueError, match=message):
        MAF((3,), **words)
