"""Elementwise functions with random parameters, float64: inverse, derivative by automatic differentiation, tails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genzoo.distributions.elementwise import Affine, Elementwise, RationalQuadraticSpline

FUNCTIONS = {
    "affine": Affine(),
    "spline": RationalQuadraticSpline(8, 3.0),
    "one bin": RationalQuadraticSpline(1, 2.0),
    "many bins": RationalQuadraticSpline(100, 5.0),
}
every = pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
SHAPE = (64, 3, 2)


def inputs(f: Elementwise, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    B, C, *sides = SHAPE
    params = scale * torch.randn(B, f.num_params * C, *sides, dtype=torch.float64)
    return 2 * torch.randn(SHAPE, dtype=torch.float64), params


@every
def test_the_log_derivative_is_that_of_the_function(f):
    x, params = inputs(f)
    x.requires_grad_()
    z, ladj = f.forward(x, params)
    (slope,) = torch.autograd.grad(z.sum(), x)
    assert z.shape == ladj.shape == x.shape and (slope > 0).all()
    torch.testing.assert_close(ladj, slope.log(), rtol=0, atol=1e-9)


@every
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_the_inverse_is_exact(f, scale):
    """Up to rounding, which a flat place of the function magnifies by the inverse of its slope."""
    x, params = inputs(f, scale)
    z, ladj = f.forward(x, params)
    error = (f.inverse(z, params) - x).abs()
    assert float((error * ladj.exp().clamp(max=1)).max()) < 1e-11
    if scale < 1:
        assert float(error.max()) < 1e-10


@every
def test_parameters_of_zero_give_the_identity(f):
    x, params = inputs(f, 0.0)
    z, ladj = f.forward(x, params)
    torch.testing.assert_close(z, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(ladj, torch.zeros_like(x), rtol=0, atol=1e-12)


@every
def test_an_element_depends_on_its_own_parameters(f):
    """Parameters are ordered (num_params, C), as the channels of a network's output."""
    x, params = inputs(f)
    alone = params.unflatten(1, (f.num_params, 3))[:, :, 1:2].flatten(1, 2)
    for a, b in zip(f.forward(x, params), f.forward(x[:, 1:2], alone), strict=True):
        torch.testing.assert_close(a[:, 1:2], b)


@every
def test_gradients_are_finite_everywhere(f):
    x, params = inputs(f, 3.0)
    x[0, 0], x[1, 0] = 1e6, getattr(f, "bound", 1.0)
    x.requires_grad_(), params.requires_grad_()
    z, ladj = f.forward(x, params)
    for gradient in torch.autograd.grad((z + ladj).sum() + f.inverse(x, params).sum(), [x, params]):
        assert gradient.isfinite().all()


def test_a_spline_and_its_derivative_are_continuous_at_the_tails_and_at_the_knots():
    f = RationalQuadraticSpline(6, 3.0)
    params = torch.randn(1, f.num_params, dtype=torch.float64)
    knots = f._knots(params[:, :6])[0]
    assert (knots.diff() > 0).all() and (knots[0], knots[-1]) == (-3.0, 3.0)
    values = []
    for side in (-1e-9, 1e-9):
        z, ladj = f.forward((knots + side)[:, None], params.expand(7, -1))
        values.append((z, ladj))
    torch.testing.assert_close(values[0][0], values[1][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(values[0][1], values[1][1], rtol=0, atol=1e-5)
    for z, ladj in values:
        torch.testing.assert_close(z[[0, -1], 0], knots[[0, -1]], rtol=0, atol=1e-8)
        torch.testing.assert_close(ladj[[0, -1], 0], torch.zeros(2).double(), rtol=0, atol=1e-6)
    outside = torch.tensor([[-3.0], [3.0], [-7.5], [1e4]]).double()
    z, ladj = f.forward(outside, params.expand(4, -1))
    assert torch.equal(z, outside) and not ladj.any()
    assert torch.equal(f.inverse(outside, params.expand(4, -1)), outside)


def test_single_precision_loses_little():
    f = RationalQuadraticSpline(8, 5.0)
    x, params = inputs(f)
    z, ladj = f.forward(x, params)
    single = f.forward(x.float(), params.float())
    torch.testing.assert_close(single[0].double(), z, rtol=0, atol=1e-4)
    torch.testing.assert_close(single[1].double(), ladj, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("words", "message"),
    [({"bins": 0}, "bins"), ({"bins": 1000}, "bins must be from 1 to 999"), ({"bound": 0.0}, "bound"),
     ({"bound": float("inf")}, "bound")],
)  # fmt: skip
def test_impossible_splines_are_rejected(words, message):
    with pytest.raises(ValueError, match=message):
        RationalQuadraticSpline(**words)
