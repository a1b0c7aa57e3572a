"""Errors of reconstructions by hand, and SSIM with scipy's Gaussian filter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from genzoo.metrics.reconstruction import reconstruction_error


def images(n: int, channels: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, channels, side, side), dtype=np.uint8))


def noisy(x: torch.Tensor, size: float) -> torch.Tensor:
    return (x.double() + size * torch.randn(x.shape)).round().clamp(0, 255).to(torch.uint8)


def test_errors_are_means_over_images_and_decibels_are_of_each():
    x = torch.full((2, 1, 4, 4), 100, dtype=torch.uint8)
    given = x.clone()
    given[0] += 51  # a fifth
    given[1, 0, 0, 0] -= 51
    found = reconstruction_error(x, given)
    mse = [0.04, 0.04 / 16]
    psnr = [-10 * math.log10(value) for value in mse]
    assert found["mse"] == pytest.approx((sum(mse) / 2, abs(mse[0] - mse[1]) / 2, 2), rel=1e-12)
    assert found["psnr"] == pytest.approx((sum(psnr) / 2, abs(psnr[0] - psnr[1]) / 2, 2), rel=1e-12)


def test_white_for_black_is_the_largest_error():
    x = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    found = reconstruction_error(x, ~x)
    assert found["mse"].value == 1 and found["psnr"].value == pytest.approx(0, abs=1e-12)


def test_an_image_that_lost_nothing_has_no_decibels():
    x = images(3, 1, 12)
    given = x.clone()
    given[:2] = noisy(x[:2], 10)
    found = reconstruction_error(x, given)
    assert set(found) == {"mse", "ssim"}
    same = reconstruction_error(x, x)
    assert same["mse"].value == 0 and same["ssim"].value == pytest.approx(1, abs=1e-12)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Of one channel on [0, 1], over all places of the window of 11 pixels; the image is mirrored beyond its border."""

    def smooth(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=5 / 1.5, mode="mirror")

    c1, c2 = 0.01**2, 0.03**2
    m, n = smooth(a), smooth(b)
    covariance = smooth(a * b) - m * n
    variances = smooth(a * a) - m**2 + smooth(b * b) - n**2
    return float(((2 * m * n + c1) * (2 * covariance + c2) / ((m**2 + n**2 + c1) * (variances + c2))).mean())


@pytest.mark.parametrize(("channels", "side"), [(1, 11), (1, 28), (3, 32)])
def test_ssim_is_that_of_its_definition(channels, side):
    x = images(4, channels, side)
    given = noisy(x, 60)
    each = [
        np.mean([ssim(x[i, c].numpy() / 255, given[i, c].numpy() / 255) for c in range(channels)]) for i in range(4)
    ]
    expected = np.mean(each), np.std(each, ddof=1) / 2, 4
    assert reconstruction_error(x, given)["ssim"] == pytest.approx(expected, rel=1e-6)


def test_every_image_has_its_ssim_however_many_there_are():
    x = images(503, 1, 11)
    given = noisy(x, 60)
    found = reconstruction_error(x, given)["ssim"]
    assert found.n == 503
    parts = [
        reconstruction_error(x[rows], given[rows])["ssim"].value * len(rows) for rows in torch.arange(503).split(99)
    ]
    assert found.value == pytest.approx(sum(parts) / 503, rel=1e-10)


def test_images_smaller_than_the_window_have_no_ssim():
    x = images(2, 1, 8)
    assert set(reconstruction_error(x, noisy(x, 9))) == {"mse", "psnr"}
