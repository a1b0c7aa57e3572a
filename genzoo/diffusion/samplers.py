r"""Samplers: ways from noise to data along a Gaussian path, for any ``Denoiser``.

**Chains** (``Ancestral``, ``DDIM``, ``DPMSolver``, ``PredictorCorrector``, ``EulerMaruyama``) walk down the times that the
denoiser's schedule lists, ``t -> s`` with ``s < t``. Every step is written in the path's own coefficients, so that a chain
may be thinned out and any schedule may be used:

    alpha_ts = alpha_t / alpha_s,      var_ts = sigma_t^2 - alpha_ts^2 sigma_s^2          (the noise added from s to t)
    q(x_s | x_t, x) = N(alpha_ts sigma_s^2/sigma_t^2 x_t + alpha_s var_ts/sigma_t^2 x,  var_ts sigma_s^2/sigma_t^2 I)

which for a variance-preserving chain is eq. 6-7 of Ho et al. 2020, and in this general form eq. 32 of Kingma et al. 2021.
Each arrives at the data by taking the estimate of it.

**Solvers** (``Euler``, ``Midpoint``, ``Heun``, ``AdaptiveODE``) integrate the probability-flow ODE in its natural coordinates,
see ``genzoo.diffusion.probability_flow``: in time for flow matching, in the ratio r = sigma/alpha for diffusion, where
steps are spread
evenly over ``r^{1/rho}``.

References:
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239 (algorithm 2).
    Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2021, https://arxiv.org/abs/2010.02502 (eq. 12, 16).
    Song et al., "Score-Based Generative Modeling through SDEs", 2021, https://arxiv.org/abs/2011.13456 (appendix E, G).
    Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", 2021, https://arxiv.org/abs/2107.00630 (appendix A).
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364 (algorithm 1, eq. 5).
    Lu et al., "DPM-Solver++", 2022, https://arxiv.org/abs/2211.01095 (algorithm 2).
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from genzoo.diffusion.path import GaussianPath, Prediction, batch_times, cast_like, conversion_coefficients
from genzoo.diffusion.probability_flow import ProbabilityFlowODE
from genzoo.diffusion.schedules import Schedule
from genzoo.model import Denoiser, Samples
from genzoo.numerics.random import randn

Variance = Literal["fixedlarge", "fixedsmall", "learned"]
RATIO_MAX = 80.0  # of noise to data: beyond it data on [-1, 1] have vanished (Karras et al. 2022)
ZERO = torch.zeros(())  # to which a x is added: a product with a number would make a tensor of the number first


class StepCoefficients(NamedTuple):
    """Coefficients of one step ``t -> s`` of a chain, as numbers."""

    t: float
    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float
    var_ts: float  # variance of the noise between s and t
    posterior_var: float  # variance of q(x_s | x_t, x)
    d_alpha_t: float  # time derivatives at t
    d_sigma_t: float

    @property
    def last(self) -> bool:
        """Whether this step arrives at the data."""
        return self.sigma_s == 0.0

    def posterior_mean(self, x_t: Tensor, x0: Tensor) -> Tensor:
        """Mean of q(x_s | x_t, x)."""
        of_x_t = self.alpha_t / self.alpha_s * self.sigma_s**2 / self.sigma_t**2
        return axpby(of_x_t, x_t, self.alpha_s * self.var_ts / self.sigma_t**2, x0)

    def eps(self, x_t: Tensor, x0: Tensor) -> Tensor:
        """Return the noise in ``x_t = alpha_t x0 + sigma_t eps``."""
        return axpby(1 / self.sigma_t, x_t, -self.alpha_t / self.sigma_t, x0)

    def renoised(self, x_t: Tensor, x0: Tensor, std: float) -> Tensor:
        """Return ``alpha_s x0 + std eps`` with the noise that is in ``x_t``."""
        return axpby(std / self.sigma_t, x_t, self.alpha_s - std * self.alpha_t / self.sigma_t, x0)


def axpby(a: float, x: Tensor, b: float, y: Tensor) -> Tensor:
    """Return ``a x + b y``."""
    return torch.add(ZERO, x, alpha=a).add_(y, alpha=b)


def chain_coefficients(path: GaussianPath, times: Tensor) -> list[StepCoefficients]:
    """Compute all steps of a chain once, in float64."""
    c = path.schedule.at(times)
    alpha, sigma, d_alpha, d_sigma = (values.tolist() for values in c)
    chain = []
    for i, t in enumerate(times[:-1].tolist()):
        var_ts = sigma[i] ** 2 - (alpha[i] / alpha[i + 1] * sigma[i + 1]) ** 2
        posterior_var = var_ts * (sigma[i + 1] / sigma[i]) ** 2
        ends = alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
        chain.append(StepCoefficients(t, *ends, var_ts, posterior_var, d_alpha[i], d_sigma[i]))
    return chain


def karras_sigmas(schedule: Schedule, steps: int, rho: float, ratio_max: float) -> Tensor:
    """Spread sigma/alpha evenly over its ``rho``-th root, from the first, at most ``ratio_max``, to the last: (steps,).

    Karras et al. 2022, eq. 5, with rho = 7.
    """
    ends = schedule.ratio(torch.tensor([schedule.t_max, schedule.t_last], dtype=torch.float64)).clamp(max=ratio_max)
    first, last = ends ** (1 / rho)
    return (first + torch.linspace(0, 1, steps, dtype=torch.float64) * (last - first)) ** rho


def initial_state(schedule: Schedule, noise: Tensor, t: float) -> Tensor:
    """Scale standard normal noise to where a walk begins: the prior, or the noise of a time before the last."""
    if t >= schedule.t_max:
        return schedule.prior_std * noise
    return float(schedule.at(torch.tensor(t, dtype=torch.float64)).sigma) * noise


class CountedDenoiser:
    """A denoiser's answers along a chain, counted.

    Args:
        denoiser: who is asked.
        y: classes of the batch, (B,), or None.
        clip: whether estimates of the data are clamped to [-1, 1] where the data are images.
        chain: the steps about which questions will be asked.
        batch: states like those that will be shown, (B, *shape).
    """

    def __init__(self, denoiser: Denoiser, y: Tensor | None, clip: bool, chain: list[StepCoefficients], batch: Tensor):
        self.denoiser, self.y = denoiser, y
        self.clip = clip and denoiser.levels is not None
        self.nfe = 0
        times = [step.t for step in chain]
        self.times = dict(zip(times, batch_times(torch.tensor(times, dtype=torch.float64), batch), strict=True))

    def __call__(self, x_t: Tensor, step: StepCoefficients) -> tuple[Tensor, Prediction]:
        """Return the data that the denoiser sees in ``x_t``, where a step begins, and all that it says."""
        prediction = self.denoiser.predict(x_t, self.times[step.t], self.y)
        self.nfe += self.denoiser.evaluations
        if prediction.kind == "x0":
            x0 = cast_like(prediction.mean, x_t)
            return x0.clamp(-1.0, 1.0) if self.clip else x0, prediction
        at_t = step.alpha_t, step.sigma_t, step.d_alpha_t, step.d_sigma_t
        of_x_t, of_mean = conversion_coefficients(prediction.kind, "x0", *at_t)
        x0 = axpby(of_x_t, x_t, of_mean, prediction.mean)
        return x0.clamp_(-1.0, 1.0) if self.clip else x0, prediction


class Sampler(ABC):
    """A way from noise to data.

    Args:
        steps: how many; None for all steps of a discrete chain.
        clip: whether estimates of the data are clamped to [-1, 1] where the data are images.
        trajectory: whether all states are returned too.
    """

    stochastic: bool

    def __init__(self, steps: int | None = None, clip: bool = True, trajectory: bool = False):
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        self.steps, self.clip, self.trajectory = steps, clip, trajectory

    @abstractmethod
    def states(self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Walk:
        """Walk from standard normal noise, (n, *shape), to data, and yield each state with the evaluations so far.

        Raises:
            ValueError: where this sampler cannot walk along the denoiser's path, before the first state.
        """

    @torch.no_grad()
    def __call__(
        self, denoiser: Denoiser, n: int, y: Tensor | None = None, rng: torch.Generator | None = None
    ) -> Samples:
        """Draw ``n`` samples.

        Raises:
            ValueError: for a stochastic sampler on a path whose noise is paired with its data.
        """
        if self.stochastic and not denoiser.path.independent:
            raise ValueError(f"{type(self).__name__} is stochastic: a path with paired noise needs an ODE sampler")
        noise = randn((n, *denoiser.shape), rng=rng, device=denoiser.device, dtype=denoiser.dtype)
        visited = []
        for x, nfe in self.states(denoiser, noise, y, rng):  # noqa: B007
            if self.trajectory:
                visited.append(x)
        return Samples(x, nfe, torch.stack(visited) if self.trajectory else None)


Walk = Iterator[tuple[Tensor, int]]


class Chain(Sampler):
    """A sampler that walks down a list of times, by default the schedule's own, from the prior to the data."""

    rho: float | None = None  # where given, the times are spread over the rho-th root of sigma/alpha instead

    def times(self, schedule: Schedule) -> Tensor:
        """List the times that are visited, from noise to data, float64."""
        if self.rho is None or self.steps is None:
            return schedule.times(self.steps)
        return torch.cat(
            [schedule.time_of(karras_sigmas(schedule, self.steps, self.rho, RATIO_MAX)), torch.zeros(1).double()]
        )

    def states(self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Walk:
        schedule = denoiser.path.schedule
        chain = chain_coefficients(denoiser.path, self.times(schedule))
        denoise = CountedDenoiser(denoiser, y, self.clip, chain, noise)
        # A thinned chain begins somewhat before the prior, and takes its noise all the same, as is the custom.
        x = initial_state(schedule, noise, min(schedule.t_first, schedule.t_max) if self.rho is None else chain[0].t)
        yield x, 0
        for state in self.walk(denoise, x, chain, rng):
            yield state, denoise.nfe

    @abstractmethod
    def walk(
        self, denoise: CountedDenoiser, x: Tensor, chain: list[StepCoefficients], rng: torch.Generator | None
    ) -> Iterator[Tensor]:
        """Yield the state after each step."""


class Ancestral(Chain):
    """DDPM's sampler: draw from the reverse chain, without noise at the last step (Ho et al. 2020, algorithm 2).

    Args:
        variance: of a reverse step, "fixedlarge" for the forward variance, "fixedsmall" for the posterior's, "learned" for
            what the denoiser predicts.
        steps, clip, trajectory: as in ``Sampler``.
    """

    stochastic = True

    def __init__(
        self,
        variance: Variance = "fixedlarge",
        steps: int | None = None,
        clip: bool = True,
        trajectory: bool = False,
    ):
        super().__init__(steps, clip, trajectory)
        if variance not in ("fixedlarge", "fixedsmall", "learned"):
            raise ValueError(f"variance must be fixedlarge, fixedsmall or learned, not {variance!r}")
        self.variance = variance

    def walk(
        self, denoise: CountedDenoiser, x: Tensor, chain: list[StepCoefficients], rng: torch.Generator | None
    ) -> Iterator[Tensor]:
        for step in chain:
            x0, prediction = denoise(x, step)
            x = step.posterior_mean(x, x0)
            if not step.last:
                z = randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
                x += self.std(step, prediction) * z
            yield x

    def std(self, step: StepCoefficients, prediction: Prediction) -> Tensor | float:
        """Standard deviation of a reverse step."""
        if self.variance == "learned":
            if prediction.variance_share is None:
                raise ValueError("this denoiser has learned no variance: use variance=fixedlarge or fixedsmall")
            return torch.exp(0.5 * log_variance(step, prediction.variance_share))
        return (step.var_ts if self.variance == "fixedlarge" else step.posterior_var) ** 0.5


def log_variance(step: StepCoefficients, share: Tensor) -> Tensor:
    """Interpolate between the two fixed variances in their logarithms (Nichol, Dhariwal 2021, eq. 15)."""
    return share * math.log(step.var_ts) + (1 - share) * math.log(step.posterior_var)


class DDIM(Chain):
    """The implicit sampler: deterministic at ``eta = 0``, the ancestral one at ``eta = 1`` (Song et al. 2021, eq. 12).

    Args:
        eta: share of the posterior's standard deviation that is drawn anew at each step (eq. 16).
        steps, clip, trajectory: as in ``Sampler``.
    """

    def __init__(self, steps: int | None = 50, eta: float = 0.0, clip: bool = True, trajectory: bool = False):
        super().__init__(steps, clip, trajectory)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], not {eta}")
        self.eta = eta
        self.stochastic = eta > 0

    def walk(
        self, denoise: CountedDenoiser, x: Tensor, chain: list[StepCoefficients], rng: torch.Generator | None
    ) -> Iterator[Tensor]:
        for step in chain:
            x0, _ = denoise(x, step)
            drawn = self.eta**2 * step.posterior_var
            # With the noise beside the clipped estimate, so that x_t = alpha x0 + sigma eps stays true.
            x = step.renoised(x, x0, max(step.sigma_s**2 - drawn, 0.0) ** 0.5)
            if drawn > 0:
                x += drawn**0.5 * randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
            yield x


