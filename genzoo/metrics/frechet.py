r"""Frechet distance between Gaussians fitted to two sets of features.

    d^2 = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

The last term needs no matrix square root. For factors ``C1 = R1 R1'`` and ``C2 = R2 R2'`` it is the nuclear norm of ``R1' R2``,
the sum of the square roots of the eigenvalues of the symmetric ``R2' C1 R2``. The factor of the reference is cached. For fewer
features than dimensions the centred features are a factor of the exact rank, without rounding noise in the null space.

All computations are in float64. The plug-in distance of ``n`` features has a bias of about ``b/n``, which ``frechet_infinity``
removes by extrapolation.

References:
    Dowson, Landau, "The Frechet distance between multivariate normal distributions", 1982,
    https://doi.org/10.1016/0047-259X(82)90077-X (eq. 4).
    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017,
    https://arxiv.org/abs/1706.08500 (eq. 6: on Inception features this is FID).
    Chong, Forsyth, "Effectively Unbiased FID and Inception Score and Where to Find Them", 2020,
    https://arxiv.org/abs/1911.07023 (section 3: linear in 1/N).
    Chan, Golub, LeVeque, "Algorithms for Computing the Sample Variance", 1983, https://doi.org/10.2307/2683386 (eq. 2.1).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from scipy.linalg import lapack
from torch import Tensor
from torchmetrics import Metric

from genzoo.metrics.finite import NonFiniteError, check_finite
from genzoo.metrics.pairwise import pairwise_dot

BLOCKS = 4  # the smallest subsets of the extrapolation have 1/BLOCKS of the features


class Moments:
    """Mean and covariance of ``n`` features of ``D`` dimensions, float64.

    Attributes:
        n: number of features.
        mean: (D,).
        cov: unbiased, (D, D).
    """

    # Not a dataclass, whose tensors torchmetrics would squeeze, and with them a 1x1 covariance.
    def __init__(self, n: int, mean: Tensor, cov: Tensor):
        self.n, self.mean, self.cov = n, mean, cov

    def to(self, device: torch.device) -> Moments:
        """Move to a device, with the cached factor."""
        moved = Moments(self.n, self.mean.to(device), self.cov.to(device))
        if "factor" in self.__dict__:
            moved.__dict__["factor"] = self.factor.to(device)
        return moved

    @functools.cached_property
    def factor(self) -> Tensor:
        """A matrix R with ``cov = R R'``, (D, rank): the Cholesky factor for full rank."""
        D = len(self.cov)
        if self.n > D:
            R, failed = _cholesky(self.cov)
            if not failed:
                return R
        values, vectors = torch.linalg.eigh(self.cov)
        kept = values > values[-1] * D * torch.finfo(values.dtype).eps
        kept[: max(0, D - self.n + 1)] = False  # the rank is at most n - 1
        return vectors[:, kept] * values[kept].sqrt()


def _cholesky(C: Tensor) -> tuple[Tensor, bool]:
    """Return the lower triangular R with ``C = R R'``, and whether the decomposition failed."""
    if C.device.type == "cpu":
        # Faster than torch's, and in the memory order of ``_congruent``.
        R, failed = lapack.dpotrf(C.numpy().T, lower=0)
        return torch.from_numpy(R.T), failed != 0
    R, failed = torch.linalg.cholesky_ex(C)
    return R, bool(failed)


def _merge(a: Tensor, b: Tensor) -> Tensor:
    """Merge the counts, means and sums of squares of two sets, packed in (2 + D, D)."""
    n_a, n_b = a[0, :1], b[0, :1]
    n = (n_a + n_b).clamp(min=1)
    delta = b[1] - a[1]
    joined = a + b
    joined[1] = a[1] + delta * (n_b / n)
    joined[2:].addr_(delta, delta, alpha=float(n_a * n_b / n))
    return joined


def _merge_ranks(stacked: Tensor) -> Tensor:
    return functools.reduce(_merge, stacked.unbind()) if stacked.dim() == 3 else stacked


class FeatureMoments(Metric):
    """Streaming ``Moments`` of features, (B, D), in constant memory, merged over processes.

    Sums of squares are around the running mean, which avoids cancellation.

    Args:
        dim: D.
    """

    full_state_update = False
    packed: Tensor

    def __init__(self, dim: int, **kwargs: Any):
        super().__init__(**kwargs)
        # Row 0: count. Row 1: mean. Then: sum of (x - mean)(x - mean)'.
        self.add_state("packed", torch.zeros(2 + dim, dim, dtype=torch.float64), dist_reduce_fx=_merge_ranks)
        self.set_dtype(torch.float64)

    def update(self, features: Tensor) -> None:
        if not len(features):
            return  # an empty batch has no mean
        x = features.detach().to(self.packed)
        batch = torch.empty_like(self.packed)
        batch[0], batch[1] = len(x), x.mean(0)
        centred = x - batch[1]
        torch.mm(centred.T, centred, out=batch[2:])
        self.packed = _merge(self.packed, batch)

    def compute(self) -> Moments:
        """Return the moments of all features.

        Raises:
            NonFiniteError: for non-finite features.
        """
        n = int(self.packed[0, 0])
        if not bool(self.packed.isfinite().all()):
            raise NonFiniteError(f"some of {n} features are not finite: moments are undefined")
        return Moments(n, self.packed[1].clone(), self.packed[2:] / max(n - 1, 1))


