"""The codebook of moving averages: against its recursion by hand, the optimal quantiser of a normal law, and its gradients.
The residual quantiser: balanced ternary numbers. The finite scalar quantiser: all of its codes.

References:
    Max, "Quantizing for minimum distortion", 1960, https://doi.org/10.1109/TIT.1960.1057548 (table I: the least distortions).
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from genzoo.nn.quantize import (
    FiniteScalarQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
    perplexity,
    straight_through,
)
from genzoo.numerics.random import generator, randn


def grid(n: int, dim: int, name: str = "vectors", side: int = 3) -> Tensor:
    return torch.randn(n, dim, side, side, generator=generator(name), dtype=torch.float64)


def test_the_nearest_code_is_the_nearest_and_is_looked_up_in_its_place():
    quantizer, z = VectorQuantizer(7, 5).double(), grid(4, 5)
    k = quantizer.nearest(z)
    assert k.shape == (4, 3, 3) and k.dtype == torch.int64
    for b in range(4):
        for i in range(3):
            for j in range(3):
                here = z[b, :, i, j]
                assert int(k[b, i, j]) == int((quantizer.codes - here).square().sum(1).argmin())
                assert torch.equal(quantizer.lookup(k)[b, :, i, j], quantizer.codes[k[b, i, j]])


@pytest.mark.parametrize("codes", [2, 64, 100, 512])
def test_of_equally_near_codes_the_first_is_chosen(codes):
    z = torch.arange(300.0).view(-1, 1, 1, 1) % 7
    quantizer = VectorQuantizer(codes, 1)
    quantizer.codes.copy_(torch.arange(codes)[:, None] % 5)
    assert torch.equal(quantizer.nearest(z).flatten(), (z.flatten()[:, None] - quantizer.codes.T).square().argmin(1))


def test_the_nearest_code_is_found_in_float32_under_autocast():
    """Two codes that bfloat16 cannot tell apart."""
    quantizer = VectorQuantizer(2, 1)
    quantizer.codes.copy_(torch.tensor([[1.0], [1.001]]))
    z = torch.tensor([1.0004, 1.0006]).view(2, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer.nearest(z).flatten().tolist() == [0, 1]


def test_codes_are_the_recursion_by_hand():
    K, D, decay, eps = 6, 3, 0.9, 1e-5
    quantizer = VectorQuantizer(K, D, decay, eps, revival=0).double()
    counts, sums = [1.0] * K, [code.clone() for code in quantizer.codes]
    for step in range(5):
        z = grid(8, D, f"batch {step}")
        k = quantizer.nearest(z)
        vectors, owners = z.movedim(1, -1).reshape(-1, D), k.flatten().tolist()
        quantizer.update(z, k)
        for j in range(K):
            mine = [v for v, owner in zip(vectors, owners, strict=True) if owner == j]
            counts[j] = decay * counts[j] + (1 - decay) * len(mine)
            sums[j] = decay * sums[j] + (1 - decay) * sum(mine, torch.zeros(D).double())
        total = sum(counts)
        for j in range(K):
            smoothed = (counts[j] + eps) / (total + K * eps) * total
            torch.testing.assert_close(quantizer.codes[j], sums[j] / smoothed, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(quantizer.probs, torch.tensor(counts).double() / sum(counts))


@pytest.mark.parametrize("K, least", [(2, 0.36338), (4, 0.11748), (8, 0.03455), (16, 0.00950)])
def test_the_codes_of_a_normal_law_reach_the_least_distortion(K, least):
    quantizer, rng = VectorQuantizer(K, 1), generator("codes", K)
    for decay, steps in ((0.8, 800), (0.99, 400)):  # first quickly, then precisely
        quantizer.decay = decay
        for _ in range(steps):
            z = randn((4096, 1, 1, 1), rng=rng)
            quantizer.update(z, quantizer.nearest(z), rng)
    # The distortion of a codebook exactly, by quadrature over its cells.
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    z = x.view(-1, 1, 1, 1)
    quantizer.double()
    error = (z - quantizer.lookup(quantizer.nearest(z))).flatten().square()
    distortion = float(torch.trapezoid(error * torch.exp(-0.5 * x**2) / (2 * torch.pi) ** 0.5, x))
    assert least - 1e-5 <= distortion <= 1.01 * least


def test_the_first_batch_places_the_codes_among_its_vectors():
    quantizer, z = VectorQuantizer(8, 4).double(), grid(10, 4) + 100
    quantizer.update(z, quantizer.nearest(z), generator("spare"))
    vectors = z.movedim(1, -1).reshape(-1, 4)
    distance = (quantizer.codes[:, None] - vectors).norm(dim=-1).amin(1)
    assert float(distance.max()) < 1e-2, "but for the smoothing, codes are vectors of the batch"
    assert len(quantizer.nearest(z).unique()) == len(quantizer.codes.unique(dim=0)) > 4


def settled(**settings) -> tuple[VectorQuantizer, Tensor]:
    """A codebook in equilibrium with vectors at four corners, but for one code that lies far from all of them."""
    corners = 10 * torch.eye(4, dtype=torch.float64)
    quantizer = VectorQuantizer(4, 4, **settings).double()
    quantizer.codes.copy_(corners)
    quantizer.codes[2] = -1000.0
    quantizer.sums.copy_(16 * quantizer.codes)
    quantizer.counts.fill_(16)
    quantizer.counts[2] = 1e-3
    quantizer.sums[2] = -1.0
    quantizer.placed.fill_(True)
    return quantizer, corners.repeat(16, 1).view(-1, 4, 1, 1)


def test_a_dead_code_is_revived_and_live_ones_are_left_alone():
    once, never = settled(revival=0.1)[0], settled(revival=0.0)[0]
    z = settled()[1]
    dead = [quantizer.update(z, quantizer.nearest(z), generator("revival")) for quantizer in (once, never)]
    assert [int(count) for count in dead] == [1, 0]
    live = [0, 1, 3]
    torch.testing.assert_close(once.codes[live], never.codes[live], rtol=1e-5, atol=1e-5)
    assert float((never.codes[2] + 1000).abs().max()) < 20
    assert float((z.flatten(1) - once.codes[2]).norm(dim=1).min()) < 1e-3, "it is a vector of the batch"
    assert float(once.probs[2]) > 0.2, "and has time to find a use"


def test_revival_goes_on_until_every_code_is_used():
    for revival, used in ((0.1, 4), (0.0, 3)):
        quantizer, z = settled(decay=0.9, revival=revival)
        for step in range(1500):
            quantizer.update(z, quantizer.nearest(z), generator("revival", step))
        assert len(quantizer.nearest(z).unique()) == used


def test_what_revives_a_code_is_chosen_by_the_generator():
    def revived(seed: int) -> Tensor:
        torch.manual_seed(0)
        quantizer, z = VectorQuantizer(5, 4).double(), grid(20, 4)
        quantizer.update(z, quantizer.nearest(z), generator(seed))
        return quantizer.codes

    assert torch.equal(revived(1), revived(1)) and not torch.equal(revived(1), revived(2))


def test_the_gradient_passes_straight_through_and_none_reaches_the_codes():
    quantizer, z = VectorQuantizer(6, 4).double(), grid(5, 4).requires_grad_()
    e = quantizer.lookup(quantizer.nearest(z))
    out = straight_through(z, e)
    torch.testing.assert_close(out, e, rtol=0, atol=1e-15)
    weight = grid(5, 4, "weights")
    (out.square() * weight).sum().backward()
    torch.testing.assert_close(z.grad, 2 * e * weight, rtol=1e-12, atol=1e-12)
    assert not list(quantizer.parameters()) and not any(b.requires_grad for b in quantizer.buffers())


def test_perplexity_counts_codes_in_equal_use():
    k = torch.arange(4).repeat(8).view(2, 4, 4)
    exponential, usage = perplexity(k, 16)
    assert float(exponential) == pytest.approx(4) and float(usage) == 0.25
    assert float(perplexity(torch.zeros(3, 2, 2, dtype=torch.int64), 16)[0]) == 1


def test_a_copy_of_the_state_goes_on_alike():
    quantizer, z = VectorQuantizer(6, 4).double(), grid(9, 4)
    quantizer.update(z, quantizer.nearest(z), generator(0))
    other = VectorQuantizer(6, 4).double()
    other.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    for codebook in (quantizer, other):
        codebook.update(z, codebook.nearest(z), generator(1))
    assert torch.equal(quantizer.codes, other.codes) and torch.equal(quantizer.counts, other.counts)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"codebook_size": 1}, "at least 2 codes of at least 1 dimension, not 1 of 4"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), not 1.0"),
        ({"revival": -0.1}, r"revival must be in \[0, 1\), not -0.1"),
        ({"eps": 0.0}, "eps must be positive, not 0.0"),
    ],
)
def test_impossible_codebooks_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(**{"codebook_size": 4, "embedding_dim": 4, **settings})


# Residual quantisation


def balanced_ternary(depth: int) -> ResidualQuantizer:
    """Codebooks {-1, 0, 1} 3^-l, whose sums are all multiples of 3^-(depth - 1) from -(3^depth - 1)/2 of them on."""
    quantizer = ResidualQuantizer(3, 1, depth).double()
    for place, codebook in enumerate(quantizer.codebooks):
        codebook.codes.copy_(torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64) * 3.0**-place)
    return quantizer


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_residual_codes_and_their_numbers_are_a_bijection(depth):
    """A positional number system: every number has one expansion, which is found digit by digit."""
    quantizer, count = balanced_ternary(depth), 3**depth
    digits = torch.arange(count)[:, None] // 3 ** torch.arange(depth - 1, -1, -1) % 3
    k = digits.view(count, 1, depth)
    e = quantizer.lookup(k)
    expected = (torch.arange(count, dtype=torch.float64) - count // 2) / 3 ** (depth - 1)
    torch.testing.assert_close(e.flatten(), expected, rtol=0, atol=1e-12)
    assert torch.equal(quantizer.nearest(e), k), "q(q(z)) = q(z)"
    z = torch.linspace(-1.6, 1.6, 5001, dtype=torch.float64).view(-1, 1, 1, 1)
    step = 3.0 ** (1 - depth)
    nearest = (z / step).round().clamp(-(count // 2), count // 2) * step
    error = (quantizer.lookup(quantizer.nearest(z)) - z).abs()
    torch.testing.assert_close(error, (nearest - z).abs(), rtol=0, atol=1e-9)


def test_codes_of_a_position_are_adjacent_columns():
    quantizer = balanced_ternary(2)
    k = quantizer.nearest(torch.tensor([1 + 1 / 3, -1.0, 0.0, -1 / 3], dtype=torch.float64).view(1, 1, 2, 2))
    assert k[0].tolist() == [[2, 2, 0, 1], [1, 1, 1, 0]]
    assert quantizer.grid((2, 2)) == (2, 4)
    columns = quantizer.split(k)
    assert [column[0].tolist() for column in columns] == [[[2, 0], [1, 1]], [[2, 1], [1, 0]]]
    assert torch.equal(quantizer.join(columns), k)


def test_one_codebook_is_vector_quantisation_to_the_bit():
    torch.manual_seed(0)
    plain = VectorQuantizer(7, 5)
    torch.manual_seed(0)
    residual = ResidualQuantizer(7, 5, 1)
    for step in range(4):
        z = grid(6, 5, f"step {step}").float()
        ours, theirs = residual(z), plain(z)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        dead = residual.update(ours.z, ours.k, generator(step)), plain.update(theirs.z, theirs.k, generator(step))
        assert torch.equal(*dead) and torch.equal(residual.codebooks[0].codes, plain.codes)
    assert torch.equal(residual.marginals, plain.marginals)


def test_each_codebook_quantises_and_follows_what_the_ones_before_it_have_left():
    quantizer = ResidualQuantizer(6, 4, 3, decay=0.9, revival=0.1).double()
    alone = [VectorQuantizer(6, 4, decay=0.9, revival=0.1).double() for _ in range(3)]
    for one, codebook in zip(alone, quantizer.codebooks, strict=True):
        one.load_state_dict(codebook.state_dict())
    for step in range(3):
        z = grid(8, 4, f"step {step}").requires_grad_()
        out = quantizer(z)
        residual, commitment, total = z.detach(), 0.0, torch.zeros_like(z)
        rng, given = generator("revival", step), []
        for one, k in zip(alone, quantizer.split(out.k), strict=True):
            assert torch.equal(one.nearest(residual), k)
            given.append((residual, k))
            total = total + one.lookup(k)
            commitment += float((z.detach() - total).square().mean())
            residual = residual - one.lookup(k)
        torch.testing.assert_close(out.e, total, rtol=0, atol=1e-12)
        assert float(out.commitment.detach()) == pytest.approx(commitment, rel=1e-10)
        (slope,) = torch.autograd.grad(out.e.sum(), z, retain_graph=True)
        assert torch.equal(slope, torch.ones_like(z))
        dead = sum(int(one.update(r, k, rng)) for one, (r, k) in zip(alone, given, strict=True))
        assert int(quantizer.update(out.z.detach(), out.k, generator("revival", step))) == dead
        for one, codebook in zip(alone, quantizer.codebooks, strict=True):
            torch.testing.assert_close(codebook.codes, one.codes, rtol=1e-12, atol=1e-12)


def test_more_codebooks_leave_less():
    errors = []
    for depth in (1, 2, 3):
        quantizer, z = ResidualQuantizer(8, 4, depth, decay=0.9).double(), grid(200, 4)
        for step in range(60):
            quantizer.update(z, quantizer.nearest(z), generator("revival", step))
        errors.append(float((quantizer.lookup(quantizer.nearest(z)) - z).square().mean()))
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.7 * errors[1]


def test_a_residual_quantiser_needs_a_codebook():
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        ResidualQuantizer(4, 4, 0)


# Finite scalar quantisation

LEVELS = [[3], [8], [5, 4], [8, 5, 5], [7, 5, 5, 5]]
every_grid = pytest.mark.parametrize("levels", LEVELS, ids=str)


def all_codes(levels: list[int]) -> tuple[FiniteScalarQuantizer, Tensor, Tensor]:
    """A quantiser, the indices of all of its codes, (K, 1, 1), and the codes."""
    quantizer = FiniteScalarQuantizer(levels).double()
    k = torch.arange(quantizer.codebook_size).view(-1, 1, 1)
    return quantizer, k, quantizer.lookup(k)


@every_grid
def test_codes_and_indices_are_a_bijection(levels):
    quantizer, k, e = all_codes(levels)
    assert quantizer.codebook_size == math.prod(levels) == len(e.flatten(1).unique(dim=0))
    assert torch.equal(quantizer.index(e), k)
    for d, count in enumerate(levels):
        values = torch.arange(count, dtype=torch.float64) - count // 2
        torch.testing.assert_close(e[:, d].unique(), values / (count // 2), rtol=0, atol=1e-15)


@every_grid
def test_a_vector_that_is_bounded_to_a_code_is_quantised_to_it(levels):
    """q(q(z)) = q(z), and every code is reached: the vectors f^-1(e) of all codes e, by the inverse in closed form."""
    quantizer, k, e = all_codes(levels)
    L = torch.tensor(levels, dtype=torch.float64).view(-1, 1, 1)
    radius, offset = (L - 1) * 1.001 / 2, torch.where(L % 2 == 0, 0.5, 0.0)
    z = torch.atanh((e * (L // 2) + offset) / radius) - torch.atanh(offset / radius)
    torch.testing.assert_close(quantizer.bound(z), e, rtol=1e-9, atol=1e-12)
    assert torch.equal(quantizer.nearest(z), k)
    torch.testing.assert_close(quantizer.lookup(quantizer.nearest(z)), e, rtol=0, atol=0)


@pytest.mark.parametrize("count", range(3, 10))
def test_a_dimension_has_as_many_values_as_it_should_and_none_at_the_origin_moves(count):
    quantizer = FiniteScalarQuantizer([count]).double()
    z = torch.linspace(-20, 20, 10_001, dtype=torch.float64).view(-1, 1, 1, 1)
    k = quantizer.nearest(z).flatten()
    assert k.tolist() == sorted(k.tolist()) and k.unique().tolist() == list(range(count))
    assert float(quantizer.bound(torch.zeros(1, 1, 1, 1).double()).abs().max()) < 1e-15
    error = (quantizer.bound(z) - quantizer.lookup(quantizer.nearest(z))).abs().max()
    assert float(error) <= 0.5 / (count // 2) + 1e-12, "the nearest code"


def test_a_grid_of_codes_needs_no_gradient_and_its_frequencies_are_moving_averages():
    quantizer, z = FiniteScalarQuantizer([5, 4], decay=0.9).double(), grid(8, 2)
    assert not list(quantizer.parameters())
    k = quantizer.nearest(z)
    counts = torch.ones(20).double()
    for _ in range(3):
        quantizer.update(z, k)
        counts = 0.9 * counts + 0.1 * torch.bincount(k.flatten(), minlength=20)
    torch.testing.assert_close(quantizer.probs, counts / counts.sum())


def test_the_grid_is_found_in_float32_under_autocast():
    quantizer, z = FiniteScalarQuantizer([8, 8]), grid(50, 2).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.nearest(z), quantizer.nearest(z.double()))


@pytest.mark.parametrize("levels", [[], [2, 5]])
def test_grids_without_values_are_refused(levels):
    with pytest.raises(ValueError, match="code_levels must be at least 3"):
        FiniteScalarQuantizer(levels)