class DPMSolver(Chain):
    """DPM-Solver++(2M): a multistep solver of second order for the data's estimate in ``lambda = log(alpha/sigma)``.

        x_s = sigma_s/sigma_t x_t - alpha_s (e^{-h} - 1) D,    D = x0_t + h/(2 h') (x0_t - x0_t'),    h = lambda_s - lambda_t

    with ``t', h'`` of the step before (Lu et al. 2022, algorithm 2). The first step is of first order, and so is the last,
    whose h is infinite: it takes the estimate of the data. Steps that are even in the time of a noising path are very uneven
    in lambda near the data, where a rule of second order does worse than DDIM.

    Args:
        rho: spreads the steps evenly over the rho-th root of sigma/alpha; None for the schedule's own times.
        steps, clip, trajectory: as in ``Sampler``.
    """

    stochastic = False

    def __init__(self, steps: int = 20, rho: float | None = 7.0, clip: bool = True, trajectory: bool = False):
        super().__init__(steps, clip, trajectory)
        if rho is not None and rho < 1:
            raise ValueError(f"rho must be at least 1, or null for the schedule's own times, not {rho}")
        self.rho = rho

    def walk(
        self, denoise: CountedDenoiser, x: Tensor, chain: list[StepCoefficients], rng: torch.Generator | None
    ) -> Iterator[Tensor]:
        before: tuple[Tensor, float] | None = None
        for step in chain:
            x0, _ = denoise(x, step)
            if step.last:
                yield x0
                return
            h = math.log(step.alpha_s / step.sigma_s) - math.log(step.alpha_t / step.sigma_t)
            slope = x0 if before is None else torch.lerp(before[0], x0, 1 + h / (2 * before[1]))
            x = axpby(step.sigma_s / step.sigma_t, x, -step.alpha_s * math.expm1(-h), slope)
            before = x0, h
            yield x


