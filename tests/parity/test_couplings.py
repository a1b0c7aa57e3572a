"""Couplings, activation norms and 1x1 convolutions against nflows and zuko, with the same weights: values, log-determinants
and inverses, float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from genzoo.distributions.transforms import BatchNorm, Logit
from genzoo.families.glow import FlowStep, InvertibleConv
from genzoo.families.realnvp import AffineCoupling
from genzoo.nn.coupling import ActNorm, data_dependent_init
from genzoo.nn.mlp import MLP

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(name="nflows")
def nflows_transforms():
    pytest.importorskip("nflows")
    from nflows import transforms

    return transforms


def small(in_shape, out_shape, condition) -> nn.Module:
    return MLP(in_shape, out_shape, condition, width=16, depth=1)


class Renamed(nn.Module):
    """A net of ours as nflows calls it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.function(x)


def same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], **CLOSE)
    torch.testing.assert_close(ours[1].expand(len(ours[0])), theirs[1], **CLOSE)


@torch.no_grad()
def test_realnvp_s_coupling_is_that_of_nflows(nflows):
    coupling = AffineCoupling(small, (5,), [0, 3], None).double()
    coupling.bound.uniform_(0.3, 0.8)

    def parameters(a: Tensor) -> Tensor:  # nflows: what is moved by sigmoid(r + 2) + 1e-3, first shifts, then r
        log_scale, shift = coupling.net(a, None).chunk(2, dim=1)
        scale = torch.exp(coupling.bound * torch.tanh(log_scale)) / 4  # below 1, which theirs cannot leave
        return torch.cat([shift / 4, torch.logit(scale - 1e-3) - 2], dim=1)

    theirs = nflows.AffineCouplingTransform(
        mask=torch.tensor([1, 0, 0, 1, 0]), transform_net_create_fn=lambda i, o: Renamed(parameters)
    ).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    z, log_det = coupling(x, None)
    quarter = torch.tensor([0.25, 1, 1, 0.25, 1]).double()
    same((z * quarter, log_det - 2 * math.log(4)), theirs(x))
    torch.testing.assert_close(coupling.inverse(z, None), theirs.inverse(z * quarter)[0], **CLOSE)


@torch.no_grad()
def test_realnvp_s_coupling_is_that_of_zuko():
    zuko = pytest.importorskip("zuko")
    coupling = AffineCoupling(small, (5,), [0, 3], None).double()

    def meta(a: Tensor):
        log_scale, shift = coupling.net(a, None).chunk(2, dim=1)
        scale = torch.exp(coupling.bound * torch.tanh(log_scale))
        affine = torch.distributions.AffineTransform(shift, scale)
        return torch.distributions.IndependentTransform(affine, 1)

    mask = torch.tensor([False, True, True, False, True])
    theirs = zuko.transforms.CouplingTransform(meta, mask)
    x = torch.randn(7, 5, dtype=torch.float64)
    z, log_det = coupling(x, None)
    same((z, log_det), theirs.call_and_ladj(x))
    torch.testing.assert_close(coupling.inverse(z, None), theirs.inv(z), **CLOSE)


@torch.no_grad()
def test_glow_s_1x1_convolution_is_that_of_nflows(nflows):
    layer = InvertibleConv(6).double()
    layer.factors += 0.2 * torch.randn(6, 6)
    theirs = nflows.OneByOneConvolution(6, identity_init=False).double()
    L, U = layer._triangles()
    theirs.permutation = nflows.Permutation(torch.arange(6))  # it permutes before, ours after
    theirs.lower_entries.copy_(L[theirs.lower_indices[0], theirs.lower_indices[1]])
    sign = layer.sign
    positive = U * sign  # their diagonal is positive: L U x = L (U D) (D x) with D the signs
    theirs.upper_entries.copy_(positive[theirs.upper_indices[0], theirs.upper_indices[1]])
    theirs.unconstrained_upper_diag.copy_(torch.log(torch.expm1(positive.diag() - theirs.eps)))
    theirs.bias.zero_()
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    z, log_det = theirs(x * sign[:, None, None])
    z = z[:, layer.permutation]
    ours = torch.conv2d(x, layer.matrix()[:, :, None, None])
    same((ours, 20 * layer.log_det), (z, log_det))
    back = torch.conv2d(ours, layer.inverse_matrix()[:, :, None, None])
    torch.testing.assert_close(back, x, **CLOSE)


