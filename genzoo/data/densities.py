r"""2-D toy densities: samplers with a known ``log p(x)`` and entropy, in nats.

The expected negative log-likelihood of a model is the entropy ``h = -E[log p]`` plus its Kullback-Leibler divergence
``KL(p || p_model)``.

    class              p(x)                                                        entropy
    GaussianMixture    sum_k w_k N(x; m_k, A_k A_k^T)                              quadrature
    Checkerboard       1/8 on eight unit squares of [-2, 2]^2                      log 8, exactly
    Moons              1/2 sum_k 1/pi int_0^pi N(x; c_k(theta), s^2 I) dtheta      quadrature
    SwissRoll          2/3 int_{3/4}^{9/4} N(x; c(r), s^2 I) dr                    quadrature

A curve blurred by Gaussian noise has no closed form, but its integral runs over one parameter: Gauss-Legendre panels
no longer than four standard deviations of the noise turn it into a mixture of Gaussians centred on the nodes.
``log p`` is then accurate to 1e-10 nats wherever it is above -30, and to 0.01 nats down to -500. Entropies are
two-dimensional trapezoidal sums, which converge exponentially for smooth functions that vanish at the edges; they are
accurate to 1e-9 nats.

Everything is computed in float64, on the CPU for samples and on the device of ``x`` for densities.

References:
    Trefethen, Weideman, "The Exponentially Convergent Trapezoidal Rule", 2014, https://doi.org/10.1137/130932132.
    Grathwohl et al., "FFJORD", 2019, https://arxiv.org/abs/1810.01367 (figure 2: these densities as a benchmark).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genzoo.data.dataset import DataSet, Split
from genzoo.numerics.random import categorical, generator, rand, randint, randn

Box = tuple[tuple[float, float], tuple[float, float]]  # ((x_lo, x_hi), (y_lo, y_hi))

TAIL = 7.0  # standard deviations kept around a Gaussian: beyond them lies a mass of 3e-12 per axis
CHUNK = 2**21  # numbers in the largest temporary of a density, 16 MiB


class PlaneDensity(ABC):
    """A distribution on R^2 with a known density."""

    @abstractmethod
    def sample(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` samples, (n, 2), float32."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Compute ``log p(x)`` in nats, (B, 2) -> (B,) float64; -inf outside the support."""

    @abstractmethod
    def entropy(self) -> float:
        """Differential entropy ``-E[log p]`` in nats, the lower bound of the expected negative log-likelihood."""

    @property
    @abstractmethod
    def support(self) -> Box:
        """A box that contains all but 1e-6 of the mass."""