class EulerMaruyama(Chain):
    """Euler's method for the reverse SDE, ``dx = (f x - g^2 score) dt + g dw`` (Song et al. 2021, eq. 6).

    ``f = alpha'/alpha`` and ``g^2 = 2 sigma sigma' - 2 f sigma^2`` are those of the one linear SDE that has the path's laws.
    The last step takes the estimate of the data.

    Args:
        steps, clip, trajectory: as in ``Sampler``.
    """

    stochastic = True

    def __init__(self, steps: int | None = 500, clip: bool = True, trajectory: bool = False):
        super().__init__(steps, clip, trajectory)

    def walk(
        self, denoise: CountedDenoiser, x: Tensor, chain: list[StepCoefficients], rng: torch.Generator | None
    ) -> Iterator[Tensor]:
        for step, after in zip(chain, [*(s.t for s in chain[1:]), 0.0], strict=True):
            x0, _ = denoise(x, step)
            if step.last:
                yield x0
                return
            sigma = step.sigma_t
            f = step.d_alpha_t / step.alpha_t
            g2 = 2 * sigma * step.d_sigma_t - 2 * f * sigma**2
            dt = step.t - after
            z = randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
            x = axpby(1 - dt * f, x, -dt * g2 / sigma, step.eps(x, x0)).add_(z, alpha=(g2 * dt) ** 0.5)
            yield x


