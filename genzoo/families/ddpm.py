r"""Denoising diffusion probabilistic models.

A chain of T steps turns data into noise, ``x_t = alpha_t x + sigma_t eps`` with ``alpha_t^2 + sigma_t^2 = 1``. The model is
the chain in reverse: a normal law for each step, whose mean follows from a network's estimate of the noise,

    p(x_s | x_t) = N(mean of q(x_s | x_t, x0), v_t I),    x0 = (x_t - sigma_t eps(x_t, t)) / alpha_t.

Training minimises the simple loss of eq. 14, the mean squared error of the noise at a time drawn uniformly,

    L_simple = E_{t, x, eps} |eps - eps_theta(alpha_t x + sigma_t eps, t)|^2

which weighs the terms of the variational bound anew. The bound itself (eq. 5) is what ``log_prob`` estimates:

    -log p(x) <= KL(q(x_T | x) || N(0, I)) + sum_{i=1}^{T-1} E KL(q(x_{i-1} | x_i, x) || p(x_{i-1} | x_i)) - E log p(x | x_0)

References:
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239.
    Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022,
    https://arxiv.org/abs/2202.00512 (x0- and v-prediction).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from genzoo.model import Bound, Denoiser, Density, LogProb, Loss, Samples
from genzoo.prob.divergences import kl_normal
from genzoo.prob.likelihoods import discretized_gaussian_log_mass
from genzoo.prob.measure import log_density, snap
from genzoo.prob.paths import GaussianPath, Prediction
from genzoo.prob.random import rand, randint, randn
from genzoo.prob.schedules import DiscreteSchedule, LinearSchedule
from genzoo.samplers import DDIM, Sampler, Step, plan


def strata(T: int, count: int) -> list[tuple[int, int]]:
    """Cut 0..T-1 into at most ``count`` ranges [start, stop): index 0 alone, then ranges that widen geometrically."""
    edges = [0, 1]
    for left in range(min(count, T) - 1, 0, -1):
        edges.append(max(edges[-1] + 1, round(edges[-1] * (T / edges[-1]) ** (1 / left))))
    return list(itertools.pairwise(edges))


class DDPM(Density, Denoiser):
    """A denoising diffusion model.

    Args:
        network: builds the network, called as ``network(in_shape, out_shape, num_classes)``, for ``(x_t, t, y)``.
        shape, levels, num_classes: of the data, as in ``GenerativeModel``.
        schedule: of the chain; the linear one of 1000 steps by default.
        prediction: what the network predicts.
        variance: v_t of a reverse step: "fixedlarge", beta_t, or "fixedsmall", the posterior's.
        label_dropout: how often training replaces a class by the null label, so that guidance can be used.
        sampler: draws the samples; DDIM with 50 steps by default.
    """

    bound = Bound.LOWER

    def __init__(
        self,
        network: Callable[..., nn.Module],
        shape: Sequence[int],
        levels: int | None = None,
        num_classes: int = 0,
        schedule: DiscreteSchedule | None = None,
        prediction: Literal["eps", "x0", "v"] = "eps",
        variance: Literal["fixedlarge", "fixedsmall"] = "fixedlarge",
        label_dropout: float = 0.1,
        sampler: Sampler | None = None,
    ):
        super().__init__(shape, levels, num_classes)
        if prediction not in ("eps", "x0", "v"):
            raise ValueError(f"prediction must be eps, x0 or v, not {prediction!r}")
        if variance not in ("fixedlarge", "fixedsmall"):
            raise ValueError(f"variance must be fixedlarge or fixedsmall, not {variance!r}")
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must be in [0, 1], not {label_dropout}")
        self.network = network(self.shape, self.shape, num_classes)
        self.schedule = schedule or LinearSchedule()
        self.path = GaussianPath(self.schedule)
        self.prediction, self.variance, self.label_dropout = prediction, variance, label_dropout
        self.sampler = sampler or DDIM()
        # Coefficients of every step of the chain, row i for index i, in float64 whatever the model's dtype.
        self._chain = torch.tensor(plan(self.path, None)[::-1], dtype=torch.float64)

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        return Prediction(self.prediction, self.network(x_t, t.expand(len(x_t)), y).to(x_t.dtype))

    def loss(
        self, x: Tensor, y: Tensor | None = None, *, turn: str | None = None, rng: torch.Generator | None = None
    ) -> Loss:
        self.check_labels(y, len(x))
        x = x if self.levels is None else snap(x, self.levels)
        if y is not None:
            dropped = rand(y.shape, rng=rng, device=x.device) < self.label_dropout
            y = torch.where(dropped, self.num_classes, y)
        T = self.schedule.num_steps
        t = (randint(T, (len(x),), rng=rng, device=x.device) + 1).double() / T
        eps = randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
        x_t = self.path.sample(x, eps, t)
        target = self.path.target(self.prediction, x, eps, t)
        mse = (self.predict(x_t, t, y).mean - target).square().mean()
        return Loss(mse, {"mse": mse.detach()})

    def sample(self, n: int, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> Samples:
        return self.sampler(self, n, self.draw_labels(n, y, rng), rng)

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, *, num_samples: int = 20, rng: torch.Generator | None = None
    ) -> LogProb:
        """Estimate the variational bound without bias from ``num_samples`` of its T terms.

        The chain's indices are cut into strata: index 0, whose term is the largest by far, alone, and ``num_samples/2 - 1``
        ranges that widen geometrically, as the terms decay. Two terms are drawn in each; their mean estimates the stratum and
        their difference its variance.

        Args:
            x, y, rng: as in ``Density``.
            num_samples: evaluations of the network for each event, even and at least 4.

        Raises:
            ValueError: for another ``num_samples``.
        """
        self.check_labels(y, len(x))
        if num_samples < 4 or num_samples % 2:
            raise ValueError(f"num_samples must be even and at least 4, not {num_samples}")
        x = x if self.levels is None else snap(x, self.levels)
        B = len(x)
        value = -self._prior_kl(x)
        variance = torch.zeros_like(value)
        for start, stop in strata(self.schedule.num_steps, num_samples // 2):
            first, second = (
                self._term(x, y, start + randint(stop - start, (B,), rng=rng, device=x.device), rng) for _ in range(2)
            )
            value = value - (stop - start) * (first + second) / 2
            variance = variance + ((stop - start) * (first - second) / 2) ** 2
        return LogProb(value, variance.sqrt())

    def _prior_kl(self, x: Tensor) -> Tensor:
        """KL(q(x_T | x) || N(0, I)) of each event."""
        c = self.schedule.at(torch.ones((), device=x.device))
        return kl_normal(c.alpha.to(x) * x, (2 * c.sigma.log()).to(x).expand_as(x)).flatten(1).sum(1)

    def _term(self, x: Tensor, y: Tensor | None, index: Tensor, rng: torch.Generator | None) -> Tensor:
        """One term of the bound for each event, at the chain's ``index``, (B,): a KL, or -log p(x | x_0) at index 0."""
        chain = self._chain.to(x.device)[index].to(x.dtype).view(len(x), -1, *[1] * (x.ndim - 1))
        _, alpha_t, sigma_t, alpha_s, _, var_ts, posterior_var = chain.unbind(1)  # the fields of a Step
        x_t = alpha_t * x + sigma_t * randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
        t = (index + 1).double() / self.schedule.num_steps
        x0 = self.path.convert(self.predict(x_t, t, y), x_t, t, "x0")
        if self.levels is not None:
            x0 = x0.clamp(-1, 1)
        # The two means differ by their estimates of x alone.
        gap = alpha_s * var_ts / sigma_t**2 * (x - x0)
        # Index 0 has no posterior variance: it takes the next one's (Ho et al.'s code clips the same way).
        floor = Step(*self._chain[1].tolist()).posterior_var
        first = (index == 0).view(sigma_t.shape)
        posterior = torch.where(first, floor, posterior_var)
        log_var = torch.where(first, floor, var_ts if self.variance == "fixedlarge" else posterior_var).log()
        kl = kl_normal(gap, posterior.log().expand_as(x), 0.0, log_var.expand_as(x)).flatten(1).sum(1)
        if self.levels is None:
            nll = 0.5 * ((x - x0) ** 2 / floor + math.log(2 * math.pi * floor)).flatten(1).sum(1)
        else:
            log_mass = discretized_gaussian_log_mass(x, x0, log_var.expand_as(x), self.levels).flatten(1).sum(1)
            nll = -log_density(log_mass, self.dim, self.levels)
        return torch.where(index == 0, nll, kl)
