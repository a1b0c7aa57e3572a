r"""Maximum mean discrepancy between two sets: of features with a polynomial kernel (KID), of points with a Gaussian one.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

The unbiased estimate leaves the pairs of a point with itself out, so that it may be negative where the laws are alike.

Features are multiplied in their own precision, after a common centre is taken away; what the centre adds, the cubes and their
sums are in float64. The products are then so small that single precision leaves all digits of KID that its subsets know.

References:
    Gretton et al., "A Kernel Two-Sample Test", 2012, https://jmlr.org/papers/v13/gretton12a.html (eq. 3).
    Binkowski et al., "Demystifying MMD GANs", 2018, https://arxiv.org/abs/1801.01401 (section 4: KID, the mean over subsets;
    on features of another network than Inception it is no KID).
    Obukhov et al., torch-fidelity, https://github.com/toshas/torch-fidelity (its subsets are drawn here in the same way).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genzoo.metrics.products import products

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020  # of torch-fidelity
BLOCK = 2048  # rows of a kernel matrix that are held at once
CACHED = 256  # rows that are widened at once, so few that they stay in the cache


def _centre(real: Tensor) -> Tensor:
    """Choose c, (D,), in the precision of the features, but at least in single."""
    return real.to(torch.promote_types(real.dtype, torch.float32)).mean(0)


def _level(x: Tensor, c: Tensor) -> Tensor:
    """Return what c adds, (N,) float64: ``x'y + D = (x - c)'(y - c) + level(x) + level(y)``."""
    c = c.double()
    return torch.cat([part.double() @ c for part in x.split(CACHED)]) + (len(c) - c @ c) / 2


def _cubic(table: Tensor, level_x: Tensor, level_y: Tensor) -> Tensor:
    """Return ``(x'y + D)^3``, the kernel times D^3, of all pairs, (N, M) float64, from the products of what is centred."""
    return (table + (level_x[:, None] + level_y)).pow(3)


def _estimate(table: Tensor, level: Tensor) -> float:
    """The unbiased estimate (Binkowski et al. 2018, section 3) times D^3, from the products of n real and n fake features."""
    n = len(level) // 2
    real, fake = slice(n), slice(n, None)
    own = (table.diagonal() + 2 * level).pow(3)

    def total(x: slice, y: slice) -> Tensor:
        parts = zip(table[x, y].split(CACHED), level[x].split(CACHED), strict=True)
        return torch.stack([_cubic(part, level_x, level[y]).sum() for part, level_x in parts]).sum()

    within = total(real, real) - own[real].sum() + total(fake, fake) - own[fake].sum()
    return float(within / (n * (n - 1)) - 2 * total(real, fake) / n**2)


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """KID on any features: the mean of the unbiased MMD^2 over 100 pairs of subsets, kernel ``(x'y/D + 1)^3``.

    Args:
        real, fake: (N, D) and (M, D). Subsets hold 1,000 features of each side, or all where there are fewer.
    """
    size = min(SUBSET_SIZE, len(real), len(fake))
    c = _centre(real)
    x, y = real.to(c) - c, fake.to(c) - c
    level_x, level_y = _level(real, c), _level(fake, c)
    z = c.new_empty(2 * size, len(c))  # of one subset after the other
    rng = np.random.RandomState(SEED)
    values = []
    for _ in range(SUBSETS):
        # As torch-fidelity deals them where the samples are its first input.
        j = torch.from_numpy(rng.choice(len(fake), size, replace=False)).to(c.device)
        i = torch.from_numpy(rng.choice(len(real), size, replace=False)).to(c.device)
        torch.index_select(x, 0, i, out=z[:size])
        torch.index_select(y, 0, j, out=z[size:])
        values.append(_estimate(products(z, z), torch.cat([level_x[i], level_y[j]])))
        if size == len(real) == len(fake):
            break  # all subsets are the same
    return sum(values) / len(values) / len(c) ** 3


def kernel_distance_stderr(real: Tensor, fake: Tensor) -> float:
    """Standard error of the unbiased MMD^2 of all features, the real ones fixed: that of its mean influence,

    ``2 (E k(y, y') - E k(x, y))`` of each fake y.
    """
    c = _centre(real)
    x, y = real.to(c) - c, fake.to(c) - c
    level_x, level_y = _level(real, c), _level(fake, c)
    own = torch.cat([part.double().square().sum(1) + len(c) for part in fake.split(CACHED)]).pow(3)
    influence = []
    for part, level, self in zip(*(table.split(BLOCK) for table in (y, level_y, own)), strict=True):
        k_yy, k_xy = _cubic(products(part, y), level, level_y), _cubic(products(part, x), level, level_x)
        influence.append(2 * ((k_yy.sum(1) - self) / (len(y) - 1) - k_xy.mean(1)))
    return float(torch.cat(influence).std() / len(y) ** 0.5 / len(c) ** 3)


def gaussian_mmd(real: Tensor, fake: Tensor, bandwidth: float) -> float:
    """Unbiased MMD^2 with the kernel ``exp(-|x - y|^2/(2 bandwidth^2))``; may be negative.

    Args:
        real, fake: (N, D) and (M, D).
        bandwidth: in units of the data.
    """
    x, y = real.double(), fake.double()

    def total(a: Tensor, b: Tensor) -> float:
        return float(sum(torch.exp(-(torch.cdist(p, b) ** 2) / (2 * bandwidth**2)).sum() for p in a.split(BLOCK)))

    n, m = len(x), len(y)
    return (total(x, x) - n) / (n * (n - 1)) + (total(y, y) - m) / (m * (m - 1)) - 2 * total(x, y) / (n * m)


def median_distance(x: Tensor, limit: int = 2000) -> float:
    """Median distance of two of the first points of a set: a bandwidth that depends on the reference alone."""
    return float(torch.nn.functional.pdist(x[:limit].double()).median())
