r"""Maximum mean discrepancy, with a polynomial kernel on features (KID) and a Gaussian kernel on vectors.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

The unbiased estimate excludes the diagonal and may be negative.

References:
    Gretton et al., "A Kernel Two-Sample Test", 2012, https://jmlr.org/papers/v13/gretton12a.html (eq. 3).
    Binkowski et al., "Demystifying MMD GANs", 2018, https://arxiv.org/abs/1801.01401 (section 4: KID, the mean over subsets;
    with other features than those of Inception it has another name).
    Obukhov et al., torch-fidelity, https://github.com/toshas/torch-fidelity (the same subsets).
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from genzoo.metrics.finite import check_finite

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020  # of torch-fidelity
BLOCK = 2048  # rows of a kernel matrix in memory

Table = TypeVar("Table", Tensor, "np.ndarray[Any, Any]")


def _estimate(x: Table, y: Table) -> float:
    """The unbiased estimate from two samples in float64 (Binkowski et al. 2018, section 3)."""
    return float(_unbiased(_cubic(x, x), _cubic(y, y), _cubic(x, y)))


def _unbiased(k_xx: Table, k_yy: Table, k_xy: Table) -> Table:
    n, m = k_xy.shape
    within_x = (k_xx.sum() - k_xx.trace()) / (n * (n - 1))
    within_y = (k_yy.sum() - k_yy.trace()) / (m * (m - 1))
    return within_x + within_y - 2 * k_xy.mean()


def _cubic(x: Table, y: Table) -> Table:
    k = x @ y.T / x.shape[1] + 1
    return k * k * k


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Kernel distance (KID for Inception): the mean unbiased MMD^2 of 100 pairs of subsets, with kernel ``(x'y/D + 1)^3``.

    Args:
        real, fake: (N, D) and (M, D). Subsets have 1,000 features of each set, or all if fewer.

    Raises:
        NonFiniteError: for non-finite features.
    """
    check_finite(features_of_the_data=real, features_of_the_samples=fake)
    size = min(SUBSET_SIZE, len(real), len(fake))
    rng = np.random.RandomState(SEED)
    values = []
    for _ in range(SUBSETS):
        # In the order of torch-fidelity with the samples as its first input.
        y = fake[torch.from_numpy(rng.choice(len(fake), size, replace=False))].double()
        x = real[torch.from_numpy(rng.choice(len(real), size, replace=False))].double()
        # On a CPU numpy's product of a matrix and its transpose is twice as fast as torch's.
        values.append(_estimate(x.numpy(), y.numpy()) if x.device.type == "cpu" else _estimate(x, y))
        if size == len(real) == len(fake):
            break  # all subsets are equal
    return sum(values) / len(values)


def kernel_distance_stderr(real: Tensor, fake: Tensor) -> float:
    """Standard error of the unbiased MMD^2 for fixed real features, by its influence function.

    The influence of a sample y is ``2 (E k(y, y') - E k(x, y))``.
    """
    x, y = real.double(), fake.double()
    influence = []
    for part in y.split(BLOCK):
        k_yy, k_xy = _cubic(part, y), _cubic(part, x)
        own = (part.square().sum(1) / part.shape[1] + 1) ** 3
        influence.append(2 * ((k_yy.sum(1) - own) / (len(y) - 1) - k_xy.mean(1)))
    return float(torch.cat(influence).std() / len(y) ** 0.5)


def gaussian_mmd(real: Tensor, fake: Tensor, bandwidth: float) -> float:
    """Unbiased MMD^2 with the kernel ``exp(-|x - y|^2/(2 bandwidth^2))``; may be negative.

    Args:
        real, fake: (N, D) and (M, D).
        bandwidth: in units of the data.

    Raises:
        NonFiniteError: for non-finite vectors.
    """
    check_finite(points_of_the_data=real, samples=fake)
    x, y = real.double(), fake.double()

    def total(a: Tensor, b: Tensor) -> float:
        return float(sum(torch.exp(-(torch.cdist(p, b) ** 2) / (2 * bandwidth**2)).sum() for p in a.split(BLOCK)))

    n, m = len(x), len(y)
    return (total(x, x) - n) / (n * (n - 1)) + (total(y, y) - m) / (m * (m - 1)) - 2 * total(x, y) / (n * m)


def median_distance(x: Tensor, limit: int = 2000) -> float:
    """Median pairwise distance of the first ``limit`` points, a bandwidth that depends on the reference alone."""
    return float(torch.nn.functional.pdist(x[:limit].double()).median())
