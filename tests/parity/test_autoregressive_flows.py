"""Splines and autoregressive layers against nflows and zuko, with the same parameters: values, log-determinants and inverses,
float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from genzoo.distributions.elementwise import RationalQuadraticSpline
from genzoo.families.maf import MAF, AutoregressiveLayer
from genzoo.nn.made import MADE

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def spline(bins: int = 8, bound: float = 3.0) -> tuple[RationalQuadraticSpline, Tensor, Tensor]:
    f = RationalQuadraticSpline(bins, bound)
    return f, 2.5 * torch.randn(500, 1, dtype=torch.float64), torch.randn(500, f.num_params, dtype=torch.float64)


@pytest.mark.parametrize("bins", [2, 8])
def test_the_spline_is_that_of_nflows(bins):
    pytest.importorskip("nflows")
    from nflows.transforms.splines import unconstrained_rational_quadratic_spline as theirs

    f, x, params = spline(bins)
    widths, heights, raw = (p[:, None] for p in params.split([bins, bins, bins - 1], dim=1))
    raw = raw + math.log(math.expm1(1 - 1e-3))  # ours is shifted, to be the identity at zero
    z, ladj = f.forward(x, params)
    expected = theirs(x, widths, heights, raw, tail_bound=3.0)
    torch.testing.assert_close(z, expected[0], **CLOSE)
    torch.testing.assert_close(ladj, expected[1], **CLOSE)
    back = theirs(z, widths, heights, raw, inverse=True, tail_bound=3.0)[0]
    torch.testing.assert_close(f.inverse(z, params), back, rtol=0, atol=1e-7)


def zuko_spline(zuko, f: RationalQuadraticSpline, params: Tensor):
    """Return zuko's spline through the same knots, whose parameters it normalises in another way; (..., num_params)."""
    widths, heights, raw = params.split([f.bins, f.bins, f.bins - 1], dim=-1)
    theirs = zuko.transforms.MonotonicRQSTransform(widths, heights, raw, bound=f.bound)
    theirs.horizontal, theirs.vertical = f._knots(widths), f._knots(heights)
    slopes = 1e-3 + torch.nn.functional.softplus(raw + math.log(math.expm1(1 - 1e-3)))
    theirs.derivatives = torch.nn.functional.pad(slopes, (1, 1), value=1.0)
    return theirs


def test_the_spline_is_that_of_zuko():
    zuko = pytest.importorskip("zuko")
    f, x, params = spline()
    theirs = zuko_spline(zuko, f, params[:, None])
    z, ladj = f.forward(x, params)
    expected = theirs.call_and_ladj(x)
    torch.testing.assert_close(z, expected[0], **CLOSE)
    torch.testing.assert_close(ladj, expected[1], **CLOSE)
    torch.testing.assert_close(f.inverse(z, params), theirs.inv(z), rtol=0, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("transform", ["affine", "spline"])
def test_an_autoregressive_layer_is_that_of_zuko(transform):
    zuko = pytest.importorskip("zuko")
    network = functools.partial(MADE, width=16, zero_init=False)
    layer: AutoregressiveLayer = MAF((5,), network=network, layers=1, transform=transform).double().layers[0]

    def meta(x: Tensor):
        params = layer.net(x).view(len(x), -1, 5).mT
        if transform == "spline":
            inner = zuko_spline(zuko, layer.transform, params)
        else:
            raw, mean = params.unbind(-1)
            log_scale = raw / (1 + raw.abs() / math.log(1000))
            inner = torch.distributions.AffineTransform(-mean * torch.exp(-log_scale), torch.exp(-log_scale))
        return torch.distributions.IndependentTransform(inner, 1)

    theirs = zuko.transforms.AutoregressiveTransform(meta, passes=5)
    x = torch.randn(7, 5, dtype=torch.float64)
    z, log_det = layer(x, None)
    expected = theirs.call_and_ladj(x)
    torch.testing.assert_close(z, expected[0], **CLOSE)
    torch.testing.assert_close(log_det, expected[1], **CLOSE)
    torch.testing.assert_close(layer.inverse(z, None), theirs.inv(z), rtol=0, atol=1e-8)
