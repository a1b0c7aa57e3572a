r"""Masked and uniform diffusion of integers: discrete diffusion over levels of pixels and over codes.

An event is D integers in 0..K-1, a position for each pixel and channel. Independently at each position, the forward process
keeps the value with probability alpha_t, decreasing from alpha_0 = 1 to alpha_1 = 0, and otherwise draws it from pi,

    q(x_t | x) = alpha_t delta_x + (1 - alpha_t) pi,

where pi is a further state, the mask (absorbing diffusion), or uniform on 0..K-1. A network predicts mu, the distribution of
each position given the others, and Bayes' rule gives the reverse process, independent over positions for s < t,

    p(x_s | x_t) ~ q(x_t | x_s) (alpha_s mu(x_s) + (1 - alpha_s) pi(x_s)).

**Masks.** A masked position is unmasked with probability (alpha_s - alpha_t)/(1 - alpha_t), by a draw of mu, and never changes
again. In continuous time the variational bound is a weighted cross-entropy of the masked positions M_t,

    -log p(x) <= int_0^1 -alpha_t'/(1 - alpha_t) E sum_{i in M_t} -log mu_i(x_i) dt.

By the substitution m = 1 - alpha_t it does not depend on the schedule. Given their number n, the set M of masked positions is
uniform, and the integral over m of Binomial(n; D, m)/m is 1/n, so that

    -log p(x) <= sum_{n=1}^D 1/n E_{|M| = n} sum_{i in M} -log mu_i(x_i),

the bound of order-agnostic autoregressive models. It is estimated in this form, whose variance is smaller: a time t gives
n = ceil(D (1 - alpha_t)), of probability P(n), and the weight 1/(n P(n)). The schedule is only the distribution of n.

**Uniform noise.** Values jump at the rate -alpha_t'/(K alpha_t) to each other value. With c(y) = alpha_t x(y) + (1 - alpha_t)/K
for the one-hot x of a position, c_mu(y) with mu in its place, r(y) = c(y)/c(x_t) and r_mu(y) = c_mu(y)/c_mu(x_t), the ratios of
reverse to forward rates, the bound is

    -log p(x) <= int_0^1 -alpha_t'/(K alpha_t) E sum_i sum_y [r_mu - r + r log(r/r_mu)](y) dt.

Both bounds are equal to -log p(x) if mu is exact. Times of a batch are equidistant with a common random shift, those of a
reported bound stratified.

**Sampling** in S steps draws the positions of one step independently of each other, which is exact as S -> infinity. For masks
this limit is reached in D evaluations, one position at a time in random order (``steps=None``). With ``order="confidence"`` the
positions of the largest mu are unmasked first, as in MaskGIT: these are not samples of the model's distribution.

References:
    Austin et al., "Structured Denoising Diffusion Models in Discrete State-Spaces", 2021, https://arxiv.org/abs/2107.03006
    (section 3.1: absorbing and uniform noise).
    Sahoo et al., "Simple and Effective Masked Diffusion Language Models", 2024, https://arxiv.org/abs/2406.07524 (section 3).
    Shi et al., "Simplified and Generalized Masked Diffusion for Discrete Data", 2024, https://arxiv.org/abs/2406.04329
    (sections 2 and 3).
    Schiff et al., "Simple Guidance Mechanisms for Discrete Diffusion Models", 2024, https://arxiv.org/abs/2412.10193
    (uniform noise in continuous time).
    Hoogeboom et al., "Autoregressive Diffusion Models", 2022, https://arxiv.org/abs/2110.02037 (the sum over n).
    Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", 2021, https://arxiv.org/abs/2107.00630 (times of a batch).
    Chang et al., "MaskGIT: Masked Generative Image Transformer", 2022, https://arxiv.org/abs/2202.04200 (section 3.2).
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition, DropRate
from genzoo.diffusion.denoiser import call_network
from genzoo.distributions.discretization import bin_center, log_density, quantize
from genzoo.distributions.likelihoods import Categorical, Likelihood, draw_index
from genzoo.event import EventSpec
from genzoo.model import Bound, Diagnostic, Factorized, LogitGuided, LogProb, Loss, Samples
from genzoo.nn import defaults
from genzoo.numerics.constants import Constant
from genzoo.numerics.random import rand, rand_systematic, randint


class SurvivalSchedule(ABC):
    """The probability alpha(t) that a value is kept, decreasing from 1 at t = 0 to 0 at t = 1; float64."""

    @abstractmethod
    def noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 - alpha and its time derivative, each of the shape of t."""

    @abstractmethod
    def time(self, noise: Tensor) -> Tensor:
        """Return the time of a noise level 1 - alpha, the inverse of ``noise``."""