class LabelledDensity(PlaneDensity):
    """A mixture whose components are classes."""

    classes: tuple[str, ...]

    @abstractmethod
    def sample_with_labels(self, n: int, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw ``n`` samples, (n, 2), float32, and their components, (n,), int64."""

    def sample(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        return self.sample_with_labels(n, rng)[0]


class GaussianMixture(LabelledDensity):
    r"""Gaussian mixture ``sum_k w_k N(m_k, A_k A_k^T)``; by default eight equal Gaussians on the circle of radius 2.

    It remains a mixture along every Gaussian path: ``alpha X + sigma eps`` has means ``alpha m_k`` and covariances
    ``alpha^2 A_k A_k^T + sigma^2 I``, so the exact score is known at every time of a diffusion.

    Args:
        means: m_k, (K, 2).
        scale: A_k: a number, one number per component, (K,), or matrices, (K, 2, 2).
        weights: unnormalised w_k, (K,); uniform by default.

    Raises:
        ValueError: if the shapes disagree, a weight is not positive or a scale is singular.
    """

    def __init__(
        self,
        means: Tensor | Sequence[Sequence[float]] | None = None,
        scale: float | Tensor | Sequence = 0.2,
        weights: Tensor | Sequence[float] | None = None,
    ):
        if means is None:
            angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
            means = 2.0 * torch.stack([angle.cos(), angle.sin()], dim=1)
        self.means = torch.as_tensor(means, dtype=torch.float64)
        if self.means.ndim != 2 or self.means.shape[1] != 2:
            raise ValueError(f"means must be (K, 2), not {tuple(self.means.shape)}")
        k = len(self.means)

        scale = torch.as_tensor(scale, dtype=torch.float64)
        if scale.shape in ((), (k,)):
            scale = scale.expand(k)[:, None, None] * torch.eye(2, dtype=torch.float64)
        if scale.shape != (k, 2, 2) or not bool((torch.linalg.det(scale) != 0).all()):
            raise ValueError(f"scale must be a number, ({k},) or ({k}, 2, 2), and not singular: {scale.tolist()}")
        self.scale = scale

        weights = torch.ones(k) if weights is None else weights
        weights = torch.as_tensor(weights, dtype=torch.float64)
        if weights.shape != (k,) or not bool((weights > 0).all()):
            raise ValueError(f"weights must be ({k},) and positive: {weights.tolist()}")
        self.weights = weights / weights.sum()

        # In the axes U of A = U S V^T the covariance is diagonal, S^2, and stays so under added noise.
        self._axes, singular, _ = torch.linalg.svd(scale)
        self._variances = singular**2
        self.classes = tuple(str(i) for i in range(k))

    def sample_with_labels(self, n: int, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        y = categorical(self.weights, n, rng=rng)
        eps = randn((n, 2), rng=rng, device="cpu").double()
        x = self.means[y] + torch.einsum("bij,bj->bi", self.scale[y], eps)
        return x.float(), y

    def log_prob(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """Compute the log density of ``alpha X + sigma eps`` at ``x``; of the mixture itself by default.

        Args:
            x: (B, 2).
            alpha: scale of the data, a number or (B,).
            sigma: standard deviation of the added noise, a number or (B,).

        Returns:
            Nats, (B,) float64.
        """
        return self._by_chunks(lambda *part: self._components(*part)[0].logsumexp(dim=1), x, alpha, sigma)

    def score(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """Compute the score, the gradient of ``log_prob(x, alpha, sigma)`` with respect to ``x``, (B, 2) float64."""

        def score(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
            log_joint, scores = self._components(x, alpha, sigma)
            return torch.einsum("bk,bki->bi", log_joint.softmax(dim=1), scores)

        return self._by_chunks(score, x, alpha, sigma)

    def entropy(self) -> float:
        # Each component is integrated in its own standard normal coordinates: a grid of step 0.1 fits any scale.
        u = torch.arange(-80, 81, dtype=torch.float64) * 0.1
        grid = torch.cartesian_prod(u, u)
        mass = torch.exp(-0.5 * grid.square().sum(dim=1)) * (0.1**2 / (2 * math.pi))
        entropies = [-(mass * self.log_prob(m + grid @ a.T)).sum() for m, a in zip(self.means, self.scale, strict=True)]
        return float(self.weights @ torch.stack(entropies))

    @property
    def support(self) -> Box:
        reach = TAIL * self.scale.square().sum(dim=2).sqrt()
        return _box(self.means - reach, self.means + reach)

    def _components(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """``log w_k N_k(x)``, (B, K), and the score of each ``N_k``, (B, K, 2); ``alpha`` and ``sigma`` are (B,)."""
        means, axes, variances, weights = (
            value.to(x.device) for value in (self.means, self._axes, self._variances, self.weights)
        )
        residual = torch.einsum("bki,kij->bkj", x[:, None] - alpha[:, None, None] * means, axes)
        var = alpha[:, None, None] ** 2 * variances + sigma[:, None, None] ** 2
        log_joint = weights.log() - 0.5 * (residual**2 / var + torch.log(2 * math.pi * var)).sum(dim=2)
        return log_joint, -torch.einsum("bkj,kij->bki", residual / var, axes)

    def _by_chunks(self, f: Callable[..., Tensor], x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        x = x.double()
        numbers = (torch.as_tensor(v, dtype=torch.float64, device=x.device).expand(len(x)) for v in (alpha, sigma))
        rows = max(1, CHUNK // (2 * len(self.means)))
        parts = zip(*(v.split(rows) for v in (x, *numbers)), strict=True)
        return torch.cat([f(*part) for part in parts])


class Checkerboard(PlaneDensity):
    """Uniform distribution on the eight unit squares ``[i, i+1) x [j, j+1)`` of ``[-2, 2)^2`` with ``i + j`` even.

    Its entropy is ``log 8`` = 2.0794 nats, unreachable for a continuous density.
    """

    def sample(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        square = randint(8, (n,), rng=rng, device="cpu")
        i = square // 2
        j = 2 * (square % 2) + i % 2
        corner = torch.stack([i, j], dim=1).float() - 2.0
        x = corner + rand((n, 2), rng=rng, device="cpu")
        # corner + u may round up to the next square in float32.
        return torch.minimum(x, torch.nextafter(corner + 1.0, corner))

    def log_prob(self, x: Tensor) -> Tensor:
        square = torch.floor(x.double())
        inside = ((square >= -2) & (square < 2)).all(dim=1) & (square.sum(dim=1) % 2 == 0)
        return torch.zeros_like(square[:, 0]).masked_fill_(~inside, -math.inf) - math.log(8.0)

    def entropy(self) -> float:
        return math.log(8.0)

    @property
    def support(self) -> Box:
        return (-2.0, 2.0), (-2.0, 2.0)


class Moons(LabelledDensity):
    r"""Two interleaved half circles of radius 1, blurred by Gaussian noise.

        c_0(theta) = (cos theta - 1/2, sin theta - 1/4),   c_1(theta) = -c_0(theta),   theta ~ U[0, pi]

    and ``x = c_y(theta) + noise * eps`` with equally likely moons: scikit-learn's ``make_moons`` translated by
    (-1/2, -1/4), which makes it point-symmetric, with random angles in place of a regular grid.

    Args:
        noise: standard deviation of the noise, s.

    Raises:
        ValueError: if the noise is not positive.
    """

    classes = ("upper", "lower")

    def __init__(self, noise: float = 0.1):
        theta, weight = _panels(0.0, math.pi, speed=1.0, noise=noise)
        upper = self._arc(theta)
        self._density = _BlurredCurve(torch.cat([upper, -upper]), torch.cat([weight, weight]) / 2, noise)

    @staticmethod
    def _arc(theta: Tensor) -> Tensor:
        return torch.stack([theta.cos() - 0.5, theta.sin() - 0.25], dim=1)

    def sample_with_labels(self, n: int, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        y = randint(2, (n,), rng=rng, device="cpu")
        upper = self._arc(math.pi * rand((n,), rng=rng, device="cpu").double())
        return self._density.perturb(torch.where(y[:, None] == 0, upper, -upper), rng), y

    def log_prob(self, x: Tensor) -> Tensor:
        return self._density.log_prob(x)

    def entropy(self) -> float:
        return self._density.entropy()

    @property
    def support(self) -> Box:
        return self._density.support


class SwissRoll(PlaneDensity):
    r"""A spiral of one and a half turns, blurred by Gaussian noise.

        c(r) = r (cos 2 pi r, sin 2 pi r),   r ~ U[3/4, 9/4],   x = c(r) + noise * eps

    The 2-D section of scikit-learn's ``make_swiss_roll`` divided by 2 pi, so that the radius is the number of turns and
    neighbouring arms have distance 1. The radius is uniform, not the arc length: the density is higher inside.

    Args:
        noise: standard deviation of the noise, s.

    Raises:
        ValueError: if the noise is not positive.
    """

    INNER, OUTER = 0.75, 2.25

    def __init__(self, noise: float = 0.1):
        speed = math.hypot(1.0, 2 * math.pi * self.OUTER)
        radius, weight = _panels(self.INNER, self.OUTER, speed, noise)
        self._density = _BlurredCurve(self._arc(radius), weight, noise)

    @staticmethod
    def _arc(radius: Tensor) -> Tensor:
        angle = 2 * math.pi * radius
        return radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)

    def sample(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        u = rand((n,), rng=rng, device="cpu").double()
        return self._density.perturb(self._arc(self.INNER + (self.OUTER - self.INNER) * u), rng)

    def log_prob(self, x: Tensor) -> Tensor:
        return self._density.log_prob(x)

    def entropy(self) -> float:
        return self._density.entropy()

    @property
    def support(self) -> Box:
        return self._density.support


class _BlurredCurve(NamedTuple):
    """Quadrature of a blurred curve: ``sum_j w_j N(x; c_j, s^2 I)`` with centres (M, 2), weights (M,) and noise s."""

    centres: Tensor
    weights: Tensor
    noise: float

    def perturb(self, c: Tensor, rng: torch.Generator | None) -> Tensor:
        return (c + self.noise * randn(c.shape, rng=rng, device="cpu").double()).float()

    def log_prob(self, x: Tensor) -> Tensor:
        centres = self.centres.to(x.device)
        log_weights = self.weights.log().to(x.device) - math.log(2 * math.pi * self.noise**2)

        def log_prob(x: Tensor) -> Tensor:
            # One coordinate at a time: |x|^2 - 2 x.c + |c|^2 would cancel, (B, M, 2) would be twice as large.
            squares = (x[:, :1] - centres[:, 0]) ** 2 + (x[:, 1:] - centres[:, 1]) ** 2
            return torch.logsumexp(log_weights - squares / (2 * self.noise**2), dim=1)

        return torch.cat([log_prob(part) for part in x.double().split(max(1, CHUNK // len(centres)))])

    def entropy(self) -> float:
        step = self.noise / 3
        axes = [torch.arange(lo, hi + step, step, dtype=torch.float64) for lo, hi in self.support]
        log_p = self.log_prob(torch.cartesian_prod(*axes))
        return float(-(log_p.exp() * log_p).sum() * step**2)

    @property
    def support(self) -> Box:
        return _box(self.centres - TAIL * self.noise, self.centres + TAIL * self.noise)


def _panels(lo: float, hi: float, speed: float, noise: float, order: int = 16) -> tuple[Tensor, Tensor]:
    """Composite Gauss-Legendre rule for a uniformly distributed curve parameter.

    Args:
        lo, hi: ends of the interval.
        speed: largest arc length per unit of the parameter.
        noise: standard deviation of the blur; a panel is at most four of them long.
        order: nodes per panel.

    Returns:
        Nodes and weights, float64, (M,) each; the weights sum to 1.

    Raises:
        ValueError: if the noise is not positive.
    """
    if not noise > 0:
        raise ValueError(f"noise must be positive, not {noise}")
    count = max(8, math.ceil((hi - lo) * speed / (4 * noise)))  # at least eight panels resolve the curve
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(order))
    starts = torch.arange(count, dtype=torch.float64)[:, None]
    unit = (starts + (nodes + 1) / 2) / count
    return lo + (hi - lo) * unit.flatten(), (weights / (2 * count)).repeat(count)


def _box(lower: Tensor, upper: Tensor) -> Box:
    """Bounding box of boxes with the given corners, (M, 2) each."""
    (x_lo, y_lo), (x_hi, y_hi) = lower.amin(dim=0).tolist(), upper.amax(dim=0).tolist()
    return (x_lo, x_hi), (y_lo, y_hi)


def plane_dataset(density: PlaneDensity, n_train: int = 50_000, n_test: int = 10_000, seed: int = 0) -> DataSet:
    """Draw a data set from a 2-D density; the components of a mixture are its classes.

    Args:
        density: the data distribution.
        n_train: number of training points.
        n_test: number of test points, independent of ``n_train``.
        seed: of both splits.
    """

    def draw(n: int, side: str) -> Split:
        rng = generator("data", seed, side)
        if isinstance(density, LabelledDensity):
            return Split(*density.sample_with_labels(n, rng))
        return Split(density.sample(n, rng), None)

    classes = density.classes if isinstance(density, LabelledDensity) else ()
    return DataSet(draw(n_train, "train"), draw(n_test, "test"), levels=None, classes=classes, density=density)
