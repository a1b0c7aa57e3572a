"""The one measure: integers go to [-1, 1] and come back as they were, and a nat is worth the same in every form."""

from __future__ import annotations

import math

import pytest
import torch

from genzoo.distributions import discretization
from genzoo.distributions.discretization import (
    bin_center,
    bits_per_dim,
    dequantize,
    log_density,
    quantize,
    to_bin_centers,
    to_bytes,
)
from genzoo.numerics.random import SampleStreams, generator

LEVELS = [2, 17, 256]
at_levels = pytest.mark.parametrize("levels", LEVELS)


@at_levels
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_every_level_comes_back_from_any_place_in_its_bin(levels, dtype):
    k = torch.arange(levels).repeat(4_000_000 // levels).to(dtype)
    assert torch.equal(quantize(dequantize(k, levels, generator("levels")), levels), k.long())


@pytest.mark.parametrize("levels", [2, 3, 10, 17, 100, 255, 256])
def test_every_level_comes_back_from_the_very_edges_of_its_bin(levels, monkeypatch):
    edges = [0.0, 2**-24, 2**-21, 2**-18, 2**-17, 1 - 2**-17, 1 - 2**-18, 1 - 2**-21, 1 - 2**-24]
    k = torch.arange(levels).repeat_interleave(len(edges))
    monkeypatch.setattr(discretization, "dither", lambda *_, **__: torch.tensor(edges).repeat(levels))
    x = dequantize(k, levels)
    assert torch.equal(quantize(x, levels), k)
    assert x.min() >= -1
    assert x.max() < 1


@at_levels
def test_dequantised_levels_fill_their_bins_uniformly(levels):
    for k in {0, levels // 2, levels - 1}:
        x = dequantize(torch.full((100_000,), k), levels, generator("uniform", k)).double()
        u = (x + 1) * levels / 2 - k
        assert float(u.mean()) == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / len(u)))
        assert float(u.var()) == pytest.approx(1 / 12, rel=0.02)


def test_the_noise_of_an_image_depends_on_its_index_alone():
    k = torch.arange(256).view(4, 1, 8, 8)
    together = dequantize(k, 256, SampleStreams(3, range(4)))
    assert torch.equal(together[2:3], dequantize(k[2:3], 256, SampleStreams(3, [2])))


@at_levels
def test_all_levels_own_equal_shares_of_the_interval(levels):
    points = 1000 * levels
    x = 2 * (torch.arange(points, dtype=torch.float64) + 0.5) / points - 1
    assert torch.equal(quantize(x, levels).bincount(minlength=levels), torch.full((levels,), 1000))


@at_levels
def test_points_beyond_the_interval_take_the_nearest_level(levels):
    x = torch.tensor([-7.0, -1.0 - 1e-6, 1.0, 1.004, 7.0])
    assert quantize(x, levels).tolist() == [0, 0, levels - 1, levels - 1, levels - 1]


@at_levels
def test_the_middle_of_a_bin_is_the_mean_of_its_edges_and_snapping_finds_it(levels):
    k = torch.arange(levels)
    edges = 2 * torch.arange(levels + 1, dtype=torch.float64) / levels - 1
    centre = bin_center(k, levels, torch.float64)
    torch.testing.assert_close(centre, (edges[1:] + edges[:-1]) / 2, atol=1e-15, rtol=0)
    assert torch.equal(quantize(bin_center(k, levels), levels), k)

    x = dequantize(k.repeat(100), levels, generator("snap"))
    assert torch.equal(to_bin_centers(x, levels), bin_center(k, levels).repeat(100))
    assert torch.equal(to_bin_centers(to_bin_centers(x, levels), levels), to_bin_centers(x, levels))
    assert (to_bin_centers(x, levels) - x).abs().max() <= 1 / levels + 1e-6


def test_bytes_of_a_picture_are_the_levels_themselves_or_stretch_over_all_greys():
    k = torch.arange(256)
    assert torch.equal(to_bytes(dequantize(k, 256, generator("bytes")), 256), k.to(torch.uint8))
    digits = to_bytes(bin_center(torch.arange(17), 17), 17)
    assert digits.dtype == torch.uint8
    assert digits.tolist() == [round(255 * k / 16) for k in range(17)]
    assert to_bytes(torch.tensor([-1.0, -0.1, 0.1, 1.0]), 2).tolist() == [0, 0, 255, 255]


def test_a_byte_beyond_the_interval_does_not_wrap_around():
    assert to_bytes(torch.tensor([-1.004, 1.004, 40.0]), 256).tolist() == [0, 255, 255]


@pytest.mark.parametrize(("levels", "bits"), [(256, 8.0), (17, math.log2(17)), (2, 1.0)])
@pytest.mark.parametrize("dim", [1, 64, 3072])
def test_the_uniform_density_scores_the_bits_of_a_level(levels, bits, dim):
    log_p = torch.tensor(-dim * math.log(2), dtype=torch.float64)
    assert float(bits_per_dim(log_p, dim, levels)) == pytest.approx(bits, abs=1e-12)


def test_a_uniform_digit_scores_4_0875_bits():
    assert float(bits_per_dim(torch.tensor(-64 * math.log(2)), 64, 17)) == pytest.approx(4.0875, abs=5e-5)


@at_levels
def test_a_probability_scores_its_own_bits(levels):
    """The bits of P are -log2 P / D, whatever density it is turned into on the way."""
    log_mass = torch.tensor([-1.0, -20.0, -3000.0], dtype=torch.float64)
    bits = bits_per_dim(log_density(log_mass, 12, levels), 12, levels)
    torch.testing.assert_close(bits, -log_mass / (12 * math.log(2)), atol=1e-12, rtol=1e-12)


@at_levels
def test_a_density_constant_on_its_bins_is_the_probability_of_each_over_its_width(levels):
    mass = torch.rand(levels, dtype=torch.float64)
    mass /= mass.sum()
    density = log_density(mass.log(), 1, levels).exp()
    assert float((density * (2 / levels)).sum()) == pytest.approx(1.0, abs=1e-12)
