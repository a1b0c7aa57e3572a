r"""Denoising diffusion probabilistic models.

A forward chain of T steps diffuses data into noise, ``x_t = alpha_t x + sigma_t eps`` with ``alpha_t^2 + sigma_t^2 = 1``. The
model is a reverse chain of Gaussian steps, whose means follow from a network's prediction of the noise,

    p(x_s | x_t) = N(mean of q(x_s | x_t, x0), v_t I),    x0 = (x_t - sigma_t eps(x_t, t)) / alpha_t.

Training minimises the simple loss of eq. 14, the mean squared error of the noise at uniform times,

    L_simple = E_{t, x, eps} |eps - eps_theta(alpha_t x + sigma_t eps, t)|^2

a reweighted variational bound. ``log_prob`` estimates the bound itself (eq. 5), for images with x0 clamped to [-1, 1]; losses
do not clamp, which would zero gradients:

    -log p(x) <= KL(q(x_T | x) || N(0, I)) + sum_{i=1}^{T-1} E KL(q(x_{i-1} | x_i, x) || p(x_{i-1} | x_i)) - E log p(x | x_0)

**Improved DDPM** learns the variance too. The second half of the network's output, w in [-1, 1], interpolates between the two
fixed choices,

    log v_t = s log beta_t + (1 - s) log (posterior variance),    s = (w + 1)/2,

of which L_simple is independent. The hybrid objective adds a term of the bound, with a stop-gradient on the mean: ``L_simple +
T/1000 L_i``, L_i in bits/dim. The bound may also be the objective (vlb); its terms differ by orders of magnitude, so that
importance sampling draws times in proportion to ``sqrt(E L_i^2)``, estimated from the last losses at each time.

References:
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239.
    Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, https://arxiv.org/abs/2102.09672 (eq. 15-18).
    Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022,
    https://arxiv.org/abs/2202.00512 (x0- and v-prediction).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from genzoo.conditions import Condition, DropRate
from genzoo.diffusion.denoiser import Denoiser, call_network
from genzoo.diffusion.path import GaussianPath, Prediction
from genzoo.diffusion.samplers import DDIM, Sampler
from genzoo.diffusion.samplers.chain import StepCoefficients, chain_coefficients
from genzoo.diffusion.schedules import DiscreteSchedule, LinearSchedule
from genzoo.distributions.discretization import bin_center, log_density, to_bin_centers
from genzoo.distributions.divergences import kl_normal
from genzoo.distributions.likelihoods import discretized_gaussian_log_mass
from genzoo.event import EventSpec
from genzoo.model import Bound, LogProb, Loss, Markov, Samples
from genzoo.nn import defaults
from genzoo.numerics import distributed
from genzoo.numerics.constants import Constant
from genzoo.numerics.random import categorical, randint, randn


def geometric_strata(T: int, count: int) -> list[tuple[int, int]]:
    """Partition 0..T-1 into at most ``count`` ranges [start, stop): index 0 alone, then geometrically growing ranges."""
    edges = [0, 1]
    for left in range(min(count, T) - 1, 0, -1):
        edges.append(max(edges[-1] + 1, round(edges[-1] * (T / edges[-1]) ** (1 / left))))
    return list(itertools.pairwise(edges))


class DDPM(Markov, Denoiser):
    """A denoising diffusion probabilistic model.

    Args:
        network: factory of the network, called as ``network(in_shape, out_shape, condition)``, for ``(x_t, t, y)``.
        event, condition: as in ``GenerativeModel``.
        schedule: of the chain; linear with 1000 steps by default.
        prediction: parameterization of the network's output.
        variance: v_t of a reverse step: "fixedlarge", beta_t, "fixedsmall", that of the posterior, or "learned".
        objective: "simple", "hybrid", for a learned variance, or "vlb", the variational bound.
        importance: whether to draw training times by loss-based importance sampling.
        condition_dropout: probability of replacing a condition by the null value, for classifier-free guidance; for several
            conditions also one for each.
        sampler: default sampler; DDIM with 50 steps by default.
    """

    bound = Bound.LOWER
    num_samples = 20

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., nn.Module] = defaults.denoiser,
        schedule: DiscreteSchedule | None = None,
        prediction: Literal["eps", "x0", "v"] = "eps",
        variance: Literal["fixedlarge", "fixedsmall", "learned"] = "fixedlarge",
        objective: Literal["simple", "hybrid", "vlb"] = "simple",
        importance: bool = False,
        condition_dropout: DropRate = 0.1,
        sampler: Sampler | None = None,
    ):
        super().__init__(event, condition, condition_dropout)
        if prediction not in ("eps", "x0", "v"):
            raise ValueError(f"prediction must be eps, x0 or v, not {prediction!r}")
        if variance not in ("fixedlarge", "fixedsmall", "learned"):
            raise ValueError(f"variance must be fixedlarge, fixedsmall or learned, not {variance!r}")
        if objective not in ("simple", "hybrid", "vlb"):
            raise ValueError(f"objective must be simple, hybrid or vlb, not {objective!r}")
        if (objective == "hybrid") != (variance == "learned") and objective != "vlb":
            raise ValueError(
                f"variance={variance} is incompatible with objective={objective}: a learned variance needs hybrid or vlb"
            )
        channels, *sides = self.shape
        self.network = network(self.shape, ((2 if variance == "learned" else 1) * channels, *sides), condition)
        self.schedule = schedule or LinearSchedule()
        self.chain_length = self.schedule.num_steps
        self.path = GaussianPath(self.schedule)
        self.prediction, self.variance = prediction, variance
        self.objective = objective
        self.history = LossHistory(self.schedule.num_steps) if importance else None
        self.sampler = sampler or DDIM()
        # Coefficients of every step of the chain, row i for index i, float64.
        chain = chain_coefficients(self.path, self.schedule.times())[::-1]
        self._chain = Constant(torch.tensor(chain, dtype=torch.float64))
        # The posterior variance of index 0 is 0: it is replaced by the next one, as in the code of Ho et al.
        self._variance_floor = chain[1].posterior_var

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        output = call_network(self.network, x_t, t, y)
        if self.variance != "learned":
            return Prediction(self.prediction, output)
        mean, w = output.chunk(2, dim=1)
        return Prediction(self.prediction, mean, (w + 1) / 2)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        x = x if self.levels is None else to_bin_centers(x, self.levels)
        y = self.conditioner.drop(y, rng)
        T = self.schedule.num_steps
        if self.history is None:
            index, weight = randint(T, (len(x),), rng=rng, device=x.device), None
        else:
            index, weight = self.history.sample(len(x), rng)
        t = (index + 1).double() / T
        eps = randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
        x_t = self.path.sample(x, eps, t)
        prediction = self.predict(x_t, t, y)
        target = self.path.target(self.prediction, x, eps, t)
        mse = (prediction.mean - target).square().flatten(1).mean(1)
        terms, losses = {"mse": mse}, mse
        if self.objective != "simple":
            if self.objective == "hybrid":
                prediction = prediction._replace(mean=prediction.mean.detach())
            terms["vlb"] = self._vlb_term(x, x_t, index, prediction, clip=False) / (self.dim * math.log(2))
            losses = terms["vlb"] * T / 1000 + (mse if self.objective == "hybrid" else 0.0)
        aux: dict[str, Tensor] = {}
        if weight is not None:
            record = {"index": index, "losses": losses}
            if self.training:
                aux = {name: distributed.all_gather(value.detach()).flatten() for name, value in record.items()}
            losses = weight.to(losses.dtype) * losses
        return Loss(losses.mean(), {name: values.detach().mean() for name, values in terms.items()}, aux)

    @torch.no_grad()
    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        if self.history is not None:
            self.history.update(aux["index"], aux["losses"])
        return {}

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        return self.sampler(self, n, y, rng)

    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        """Estimate the variational bound without bias from ``num_samples`` of its T terms, by stratified sampling.

        The strata are index 0, by far the largest term, and ``num_samples/2 - 1`` geometrically growing ranges, as the terms
        decay. Two terms are drawn per stratum; their difference estimates the variance.

        Args:
            x, y, rng: as in ``Density``.
            num_samples: network evaluations per event, even and at least 4.

        Raises:
            ValueError: for an odd ``num_samples``, or below 4.
        """
        if num_samples < 4 or num_samples % 2:
            raise ValueError(f"num_samples must be even and at least 4, not {num_samples}")
        x = x if self.levels is None else to_bin_centers(x, self.levels)
        B = len(x)
        value = -self._prior_kl(x)
        variance = torch.zeros_like(value)
        for start, stop in geometric_strata(self.schedule.num_steps, num_samples // 2):
            first, second = (
                self._sampled_vlb_term(x, y, start + randint(stop - start, (B,), rng=rng, device=x.device), rng)
                for _ in range(2)
            )
            value = value - (stop - start) * (first + second) / 2
            variance = variance + ((stop - start) * (first - second) / 2) ** 2
        return LogProb(value, variance.sqrt())

    def _prior_kl(self, x: Tensor) -> Tensor:
        """KL(q(x_T | x) || N(0, I)) of each event."""
        c = self.schedule.at(torch.ones((), device=x.device))
        return kl_normal(c.alpha.to(x) * x, (2 * c.sigma.log()).to(x).expand_as(x)).flatten(1).sum(1)

    def _sampled_vlb_term(self, x: Tensor, y: Tensor | None, index: Tensor, rng: torch.Generator | None) -> Tensor:
        """Draw x_t, and return a term of the bound for each event."""
        t = (index + 1).double() / self.schedule.num_steps
        x_t = self.path.sample(x, randn(x.shape, rng=rng, device=x.device, dtype=x.dtype), t)
        return self._vlb_term(x, x_t, index, self.predict(x_t, t, y), clip=self.levels is not None)

    def _vlb_term(self, x: Tensor, x_t: Tensor, index: Tensor, prediction: Prediction, *, clip: bool) -> Tensor:
        """Return a term of the bound for each event, at ``index``, (B,): a KL, or -log p(x | x_0) at index 0.

        ``clip`` clamps the estimate of the data to [-1, 1], as samplers do: for reported bounds, not for losses, since
        a clamped pixel has no gradient (as in the code of Nichol and Dhariwal).
        """
        chain = self._chain.on(x.device)[index].to(x.dtype).view(len(x), -1, *[1] * (x.ndim - 1))
        _, _, _, _, sigma_t, alpha_s, _, var_ts, posterior_var, _, _ = chain.unbind(1)  # the fields of StepCoefficients
        t = (index + 1).double() / self.schedule.num_steps
        x0 = self.path.convert(prediction, x_t, t, "x0")
        if clip:
            x0 = x0.clamp(-1, 1)
        # The means differ in x0 alone.
        gap = alpha_s * var_ts / sigma_t**2 * (x - x0)
        first = (index == 0).view(sigma_t.shape)
        posterior = torch.where(first, self._variance_floor, posterior_var).log().expand_as(x)
        large = torch.where(first, self._variance_floor, var_ts).log()
        log_var = self._log_var(posterior, large, var_ts.log(), prediction)
        kl = kl_normal(gap, posterior, 0.0, log_var).flatten(1).sum(1)
        if self.levels is None:
            nll = 0.5 * ((x - x0) ** 2 * torch.exp(-log_var) + math.log(2 * math.pi) + log_var).flatten(1).sum(1)
        else:
            # At other indices the mass may underflow, and the gradient of the unused branch be NaN.
            mean = torch.where(first, x0, x)
            log_mass = discretized_gaussian_log_mass(x, mean, log_var, self.levels).flatten(1).sum(1)
            nll = -log_density(log_mass, self.dim, self.levels)
        return torch.where(index == 0, nll, kl)

    def _log_var(self, posterior: Tensor, large: Tensor, forward: Tensor, prediction: Prediction) -> Tensor:
        """Log variance of a reverse step, (B, *shape); ``large`` is that of the forward step, at index 0 of the posterior."""
        if prediction.variance_weight is not None:
            return prediction.variance_weight * forward + (1 - prediction.variance_weight) * posterior
        return large.expand_as(posterior) if self.variance == "fixedlarge" else posterior

    def check_compressible(self) -> None:
        """Accept all images, whose decoder has probabilities of levels."""

    def forward_step(self, i: int) -> tuple[float, float]:
        c = self._coefficients(i)
        return c.alpha_t / c.alpha_s, math.sqrt(c.var_ts)

    def backward_step(self, i: int, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        x0, log_var = self._reverse(i, x, y)
        return self._coefficients(i).posterior_mean(x, x0), 0.5 * log_var

    def level_log_probs(self, x: Tensor, y: Tensor | None) -> Tensor:
        assert self.levels is not None
        x0, log_var = self._reverse(0, x, y)
        every = torch.arange(self.levels, device=x.device).view(1, -1, *[1] * (x.ndim - 1))
        centers = bin_center(every, self.levels, x.dtype)
        return discretized_gaussian_log_mass(centers, x0[:, None], log_var[:, None], self.levels)

    def _coefficients(self, i: int) -> StepCoefficients:
        """Return the coefficients of the step from index i to the state before it."""
        return StepCoefficients(*self._chain.value[i].tolist())

    def _reverse(self, i: int, x_t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the clamped estimate of the data and the log variance of the reverse step at an index, (n, *shape)."""
        c = self._coefficients(i)
        t = torch.full((len(x_t),), (i + 1) / self.schedule.num_steps, dtype=torch.float64, device=x_t.device)
        prediction = self.predict(x_t, t, y)
        x0 = self.path.convert(prediction, x_t, t, "x0").clamp(-1, 1)
        variances = (self._variance_floor, self._variance_floor) if i == 0 else (c.posterior_var, c.var_ts)
        posterior, large, forward = (x0.new_tensor(variance).log() for variance in (*variances, c.var_ts))
        return x0, self._log_var(posterior.expand_as(x0), large, forward, prediction)