class PredictorCorrector(Chain):
    """A step of the reverse diffusion, then steps of Langevin's dynamics at the same noise (Song et al. 2021, algorithm 1).

        predictor:  x <- (2 - alpha_ts) x + var_ts score + sqrt(var_ts) z                    (eq. 46, reverse diffusion)
        corrector:  x <- x + e score + sqrt(2 e) z,    e = 2 alpha_ts^2 (snr |z| / |score|)^2        (algorithm 4, 5)

    The authors take the norms' means over the batch, which makes a sample depend on its neighbours. ``norms="expected"`` puts
    what they come to in high dimension, ``|z| = sqrt(D)`` and ``|score| = sqrt(D)/sigma``, so that
    ``e = 2 (alpha_ts snr sigma)^2``; a sample's own norms are an option too, but in few dimensions a score may vanish.

    Args:
        snr: signal-to-noise ratio of the corrector.
        corrector_steps: after each predictor; 0 for the reverse diffusion alone.
        norms: "expected", "sample" or "batch", see above.
        steps, clip, trajectory: as in ``Sampler``.
    """

    stochastic = True

    def __init__(
        self,
        steps: int | None = 500,
        snr: float = 0.16,
        corrector_steps: int = 1,
        norms: Literal["expected", "sample", "batch"] = "expected",
        clip: bool = True,
        trajectory: bool = False,
    ):
        super().__init__(steps, clip, trajectory)
        if snr <= 0 or corrector_steps < 0:
            raise ValueError(f"snr must be positive and corrector_steps not negative, not {snr} and {corrector_steps}")
        if norms not in ("expected", "sample", "batch"):
            raise ValueError(f"norms must be expected, sample or batch, not {norms!r}")
        self.snr, self.corrector_steps, self.norms = snr, corrector_steps, norms

    def walk(
        self, denoise: CountedDenoiser, x: Tensor, chain: list[StepCoefficients], rng: torch.Generator | None
    ) -> Iterator[Tensor]:
        for step, after in zip(chain, [*chain[1:], None], strict=True):
            x0, _ = denoise(x, step)
            if after is None:
                yield x0
                return
            z = randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
            x = axpby(2 - step.alpha_t / step.alpha_s, x, -step.var_ts / step.sigma_t, step.eps(x, x0))
            x.add_(z, alpha=step.var_ts**0.5)
            for _ in range(self.corrector_steps):
                score = -after.eps(x, denoise(x, after)[0]) / after.sigma_t
                z = randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
                # The share of the signal that one step keeps, 1 - beta: one where variance explodes.
                kept = (step.alpha_t / step.alpha_s) ** 2
                size = 2 * kept * (self.snr * self._ratio(z, score, after.sigma_t)) ** 2
                x = x + size * score + (2 * size) ** 0.5 * z
            yield x

    def _ratio(self, z: Tensor, score: Tensor, sigma: float) -> Tensor | float:
        """Return |z| / |score|."""
        if self.norms == "expected":
            return sigma
        z_norm, score_norm = (v.flatten(1).norm(dim=1) for v in (z, score))
        ratio = z_norm.mean() / score_norm.mean() if self.norms == "batch" else z_norm / score_norm
        return ratio.view(-1, *[1] * (z.ndim - 1))