def moments(features: Tensor) -> Moments:
    """Mean and covariance of features, (N, D).

    Raises:
        NonFiniteError: for non-finite features.
    """
    check_finite(features=features)
    x = features.double()
    mean = x.mean(0)
    centred = x - mean
    return Moments(len(x), mean, pairwise_dot(centred.T, centred.T) / max(len(x) - 1, 1))


def _distance(difference: Tensor, trace: Tensor, squared: Tensor) -> float:
    """Return the distance; ``squared`` are the squared singular values of ``R1' R2``."""
    # Clamp negative rounding errors for equal moments.
    return max(0.0, float(difference.square().sum() + trace - 2 * squared.clamp(min=0).sqrt().sum()))


def frechet_distance(p: Moments, q: Moments) -> float:
    """Squared Frechet distance of two Gaussians, in squared units of the features.

    Args:
        p, q: the moments; q, whose factor is cached, should be the reference.
    """
    R = q.factor
    full = p.n > len(p.cov)
    squared = torch.linalg.eigvalsh(_congruent(p.cov, R)) if full else _squared_singular_values(R.T @ p.factor)
    return _distance(p.mean - q.mean, p.cov.trace() + q.cov.trace(), squared)


def frechet_distance_of_features(features: Tensor, q: Moments) -> float:
    """Squared Frechet distance between features, (N, D), and a reference; for N <= D without forming their covariance."""
    N, D = features.shape
    if N > D:
        return frechet_distance(moments(features), q)
    check_finite(features=features)
    x = features.double()
    mean = x.mean(0)
    R = (x - mean).T / max(N - 1, 1) ** 0.5
    squared = _squared_singular_values(pairwise_dot(R.T, q.factor.T))
    return _distance(mean - q.mean, R.square().sum() + q.cov.trace(), squared)


def _congruent(C: Tensor, R: Tensor) -> Tensor:
    """Return the lower triangle of R' C R, as read by an eigensolver."""
    if C.device.type == "cpu" and R.shape == C.shape and not R.triu(1).any():
        # LAPACK exploits the triangular form, in half the time of two products.
        product, _ = lapack.dsygst(C.numpy().T, R.numpy().T, itype=2, lower=0)
        return torch.from_numpy(product.T)
    return R.T @ C @ R


def _squared_singular_values(K: Tensor) -> Tensor:
    """Squared singular values of K, from the smaller of K K' and K' K."""
    K = K if K.shape[0] <= K.shape[1] else K.T
    return torch.linalg.eigvalsh(pairwise_dot(K, K))


def frechet_stderr(features: Tensor, q: Moments) -> float | None:
    """Standard error of the distance between features, (N, D), and a fixed reference, by the delta method.

    To first order the distance is the mean of its influence function over the features,

        2 (m1 - m2)'(x - m1) + (x - m1)'(I - T)(x - m1) + const,

    where ``T = R (R' C1 R)^(-1/2) R'`` with ``C2 = R R'`` is the optimal map between the two Gaussians.

    Returns:
        None for fewer than 2 D features, where the covariance estimate is too inaccurate.
    """
    N, D = features.shape
    if N < 2 * D:
        return None
    x = features.double()
    p, R = moments(x), q.factor
    values, vectors = torch.linalg.eigh(R.T @ p.cov @ R)
    kept = values > values.abs().sum() * torch.finfo(values.dtype).eps  # none for a constant reference
    root = (R @ vectors[:, kept]) * values[kept] ** -0.25  # T = root root'
    centred = x - p.mean
    influence = 2 * centred @ (p.mean - q.mean) + centred.square().sum(1) - (centred @ root).square().sum(1)
    return float(influence.std() / N**0.5)


def frechet_infinity(features: Tensor, q: Moments, generator: torch.Generator | None = None) -> float | None:
    """Frechet distance extrapolated linearly in 1/N to infinitely many features.

    The features are split into k = 1..4 disjoint subsets. The mean distance of k subsets of N/k features has a bias of about
    ``b k/N``; a linear fit of the four means is evaluated at k = 0. All means use the same features, whose common error
    does not affect the slope.

    Args:
        features: (N, D), in any order.
        q: the reference, whose finite-sample bias is not corrected.
        generator: shuffles the features; None for no shuffle.

    Returns:
        None if the smallest subsets have no more features than dimensions, where the bias is not linear in 1/N.
    """
    N, D = features.shape
    if N // BLOCKS <= D:
        return None
    order = torch.randperm(N, generator=generator) if generator is not None else torch.arange(N)
    counts = torch.arange(1, BLOCKS + 1, dtype=torch.float64)
    means = torch.tensor(
        [
            sum(frechet_distance_of_features(features[order[i::k]], q) for i in range(k)) / k
            for k in range(1, BLOCKS + 1)
        ],
        dtype=torch.float64,
    )
    slope = ((counts - counts.mean()) * means).sum() / (counts - counts.mean()).square().sum()
    return float(means.mean() - slope * counts.mean())