class Linear(SurvivalSchedule):
    """alpha = 1 - t."""

    def noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t, torch.ones_like(t)

    def time(self, noise: Tensor) -> Tensor:
        return noise


class Cosine(SurvivalSchedule):
    """alpha = 1 - sin(pi t/2)."""

    def noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = math.pi / 2 * t
        return angle.sin(), math.pi / 2 * angle.cos()

    def time(self, noise: Tensor) -> Tensor:
        return 2 / math.pi * noise.clamp(0, 1).asin()


class Geometric(SurvivalSchedule):
    """alpha proportional to exp(-b(t)) - exp(-b(1)), with b(t) geometric from ``low`` to ``high``."""

    def __init__(self, low: float = 1e-3, high: float = 20.0):
        self.low, self.log_ratio = low, math.log(high / low)
        self.first, self.last = math.exp(-low), math.exp(-high)

    def noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        b = self.low * torch.exp(self.log_ratio * t)
        scale = 1 / (self.first - self.last)
        return -self.first * torch.expm1(self.low - b) * scale, b * self.log_ratio * torch.exp(-b) * scale

    def time(self, noise: Tensor) -> Tensor:
        b = self.low - torch.log1p(-noise * (1 - self.last / self.first))
        return torch.log(b / self.low) / self.log_ratio


SCHEDULES: Mapping[str, Callable[[], SurvivalSchedule]] = {"linear": Linear, "cosine": Cosine, "geometric": Geometric}


class PositionDistribution:
    """The predicted distribution mu of each position, from parameters (B, P, *raster) of a likelihood of one channel."""

    def __init__(self, likelihood: Likelihood, params: Tensor):
        self.likelihood, self.params = likelihood, params

    def log_probs(self) -> Tensor:
        """Return the log probabilities of all values, (B, K, *raster)."""
        return self.likelihood.next_log_probs(self.params, self.params[:, :0])

    def log_prob(self, k: Tensor) -> Tensor:
        """Return the log probability of the value at each position, (B, *raster)."""
        levels = self.likelihood.levels
        assert levels is not None
        rows = self.params.movedim(1, -1).flatten(0, -2)
        log_p = self.likelihood.log_prob(rows, bin_center(k.reshape(-1, 1), levels, rows.dtype))
        return (log_p - math.log(levels / 2)).view(k.shape)