class Solver(Sampler):
    """A sampler that integrates the probability-flow ODE in steps of a fixed method.

    In time coordinates steps are equal. In the ratio r = sigma/alpha they are spread evenly over ``r^{1/rho}`` from the
    prior's, but at most ``ratio_max``, down to the schedule's last, from where Euler's step to r = 0 takes the estimate of
    the data (Karras et al. 2022, eq. 5).

    Args:
        steps: how many.
        rho: see above; 7 as Karras et al. found best.
        ratio_max: where to start; beyond 80 data on [-1, 1] have vanished in the noise.
        clip: whether the result is clamped to [-1, 1] where the data are images; the ODE on the way is left smooth.
        trajectory: as in ``Sampler``.
    """

    stochastic = False
    halfway = False  # whether a step asks for the drift halfway too

    def __init__(
        self,
        steps: int = 18,
        rho: float = 7.0,
        ratio_max: float = RATIO_MAX,
        clip: bool = True,
        trajectory: bool = False,
    ):
        super().__init__(steps, clip, trajectory)
        if rho < 1 or ratio_max <= 0:
            raise ValueError(f"rho must be at least 1 and ratio_max positive, not {rho} and {ratio_max}")
        self.rho, self.ratio_max = rho, ratio_max

    def grid(self, ode: ProbabilityFlowODE) -> list[float]:
        """List the values of the ODE's variable, from noise to data, steps + 1 numbers ending at 0."""
        assert self.steps is not None
        if ode.in_time:
            return torch.linspace(1, 0, self.steps + 1, dtype=torch.float64).tolist()
        return [*karras_sigmas(ode.schedule, self.steps, self.rho, self.ratio_max).tolist(), 0.0]

    def states(self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Walk:
        ode = ProbabilityFlowODE(denoiser, y)
        grid = self.grid(ode)
        halfway = [(u + v) / 2 for u, v in itertools.pairwise(grid)] if self.halfway else []
        scales = ode.visit([*grid, *halfway], noise)
        x = initial_state(denoiser.path.schedule, noise, ode.time_at(grid[0]))
        yield x, 0
        z = x / scales[0]
        for (u, v), scale in zip(itertools.pairwise(grid), scales[1:], strict=False):
            z = self.step(ode, z, u, v)
            x = z if ode.in_time else scale * z
            if v == 0 and self.clip and denoiser.levels is not None:
                x = x.clamp(-1, 1)
            yield x, ode.nfe

    @abstractmethod
    def step(self, ode: ProbabilityFlowODE, z: Tensor, u: float, v: float) -> Tensor:
        """Go from the variable's value u to v."""


class Euler(Solver):
    """Euler's method, of first order; on a diffusion's path its steps are DDIM's."""

    def step(self, ode: ProbabilityFlowODE, z: Tensor, u: float, v: float) -> Tensor:
        return torch.add(z, ode.drift(u, z), alpha=v - u)


class Midpoint(Solver):
    """The midpoint method, of second order: two evaluations a step."""

    halfway = True

    def step(self, ode: ProbabilityFlowODE, z: Tensor, u: float, v: float) -> Tensor:
        slope = ode.drift(u, z)
        if v == 0 and not ode.in_time:
            return torch.add(z, slope, alpha=v - u)
        middle = torch.add(z, slope, alpha=(v - u) / 2)
        return torch.add(z, ode.drift((u + v) / 2, middle), alpha=v - u)


class Heun(Solver):
    """Heun's method, the trapezoidal rule with Euler's predictor, of second order: two evaluations a step.

    In the ratio's coordinates the last step, to r = 0, is Euler's, so that N steps take 2N - 1 evaluations (Karras et al.
    2022, algorithm 1).
    """

    def step(self, ode: ProbabilityFlowODE, z: Tensor, u: float, v: float) -> Tensor:
        slope = ode.drift(u, z)
        ahead = torch.add(z, slope, alpha=v - u)
        if v == 0 and not ode.in_time:
            return ahead
        return torch.add(z, slope + ode.drift(v, ahead), alpha=(v - u) / 2)


class AdaptiveODE(Sampler):
    """The probability-flow ODE to a tolerance, by Dormand and Prince's method, each sample at its own pace.

    Rejected steps count as evaluations; what is reported is the count of the slowest sample of the batch. On a
    diffusion's path the ODE ends at the schedule's last time, and the estimate of the data is taken there.

    Args:
        rtol, atol: of the solver.
        clip: whether the result is clamped to [-1, 1] where the data are images.
        trajectory: whether the first and the last state are returned too.
        steps: taken so that a grid of samplers and steps may hold this one; it chooses its own, and nothing depends on it.
    """

    stochastic = False

    def __init__(
        self,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        clip: bool = True,
        trajectory: bool = False,
        steps: int | None = None,
    ):
        super().__init__(None, clip, trajectory)
        if rtol <= 0 or atol <= 0:
            raise ValueError(f"rtol and atol must be positive, not {rtol} and {atol}")
        self.rtol, self.atol = rtol, atol

    def states(self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Walk:
        ode = ProbabilityFlowODE(denoiser, y)
        first, last = ode.ends[1], 0.0 if ode.in_time else ode.variable(ode.schedule.t_last)
        x = initial_state(denoiser.path.schedule, noise, ode.time_at(first))
        yield x, 0
        x = ode.solve(x / ode.scales([first])[0], first, last, self.rtol, self.atol)
        if not ode.in_time:
            x = x - last * ode.drift(last, x)  # at r = 0 the state is x itself
        yield (x.clamp(-1, 1) if self.clip and denoiser.levels is not None else x), ode.nfe