@torch.no_grad()
def test_glow_s_activation_norm_starts_as_that_of_nflows(nflows):
    ours, theirs = ActNorm(4).double(), nflows.ActNorm(4).double()
    x = 5 + 3 * torch.randn(64, 4, 6, 6, dtype=torch.float64)
    z, log_det = theirs(x)  # theirs divides by n - 1
    with data_dependent_init(ours):
        first = ours(x)
    torch.testing.assert_close(first, z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((36 * ours.log_scale.sum()).expand(64), log_det, rtol=1e-3, atol=1e-3)

    ours.scale.copy_(theirs.log_scale.view(4, 1, 1) / 3)
    ours.bias.copy_((theirs.shift / theirs.log_scale.exp()).view(4, 1, 1))
    other = torch.randn(8, 4, 6, 6, dtype=torch.float64)
    same((ours(other), 36 * ours.log_scale.sum()), theirs.eval()(other))
    torch.testing.assert_close(ours.inverse(other), theirs.inverse(other)[0], **CLOSE)


@torch.no_grad()
def test_glow_s_coupling_is_that_of_nflows(nflows):
    step = FlowStep(small, (4, 1, 1), affine=True, condition=None).double().eval()

    def parameters(a: Tensor) -> Tensor:  # theirs is b s + m and ours (b + m) s, and theirs adds 1e-3 to the sigmoid
        shift, raw = step.net(a.view(-1, 2, 1, 1), None).flatten(1).chunk(2, dim=1)
        scale = torch.sigmoid(raw + 2)
        return torch.cat([shift * scale, torch.logit(scale - 1e-3) - 2], dim=1)

    theirs = nflows.AffineCouplingTransform(
        mask=torch.tensor([0, 0, 1, 1]), transform_net_create_fn=lambda i, o: Renamed(parameters)
    ).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    z, log_det = step(x.view(7, 4, 1, 1), None)
    mixed = x @ step.mix.matrix().T
    coupled, ladj = theirs(mixed)
    same((z.flatten(1), log_det), (coupled, ladj + torch.linalg.slogdet(step.mix.matrix()).logabsdet))
    torch.testing.assert_close(theirs.inverse(z.flatten(1))[0], mixed, rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_batch_norm_is_that_of_nflows(nflows):
    ours, theirs = BatchNorm(3).double(), nflows.BatchNorm(3, eps=1e-4).double()
    theirs.unconstrained_weight.fill_(math.log(math.expm1(1 - 1e-4)))  # they add eps to a softplus: a weight of one
    x = 2 + 3 * torch.randn(32, 3, dtype=torch.float64)
    (z, log_det), (expected, ladj) = ours(x), theirs(x)
    bessel = 32 / 31  # they divide by n - 1
    torch.testing.assert_close(z, expected * math.sqrt(bessel), rtol=1e-5, atol=0)
    torch.testing.assert_close(log_det.expand(32), ladj + 1.5 * math.log(bessel), rtol=1e-5, atol=0)

    ours.eval(), theirs.eval()
    theirs.running_mean.copy_(ours.mean)
    theirs.running_var.copy_(ours.variance)
    same(ours(x), theirs(x))
    torch.testing.assert_close(ours.inverse(x), theirs.inverse(x)[0], **CLOSE)


@torch.no_grad()
def test_the_logit_is_that_of_nflows(nflows):
    x = torch.rand(6, 5, dtype=torch.float64) * 2 - 1
    p = 0.05 + 0.9 * (x + 1) / 2
    z, log_det = nflows.Logit(eps=1e-12)(p)
    same(Logit()(x), (z, log_det + 5 * math.log(0.45)))
