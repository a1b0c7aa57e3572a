"""The quantisers against lucidrains' vector-quantize-pytorch: codes, codebook, counts and gradients."""

from __future__ import annotations

import pytest
import torch

from genzoo.nn.quantize import FiniteScalarQuantizer, ResidualQuantizer, VectorQuantizer, straight_through
from genzoo.numerics.random import generator

reference = pytest.importorskip("vector_quantize_pytorch")


def test_the_codebook_is_the_reference_s_over_many_batches():
    K, D, beta = 32, 8, 0.25
    torch.manual_seed(0)
    theirs = reference.VectorQuantize(
        D, K, decay=0.99, eps=1e-5, commitment_weight=beta, rotation_trick=False, kmeans_init=False,
        threshold_ema_dead_code=0, use_cosine_sim=False, accept_image_fmap=True,
    ).train()  # fmt: skip
    ours = VectorQuantizer(K, D, decay=0.99, eps=1e-5, revival=0)
    codebook = theirs._codebook
    codebook.embed.data.copy_(torch.randn(1, K, D))
    codebook.embed_avg.data.copy_(codebook.embed.data)
    ours.codes.copy_(codebook.embed[0])
    ours.sums.copy_(codebook.embed_avg[0])

    for step in range(30):
        z = torch.randn(4, D, 5, 5, generator=generator("parity", step)) + 0.1 * step
        mine, other = z.clone().requires_grad_(), z.clone().requires_grad_()
        expected, indices, loss = theirs(other)
        k = ours.nearest(mine)
        e = ours.lookup(k)
        out = straight_through(mine, e)
        assert torch.equal(k, indices)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        commitment = beta * (mine - e).square().mean()
        torch.testing.assert_close(commitment, loss.squeeze(), rtol=1e-5, atol=1e-6)
        (out.sin().sum() + commitment).backward()
        (expected.sin().sum() + loss.sum()).backward()
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-6)
        ours.update(z, k)
        torch.testing.assert_close(ours.counts, codebook.cluster_size[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.codes, codebook.embed[0], rtol=0, atol=1e-6)


def test_residual_codebooks_are_the_reference_s_over_many_batches():
    K, D, L, beta = 16, 6, 3, 0.25
    torch.manual_seed(0)
    theirs = reference.ResidualVQ(
        dim=D, codebook_size=K, num_quantizers=L, decay=0.99, eps=1e-5, commitment_weight=beta, rotation_trick=False,
        kmeans_init=False, threshold_ema_dead_code=0, use_cosine_sim=False,
    ).train()  # fmt: skip
    ours = ResidualQuantizer(K, D, L, decay=0.99, eps=1e-5, revival=0)
    for layer, mine in zip(theirs.layers, ours.codebooks, strict=True):
        layer._codebook.embed.data.copy_(torch.randn(1, K, D))
        layer._codebook.embed_avg.data.copy_(layer._codebook.embed.data)
        mine.codes.copy_(layer._codebook.embed[0])
        mine.sums.copy_(layer._codebook.embed_avg[0])
    for step in range(20):
        z = torch.randn(4, D, 5, 5, generator=generator("residual parity", step))
        mine, other = z.clone().requires_grad_(), z.clone().requires_grad_()
        expected, indices, losses = theirs(other.flatten(2).transpose(1, 2))
        expected = expected.transpose(1, 2).unflatten(2, (5, 5))
        e, k, commitment, _ = ours(mine)
        assert torch.equal(torch.stack(ours.split(k), -1).flatten(1, 2), indices)
        torch.testing.assert_close(e, expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(beta * commitment, losses.sum(), rtol=1e-5, atol=1e-6)
        (slope,) = torch.autograd.grad(e.sin().sum(), mine, retain_graph=True)
        (theirs_slope,) = torch.autograd.grad(expected.sin().sum(), other, retain_graph=True)
        # The reference passes the gradient straight through every codebook, L times; here it passes once (Lee et al. 2022).
        torch.testing.assert_close(L * slope, theirs_slope, rtol=0, atol=1e-5)
        (slope,) = torch.autograd.grad(beta * commitment, mine)
        (theirs_slope,) = torch.autograd.grad(losses.sum(), other)
        torch.testing.assert_close(slope, theirs_slope, rtol=0, atol=1e-6)
        ours.update(z, k)
        for layer, codebook in zip(theirs.layers, ours.codebooks, strict=True):
            torch.testing.assert_close(codebook.codes, layer._codebook.embed[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [8, 8, 8], [7, 5], [3]], ids=str)
def test_the_grid_of_codes_is_the_reference_s(levels):
    theirs, ours = reference.FSQ(levels), FiniteScalarQuantizer(levels)
    z = 2 * torch.randn(16, len(levels), 6, 6, generator=generator("parity", len(levels)))
    mine, other = z.clone().requires_grad_(), z.clone().requires_grad_()
    expected, indices = theirs(other)
    k = ours.nearest(mine)
    assert torch.equal(k, indices.long())
    out = straight_through(ours.bound(mine), ours.lookup(k))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    out.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-6)
    everything = torch.arange(ours.codebook_size)
    torch.testing.assert_close(ours.lookup(everything[:, None, None])[:, :, 0, 0], theirs.indices_to_codes(everything))