class LossHistory(nn.Module):
    """Importance sampling of times in proportion to the root mean square of their last losses.

    Times are uniform until each has ``LAST`` losses (Nichol, Dhariwal 2021, eq. 18).
    """

    LAST = 10
    UNIFORM_WEIGHT = 1e-3  # mixture weight of the uniform distribution

    losses: Tensor
    counts: Tensor

    def __init__(self, num_steps: int):
        super().__init__()
        self.register_buffer("losses", torch.zeros(num_steps, self.LAST, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_steps, dtype=torch.int64))

    def probs(self) -> Tensor:
        """Return the probability of each index, (T,) float64."""
        T = len(self.counts)
        weights = self.losses.double().square().mean(1).sqrt()
        probs = (1 - self.UNIFORM_WEIGHT) * weights / weights.sum() + self.UNIFORM_WEIGHT / T
        # A branch would synchronise with the device.
        return torch.where((self.counts < self.LAST).any(), 1 / T, probs)

    def sample(self, n: int, rng: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw ``n`` indices and their importance weights."""
        probs = self.probs()
        index = categorical(probs, n, rng=rng)
        return index, 1 / (len(probs) * probs[index])

    def update(self, index: Tensor, losses: Tensor) -> None:
        """Record the losses at some indices, (B,), (B,); the newest replace the oldest."""
        i, order = index.sort(stable=True)  # grouped by index, the oldest first
        begin, end = torch.searchsorted(i, i), torch.searchsorted(i, i, right=True)
        place = torch.arange(len(i), device=i.device)
        slot = i * self.LAST + (self.counts[i] + place - begin) % self.LAST
        # Beyond ``LAST`` per index only the last are kept; the others go to the discarded extra slot.
        slot = torch.where(end - place <= self.LAST, slot, self.losses.numel())
        flat = torch.cat([self.losses.flatten(), self.losses.new_zeros(1)])
        flat.scatter_(0, slot, losses.to(self.losses)[order])
        self.losses.copy_(flat[:-1].view_as(self.losses))
        self.counts.index_add_(0, index, torch.ones_like(index))