class Noise(ABC):
    """A forward process on D positions with K levels.

    Args:
        levels: K.
        dim: D.
        schedule: of the noise.

    Attributes:
        states: number of values of a noisy position.
    """

    states: int

    def __init__(self, levels: int, dim: int, schedule: SurvivalSchedule):
        self.levels, self.dim, self.schedule = levels, dim, schedule

    @abstractmethod
    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise level of times, and the weight of their costs in the bound, (B,) -> (B,), (B,) float64."""

    @abstractmethod
    def corrupt(self, k: Tensor, level: Tensor, rng: torch.Generator | None) -> Tensor:
        """Draw x_t of each event, (B, *raster), at a noise level, (B,)."""

    @abstractmethod
    def cost(self, k: Tensor, k_t: Tensor, level: Tensor, mu: PositionDistribution) -> Tensor:
        """Return the unweighted integrand of the bound, (B,), at x_t."""

    @abstractmethod
    def initial(self, shape: tuple[int, ...], rng: torch.Generator | None, device: torch.device) -> Tensor:
        """Draw x_1, of a shape (n, *raster)."""

    @abstractmethod
    def levels_of_steps(self, steps: int | None) -> list[float]:
        """Return the noise levels before the first step and after each, from 1 to 0."""

    @abstractmethod
    def level(self, k_t: Tensor, planned: float) -> Tensor:
        """Return the noise level of samples, (n,) float64, where that of the step is ``planned``."""

    @abstractmethod
    def step(self, k_t: Tensor, log_mu: Tensor, before: float, after: float, rng: torch.Generator | None) -> Tensor:
        """Draw x_s given x_t.

        Args:
            k_t: x_t, (n, *raster).
            log_mu: log probabilities of the predicted values up to normalisation, (n, K, *raster).
            before: noise level of t.
            after: noise level of s.
            rng: source of randomness.
        """


def smallest(scores: Tensor, count: Tensor) -> Tensor:
    """Mark the positions with the ``count`` smallest scores of each row, (B, D) and (B,) -> (B, D)."""
    return scores.argsort(dim=1, stable=True).argsort(dim=1) < count[:, None]


class MaskNoise(Noise):
    """Absorbing noise; the state K is the mask, and the noise level n/D the fraction of masked positions.

    Args:
        levels, dim, schedule: as in ``Noise``.
        fixed_counts: whether a step of sampling unmasks a planned number of positions, and not a random one.
        confidence: factor of Gumbel noise on log mu in the order of MaskGIT; None for a random order.
    """

    def __init__(
        self, levels: int, dim: int, schedule: SurvivalSchedule, fixed_counts: bool, confidence: float | None = None
    ):
        super().__init__(levels, dim, schedule)
        self.states, self.fixed_counts, self.confidence = levels + 1, fixed_counts, confidence
        edges = schedule.time(torch.linspace(0, 1, dim + 1, dtype=torch.float64))
        edges[0], edges[-1] = 0, 1
        self._edges = Constant(edges[1:-1])
        self._probs = Constant(edges.diff())  # P(n)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.searchsorted(self._edges.on(t.device), t)
        n = (index + 1).double()
        return n / self.dim, 1 / (n * self._probs.on(t.device)[index])

    def corrupt(self, k: Tensor, level: Tensor, rng: torch.Generator | None) -> Tensor:
        u = rand((len(k), self.dim), rng=rng, device=k.device)
        masked = smallest(u, (level * self.dim).round())
        return torch.where(masked.view(k.shape), self.levels, k)

    def cost(self, k: Tensor, k_t: Tensor, level: Tensor, mu: PositionDistribution) -> Tensor:
        return -torch.where(k_t == self.levels, mu.log_prob(k), 0.0).flatten(1).sum(1)

    def initial(self, shape: tuple[int, ...], rng: torch.Generator | None, device: torch.device) -> Tensor:
        return torch.full(shape, self.levels, device=device)

    def levels_of_steps(self, steps: int | None) -> list[float]:
        if steps is None:
            return [n / self.dim for n in range(self.dim, -1, -1)]
        return _levels_of_times(self.schedule, steps)

    def level(self, k_t: Tensor, planned: float) -> Tensor:
        return (k_t == self.levels).flatten(1).double().mean(1)

    def step(self, k_t: Tensor, log_mu: Tensor, before: float, after: float, rng: torch.Generator | None) -> Tensor:
        masked = (k_t == self.levels).flatten(1)
        u = rand((len(k_t), 2, self.dim), rng=rng, device=k_t.device)
        k = draw_index(log_mu, u[:, 0].reshape(k_t.shape)[:, None])
        if not self.fixed_counts:
            chosen = masked & (u[:, 1] * before < before - after)
        else:
            scores = u[:, 1]
            if self.confidence is not None:
                gumbel = -torch.log(-torch.log(scores.double().clamp(2.0**-25, 1 - 2.0**-25)))
                drawn = log_mu.double().log_softmax(1).gather(1, k).flatten(1)
                scores = -(drawn + self.confidence * after * gumbel)
            count = masked.sum(1) - math.ceil(round(after * self.dim, 6))
            chosen = masked & smallest(torch.where(masked, scores, torch.inf), count)
        return torch.where(chosen.view(k_t.shape), k[:, 0], k_t)


class UniformNoise(Noise):
    """Uniform noise on the K levels; the noise level is 1 - alpha."""

    def __init__(self, levels: int, dim: int, schedule: SurvivalSchedule):
        super().__init__(levels, dim, schedule)
        self.states = levels

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        level, slope = self.schedule.noise(t)
        return level, slope / (self.levels * (1 - level).clamp(min=1e-30))

    def corrupt(self, k: Tensor, level: Tensor, rng: torch.Generator | None) -> Tensor:
        u = rand((len(k), 2, *k.shape[1:]), rng=rng, device=k.device)
        noise = (u[:, 1] * self.levels).long().clamp_(max=self.levels - 1)
        return torch.where(u[:, 0] < level.view(-1, *[1] * (k.ndim - 1)), noise, k)

    def cost(self, k: Tensor, k_t: Tensor, level: Tensor, mu: PositionDistribution) -> Tensor:
        log_mu = mu.log_probs()
        a, b = (self._broadcast(c, log_mu).log() for c in (1 - level, level / self.levels))
        kept = torch.zeros_like(log_mu, dtype=torch.bool).scatter(1, k[:, None], True)
        log_c, log_c_mu = torch.where(kept, torch.logaddexp(a, b), b), torch.logaddexp(a + log_mu, b)
        log_r, log_r_mu = (log - log.gather(1, k_t[:, None]) for log in (log_c, log_c_mu))
        gap = log_r_mu - log_r
        # e^gap - 1 - gap without cancellation; 0 for the value of x_t itself.
        return (log_r.exp() * (torch.expm1(gap) - gap)).flatten(1).sum(1)

    def _broadcast(self, value: Tensor, like: Tensor) -> Tensor:
        """Return a number for each event, (B,), clamped to normal numbers, with the dimensions of a tensor."""
        return value.clamp(min=1e-30).to(like.dtype).view(-1, *[1] * (like.ndim - 1))

    def initial(self, shape: tuple[int, ...], rng: torch.Generator | None, device: torch.device) -> Tensor:
        return randint(self.levels, shape, rng=rng, device=device)

    def levels_of_steps(self, steps: int | None) -> list[float]:
        assert steps is not None
        return _levels_of_times(self.schedule, steps)

    def level(self, k_t: Tensor, planned: float) -> Tensor:
        return torch.full((len(k_t),), planned, dtype=torch.float64, device=k_t.device)

    def step(self, k_t: Tensor, log_mu: Tensor, before: float, after: float, rng: torch.Generator | None) -> Tensor:
        kept = (1 - before) / (1 - after)  # alpha_t / alpha_s
        here = torch.zeros_like(log_mu, dtype=torch.bool).scatter(1, k_t[:, None], True)
        forward = kept * here + (1 - kept) / self.levels  # q(x_t | x_s) of each x_s
        probs = forward * ((1 - after) * log_mu.double().softmax(1) + after / self.levels)
        u = rand((len(k_t), 1, *k_t.shape[1:]), rng=rng, device=k_t.device)
        return draw_index(probs.log(), u)[:, 0]


def _levels_of_times(schedule: SurvivalSchedule, steps: int) -> list[float]:
    """Return the noise levels at equidistant times, from 1 to 0."""
    levels = schedule.noise(torch.linspace(1, 0, steps + 1, dtype=torch.float64))[0].tolist()
    return [1.0, *levels[1:-1], 0.0]


class MaskedDiffusion(Factorized, LogitGuided):
    """Discrete diffusion of integers, by masks or uniform noise.

    Args:
        network: factory of the network, called as ``network(in_shape, out_shape, condition)``, for ``(x_t, level, y)``.
        likelihood: factory of the likelihood of a position, called as ``likelihood(levels=levels)``.
        event, condition: as in ``GenerativeModel``.
        noise: "mask" or "uniform".
        schedule: "linear", "cosine" or "geometric".
        inputs: encoding of the network's inputs: "classes", one-hot states, or "values" with a channel that marks the masks.
        time: whether the network is given the noise level, which for masks is a function of x_t.
        steps: S, of sampling; None for masks, one position at a time.
        order: of masked positions in sampling, "random", or "confidence" as in MaskGIT.
        temperature: factor of the Gumbel noise in the order by confidence, at the first step.
        condition_dropout: probability of replacing a condition by the null value in training, for classifier-free guidance.

    Raises:
        ValueError: for data without levels, and options of masks with uniform noise.
    """

    bound = Bound.LOWER
    num_samples = 20

    diagnostics: Mapping[str, Diagnostic] = {
        "vlb": Diagnostic("variational bound", "nats per position", "lower"),
    }

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., nn.Module] = defaults.masked,
        likelihood: Callable[..., Likelihood] = Categorical,
        noise: Literal["mask", "uniform"] = "mask",
        schedule: Literal["linear", "cosine", "geometric"] = "linear",
        inputs: Literal["classes", "values"] = "classes",
        time: bool = True,
        steps: int | None = 64,
        order: Literal["random", "confidence"] = "random",
        temperature: float = 4.5,
        condition_dropout: DropRate = 0.1,
    ):
        super().__init__(event, condition, condition_dropout)
        if event.levels is None:
            raise ValueError("masked diffusion needs data with levels, such as images or codes, not real vectors")
        options = {"noise": ("mask", "uniform"), "schedule": tuple(SCHEDULES), "inputs": ("classes", "values")}
        options["order"] = ("random", "confidence")
        for name, value in {"noise": noise, "schedule": schedule, "inputs": inputs, "order": order}.items():
            if value not in options[name]:
                raise ValueError(f"{name} must be {' or '.join(options[name])}, not {value!r}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, or null for one position at a time, not {steps}")
        if noise == "uniform" and (steps is None or order == "confidence"):
            raise ValueError("noise=uniform has no masks: it needs a number of steps and order=random")
        if temperature < 0:
            raise ValueError(f"temperature must not be negative, not {temperature}")
        self.inputs, self.time, self.steps, self.order = inputs, time, steps, order
        self.raster = self.shape if event.is_image else (1, self.dim, 1)
        self.likelihood = likelihood(levels=event.levels)
        self.likelihood.check(event.levels)
        if self.likelihood.levels is None:
            raise ValueError(f"likelihood: {type(self.likelihood).__name__} has no probabilities of levels")
        levels, survival = event.levels, SCHEDULES[schedule]()
        self.noise: Noise = UniformNoise(levels, self.dim, survival)
        if noise == "mask":
            confidence = temperature if order == "confidence" else None
            fixed_counts = steps is None or order == "confidence"
            self.noise = MaskNoise(levels, self.dim, survival, fixed_counts, confidence)
        channels, *sides = self.raster
        encoded = self.noise.states if inputs == "classes" else 1 + (noise == "mask")
        out_channels = channels * self.likelihood.num_params(1)
        self.network = network((channels * encoded, *sides), (out_channels, *sides), condition)

    def _encode_states(self, k_t: Tensor) -> Tensor:
        """Encode noisy values as network inputs, (B, C, H, W) -> (B, C' C, H, W)."""
        if self.inputs == "classes":
            encoded = F.one_hot(k_t, self.noise.states).movedim(-1, 1)
        else:
            assert self.levels is not None
            value, masked = bin_center(k_t, self.levels, self.dtype), k_t == self.levels
            encoded = value[:, None]
            if self.noise.states > self.levels:
                encoded = torch.stack([torch.where(masked, 0.0, value), masked.to(value)], dim=1)
        return encoded.flatten(1, 2).to(self.dtype)

    def predict(self, k_t: Tensor, level: Tensor, y: Tensor | None = None) -> PositionDistribution:
        """Predict the distribution of each position given the others.

        Args:
            k_t: noisy values, (B, *raster).
            level: noise level, (B,).
            y: conditions, null values included.
        """
        given = level if self.time else torch.zeros_like(level)
        params = call_network(self.network, self._encode_states(k_t), given, y)
        return PositionDistribution(self.likelihood, params.unflatten(1, (-1, self.raster[0])))

    def _negative_bound(self, k: Tensor, y: Tensor | None, t: Tensor, rng: torch.Generator | None) -> Tensor:
        """Estimate the upper bound of -log P of each event from a time, (B,); unbiased for uniform times."""
        level, weight = self.noise.at(t)
        k_t = self.noise.corrupt(k, level, rng)
        cost = self.noise.cost(k, k_t, level, self.predict(k_t, level, y))
        return weight.to(cost.dtype) * cost

    def _quantize(self, x: Tensor) -> Tensor:
        assert self.levels is not None
        return quantize(x.view(-1, *self.raster), self.levels)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        y = self.conditioner.drop(y, rng)
        t = rand_systematic(len(x), rng=rng, device=x.device)
        value = self._negative_bound(self._quantize(x), y, t, rng).mean() / self.dim
        return Loss(value, {"vlb": value.detach()})

    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        """Estimate the bound without bias, by ``num_samples/2`` strata of times with two draws each.

        The difference of the two draws estimates the variance.

        Args:
            x, y, rng: as in ``Density``.
            num_samples: network evaluations per event, even.

        Raises:
            ValueError: for an odd ``num_samples``.
        """
        if num_samples % 2:
            raise ValueError(f"num_samples must be even, not {num_samples}")
        assert self.levels is not None
        k, strata = self._quantize(x), num_samples // 2
        value = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        variance = torch.zeros_like(value)
        for j in range(strata):
            pair = []
            for _ in range(2):
                u = rand((len(x),), rng=rng, device=x.device).double() + 2.0**-25  # never 0
                pair.append(self._negative_bound(k, y, (j + u) / strata, rng).to(x.dtype) / strata)
            value = value - (pair[0] + pair[1]) / 2
            variance = variance + (pair[0] - pair[1]).square() / 4
        return LogProb(log_density(value, self.dim, self.levels), variance.sqrt())

    def check_compressible(self) -> None:
        if not isinstance(self.noise, MaskNoise):
            raise ValueError("noise=uniform has no order of positions: masks have, model.noise=mask")

    def _factorize(
        self, n: int, y: Tensor | None, draw: Callable[[Tensor, Tensor], Tensor], rng: torch.Generator | None
    ) -> None:
        """Unmask the positions in a random order of each event, over which the bound is the mean of the code lengths."""
        order = rand((n, self.dim), rng=rng, device=self.device).argsort(dim=1, stable=True)
        k_t = torch.full((n, *self.raster), self.noise.states - 1, device=self.device)
        for left, index in zip(range(self.dim, 0, -1), order.unbind(1), strict=True):
            level = torch.full((n,), left / self.dim, dtype=torch.float64, device=self.device)
            log_mu = self.predict(k_t, level, y).log_probs().flatten(2)
            at = index[:, None, None].expand(-1, log_mu.shape[1], 1)
            k_t.view(n, -1).scatter_(1, index[:, None], draw(log_mu.gather(2, at)[..., 0], index)[:, None])

    def check_guidance(self) -> None:
        if self.condition is None:
            raise ValueError("guidance: the model is unconditional")
        if not self.conditioner.learns_null:
            raise ValueError(
                "guidance: the model was trained with model.condition_dropout=0 and has no unconditional part"
            )

    def _log_mu(self, k_t: Tensor, level: Tensor, y: Tensor | None) -> Tensor:
        """Return guided log probabilities up to normalisation, (n, K, *raster).

        With guidance, a second half of the batch has the null value.
        """
        if self.guidance_scale == 1:
            return self.predict(k_t, level, y).log_probs()
        assert self.condition is not None and y is not None
        both = torch.cat([y, self.condition.null(y)])
        c, u = self.predict(k_t.repeat(2, 1, 1, 1), level.repeat(2), both).log_probs().chunk(2)
        return u + self.guidance_scale * (c - u)

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        if self.guidance_scale != 1:
            self.check_guidance()
        assert self.levels is not None
        levels = self.noise.levels_of_steps(self.steps)
        k = self.noise.initial((n, *self.raster), rng, self.device)
        for before, after in itertools.pairwise(levels):
            log_mu = self._log_mu(k, self.noise.level(k, before), y)
            k = self.noise.step(k, log_mu, before, after, rng)
        nfe = (len(levels) - 1) * (1 if self.guidance_scale == 1 else 2)
        return Samples(bin_center(k, self.levels, self.dtype).view(n, *self.shape), nfe)
