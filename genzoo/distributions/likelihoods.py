r"""Likelihoods p(x | params), parameterised by the output of a network.

The output, (B, P, ...), has ``P = num_params(C)`` parameters for the C channels of each pixel of an event, (B, C, ...). Pixels
are conditionally independent. Log densities are with respect to Lebesgue measure on the data: a discrete probability P counts
as log P + D log(K/2) (see ``genzoo.distributions.discretization``).

Channels are independent too, except in ``Categorical`` and ``LogisticMixture``, which chain them: red, green given red, blue
given both.

References:
    Salimans, Karpathy, Chen, Kingma, "PixelCNN++", 2017, https://arxiv.org/abs/1701.05517 (eq. 2, discretised logistic
    mixture; eq. 3, chained channels).
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239 (eq. 13,
    discretised Gaussian).
    van den Oord, Kalchbrenner, Kavukcuoglu, "Pixel Recurrent Neural Networks", 2016, https://arxiv.org/abs/1601.06759
    (section 2.2, softmax over the levels).
    Bishop, "Mixture density networks", 1994, https://publications.aston.ac.uk/id/eprint/373/.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.distributions.discretization import bin_center, log_density, quantize, to_bin_centers
from genzoo.numerics.clamping import projected_clamp
from genzoo.numerics.precision import cumulative_sum
from genzoo.numerics.random import rand, randn

LOG_SCALE_MIN = -7.0


class Likelihood(nn.Module, ABC):
    """The distribution of an event given ``num_params(C)`` parameters per pixel."""

    levels: int | None = None  # of a discrete likelihood; None for a density

    @abstractmethod
    def num_params(self, channels: int) -> int:
        """Return the number of parameters per pixel."""

    @abstractmethod
    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Return the log density of each event, (B, num_params(C), ...) and (B, C, ...) -> (B,)."""

    @abstractmethod
    def location(self, params: Tensor) -> Tensor:
        """Return the mean, (B, C, ...), differentiable in the parameters."""

    def mean(self, params: Tensor) -> Tensor:
        """Return the mean, (B, C, ...); for discrete likelihoods rounded to a bin center."""
        location = self.location(params)
        return location if self.levels is None else to_bin_centers(location, self.levels)

    @abstractmethod
    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Draw samples, (B, C, ...)."""

    def next_log_probs(self, params: Tensor, before: Tensor) -> Tensor:
        """Return the log probabilities of the levels of the next channel, given the channels before it.

        Args:
            params: (B, P, ...).
            before: values of the preceding channels, (B, c, ...), c = 0 for the first.

        Returns:
            (B, K, ...).

        Raises:
            ValueError: for a density, whose values have no probabilities.
        """
        raise ValueError(f"{type(self).__name__} has no probabilities of levels")

    def sample_guided(self, params: Tensor, reference: Tensor, scale: float, rng: torch.Generator | None) -> Tensor:
        """Draw samples, (B, C, ...), with guided log probabilities, ``u + s (c - u)`` up to normalisation.

        Args:
            params: of the conditional distribution c, (B, P, ...).
            reference: of the unconditional distribution u, (B, P, ...).
            scale: s.
            rng: source of randomness.

        Raises:
            ValueError: for a density.
        """
        u = rand((len(params), self.channels(params), *params.shape[2:]), rng=rng, device=params.device)
        x = params[:, :0]
        for c in range(u.shape[1]):
            conditional, unconditional = (self.next_log_probs(p, x) for p in (params, reference))
            k = draw_index(unconditional + scale * (conditional - unconditional), u[:, c : c + 1])
            assert self.levels is not None
            x = torch.cat([x, bin_center(k, self.levels, params.dtype)], dim=1)
        return x

    def check(self, levels: int | None) -> None:
        """Check the number of levels of the data; a density applies to any.

        Raises:
            ValueError: for a discrete likelihood with another number of levels.
        """
        if self.levels not in (None, levels):
            raise ValueError(f"the likelihood has {self.levels} levels, the data levels={levels}")

    def check_discrete(self) -> None:
        """Check that values have probabilities.

        Raises:
            ValueError: for a density.
        """
        if self.levels is None:
            raise ValueError(f"{type(self).__name__} has no probabilities of levels")

    def encoder_input(self, x: Tensor) -> Tensor:
        """Return the input of an encoder: for a discrete likelihood x without dequantisation noise.

        A posterior that depended on the noise would not give a bound.
        """
        return x if self.levels is None else to_bin_centers(x, self.levels)

    def channels(self, params: Tensor) -> int:
        """Return the number of channels of the event, from that of the parameters."""
        return next(c for c in itertools.count(1) if self.num_params(c) >= params.shape[1])


def _precise(params: Tensor) -> Tensor:
    """Cast the output of a network to float32 or better, for sums of many terms."""
    return params if params.dtype == torch.float64 else params.float()


def _levels(levels: int | None) -> int:
    """Reject data without levels."""
    if levels is None:
        raise ValueError("a discrete likelihood needs data with levels: use a Gaussian one for real vectors")
    return levels


def _summed(log_p: Tensor) -> Tensor:
    """Sum over pixels, (B, ...) -> (B,); a vector is a single pixel without dimensions."""
    return log_p.reshape(len(log_p), math.prod(log_p.shape[1:])).sum(1)


def _all_levels(levels: int, like: Tensor, dim: int = 1) -> Tensor:
    """Return all levels along a dimension, (1, ..., K, ..., 1), to broadcast with a tensor."""
    return torch.arange(levels, device=like.device).view([levels if i == dim else 1 for i in range(like.ndim)])


def draw_index(logits: Tensor, u: Tensor) -> Tensor:
    """Sample a categorical over dimension 1 by inversion, logits (B, K, ...) and uniform u (B, 1, ...) -> (B, 1, ...)."""
    cdf = cumulative_sum(logits.double().softmax(1), 1)
    below = cdf <= u * cdf[:, -1:]
    return below.sum(1, keepdim=True).clamp_(max=logits.shape[1] - 1)


def _logistic(u: Tensor) -> Tensor:
    """Transform uniform to standard logistic noise, with clamped tails."""
    u = u.clamp(1e-5, 1 - 1e-5)
    return torch.log(u) - torch.log1p(-u)


def _chained(own: Tensor, slopes: Tensor, before: Tensor) -> Tensor:
    """Shift the parameters of channel c by the c channels before it, (B, M, C, ...), (B, 1 or M, c, ...) -> (B, M, ...)."""
    c = before.shape[2]
    start = c * (c - 1) // 2
    return own[:, :, c] + (slopes[:, :, start : start + c] * before).sum(2)


class Gaussian(Likelihood):
    """A Gaussian with a single learned log variance, or with ``per_element`` one predicted per element."""

    def __init__(self, per_element: bool = False, log_var: float = 0.0):
        super().__init__()
        self.log_var = None if per_element else nn.Parameter(torch.tensor(float(log_var)))

    def num_params(self, channels: int) -> int:
        return channels if self.log_var is not None else 2 * channels

    def _moments(self, params: Tensor) -> tuple[Tensor, Tensor]:
        if self.log_var is not None:
            return params, self.log_var.expand_as(params)
        mean, log_var = params.chunk(2, dim=1)
        return mean, projected_clamp(log_var, 2 * LOG_SCALE_MIN)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        mean, log_var = self._moments(_precise(params))
        return -0.5 * ((x - mean) ** 2 * torch.exp(-log_var) + log_var + math.log(2 * math.pi)).flatten(1).sum(1)

    def location(self, params: Tensor) -> Tensor:
        return self._moments(params)[0]

    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        mean, log_var = self._moments(params)
        return mean + torch.exp(0.5 * log_var) * randn(mean.shape, rng=rng, device=mean.device, dtype=mean.dtype)


def logistic_log_mass(k: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    r"""Log probability of each level under a discretised logistic, elementwise.

        P(k) = s((x_k + 1/K - mu)/b) - s((x_k - 1/K - mu)/b),    s the logistic function, x_k the centre of bin k

    The first and the last bin reach to infinity.

    Args:
        k: levels, int64; broadcasts with the others.
        mean: mu.
        log_scale: log b.
        levels: K.
    """
    centre = bin_center(k, levels, mean.dtype)
    inverse = torch.exp(-log_scale)
    upper = (centre + 1 / levels - mean) * inverse
    lower = (centre - 1 / levels - mean) * inverse
    # log(s(u) - s(l)) = log s(u) + log s(-l) + log(1 - e^(l - u)), exact in both tails.
    width = (2 / levels) * inverse
    first, last = F.logsigmoid(upper), F.logsigmoid(-lower)
    inner = first + last + torch.log(-torch.expm1(-width))
    return torch.where(k == 0, first, torch.where(k == levels - 1, last, inner))


class DiscretizedLogistic(Likelihood):
    """A discretised logistic of each element, with a predicted log scale of at least -7."""

    levels: int

    def __init__(self, levels: int):
        super().__init__()
        self.levels = _levels(levels)

    def num_params(self, channels: int) -> int:
        return 2 * channels

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        mean, log_scale = _precise(params).chunk(2, dim=1)
        log_mass = logistic_log_mass(
            quantize(x, self.levels), mean, projected_clamp(log_scale, LOG_SCALE_MIN), self.levels
        )
        return log_density(log_mass.flatten(1).sum(1), log_mass[0].numel(), self.levels)

    def next_log_probs(self, params: Tensor, before: Tensor) -> Tensor:
        c = before.shape[1]
        mean, log_scale = (part[:, c : c + 1] for part in _precise(params).chunk(2, dim=1))
        return logistic_log_mass(
            _all_levels(self.levels, mean), mean, projected_clamp(log_scale, LOG_SCALE_MIN), self.levels
        )

    def location(self, params: Tensor) -> Tensor:
        return params.chunk(2, dim=1)[0]

    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        mean, log_scale = params.chunk(2, dim=1)
        noise = _logistic(rand(mean.shape, rng=rng, device=mean.device, dtype=mean.dtype))
        return to_bin_centers(mean + torch.exp(log_scale.clamp(min=LOG_SCALE_MIN)) * noise, self.levels)


class LogisticMixture(Likelihood):
    r"""A mixture of discretised logistics, with one component per pixel and chained channels.

        P(r, g, b) = sum_m pi_m P(r | mu_r, s_r) P(g | mu_g + c_1 r, s_g) P(b | mu_b + c_2 r + c_3 g, s_b)

    with the parameters of component m, and c the hyperbolic tangent of an output.

    Args:
        levels: K.
        components: number of mixture components.
    """

    levels: int

    def __init__(self, levels: int, components: int = 10):
        super().__init__()
        if components < 1:
            raise ValueError(f"components must be at least 1, not {components}")
        self.levels, self.components = _levels(levels), components

    def num_params(self, channels: int) -> int:
        return self.components * (1 + 2 * channels + channels * (channels - 1) // 2)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return logits (B, M, 1, ...), means and log scales (B, M, C, ...) and coefficients (B, M, C(C-1)/2, ...)."""
        C = self.channels(params)
        params = _precise(params).unflatten(1, (self.components, -1))
        logits, mean, log_scale, coefficients = params.split([1, C, C, C * (C - 1) // 2], dim=2)
        return logits, mean, projected_clamp(log_scale, LOG_SCALE_MIN), torch.tanh(coefficients)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        logits, mean, log_scale, coefficients = self._split(params)
        k = quantize(x, self.levels)[:, None]
        centre = bin_center(k, self.levels, mean.dtype)
        mean = torch.stack([_chained(mean, coefficients, centre[:, :, :c]) for c in range(x.shape[1])], dim=2)
        log_mass = logistic_log_mass(k, mean, log_scale, self.levels).sum(2)
        log_mass = (logits.squeeze(2).log_softmax(1) + log_mass).logsumexp(1)
        return log_density(_summed(log_mass), x[0].numel(), self.levels)

    def next_log_probs(self, params: Tensor, before: Tensor) -> Tensor:
        logits, mean, log_scale, coefficients = self._split(params)
        before = before[:, None].to(mean.dtype)  # (B, 1, c, ...)
        c, log_weights = before.shape[2], logits.squeeze(2).log_softmax(1)
        for j in range(c):  # the preceding channels weight the components
            k = quantize(before[:, :, j], self.levels)
            located = _chained(mean, coefficients, before[:, :, :j])
            log_weights = log_weights + logistic_log_mass(k, located, log_scale[:, :, j], self.levels)
        mean, log_scale = _chained(mean, coefficients, before)[:, :, None], log_scale[:, :, c : c + 1]
        log_mass = logistic_log_mass(_all_levels(self.levels, mean, 2), mean, log_scale, self.levels)
        return (log_weights.log_softmax(1)[:, :, None] + log_mass).logsumexp(1)

    def location(self, params: Tensor) -> Tensor:
        """Return the mean of the locations, an approximation that ignores discretisation and truncation."""
        logits, mean, _, coefficients = self._split(params)
        x = mean[:, :, :0]
        for _ in range(mean.shape[2]):
            x = torch.cat([x, _chained(mean, coefficients, x).clamp(-1, 1)[:, :, None]], dim=2)
        return (logits.softmax(1) * x).sum(1).to(params.dtype)

    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        logits, *parameters = self._split(params)
        u = rand(logits[:, 0].shape, rng=rng, device=params.device)
        index = draw_index(logits.squeeze(2), u)[:, :, None]
        mean, log_scale, coefficients = (p.gather(1, index.expand(-1, -1, *p.shape[2:])) for p in parameters)
        noise = torch.exp(log_scale) * _logistic(rand(mean[:, 0].shape, rng=rng, device=params.device))[:, None]
        x = mean[:, :, :0]
        for c in range(mean.shape[2]):
            drawn = to_bin_centers(_chained(mean, coefficients, x) + noise[:, :, c], self.levels)
            x = torch.cat([x, drawn[:, :, None]], dim=2)
        return x.squeeze(1).to(params.dtype)


class Bernoulli(Likelihood):
    """A Bernoulli distribution of each element of a binary image.

    Other numbers of levels are rejected, since cross-entropy with grey values is not a likelihood.
    """

    def __init__(self, levels: int = 2):
        super().__init__()
        if levels != 2:
            raise ValueError(
                f"a Bernoulli likelihood needs binary images, levels=2, not {levels}: use a categorical one"
            )
        self.levels = levels

    def num_params(self, channels: int) -> int:
        return channels

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        sign = 2 * quantize(x, 2) - 1
        return log_density(F.logsigmoid(sign * _precise(params)).flatten(1).sum(1), x[0].numel(), 2)

    def next_log_probs(self, params: Tensor, before: Tensor) -> Tensor:
        logit = _precise(params)[:, before.shape[1]]
        return torch.stack([F.logsigmoid(-logit), F.logsigmoid(logit)], dim=1)

    def location(self, params: Tensor) -> Tensor:
        return 0.5 * torch.tanh(params / 2)

    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        u = rand(params.shape, rng=rng, device=params.device)
        return bin_center((u < torch.sigmoid(_precise(params))).long(), 2, params.dtype)


class Categorical(Likelihood):
    r"""A categorical distribution over levels, ordered or not.

    The channels of a pixel are chained: preceding ones shift the logits of channel c,

        P(k_c = k | k_0, ..., k_{c-1}) = softmax_k(l_ck + sum_{j<c} t_cjk x_j),    x_j the centre of bin k_j

    with logits l and slopes t predicted by the network. A discretised Gaussian of channel c with a mean linear in x has this
    form, with a slope proportional to k.
    """

    levels: int

    def __init__(self, levels: int):
        super().__init__()
        self.levels = _levels(levels)

    def num_params(self, channels: int) -> int:
        return self.levels * channels * (channels + 1) // 2

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, K, C, ...) and slopes (B, K, C(C-1)/2, ...)."""
        C = self.channels(params)
        logits, slopes = _precise(params).unflatten(1, (self.levels, -1)).split([C, C * (C - 1) // 2], dim=2)
        return logits, slopes

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        logits, slopes = self._split(params)
        k = quantize(x, self.levels)[:, None]
        centre = bin_center(k, self.levels, logits.dtype)
        logits = torch.stack([_chained(logits, slopes, centre[:, :, :c]) for c in range(x.shape[1])], dim=2)
        log_mass = logits.log_softmax(1).gather(1, k)
        return log_density(log_mass.flatten(1).sum(1), x[0].numel(), self.levels)

    def next_log_probs(self, params: Tensor, before: Tensor) -> Tensor:
        logits, slopes = self._split(params)
        return _chained(logits, slopes, before[:, None].to(logits.dtype)).log_softmax(1)

    def location(self, params: Tensor) -> Tensor:
        """Return the mean of each channel given the means of the preceding ones."""
        logits, slopes = self._split(params)
        centre = bin_center(torch.arange(self.levels, device=params.device), self.levels, logits.dtype)
        x = logits[:, :1, :0]
        for _ in range(logits.shape[2]):
            probs = _chained(logits, slopes, x).softmax(1)
            x = torch.cat([x, torch.einsum("bk...,k->b...", probs, centre)[:, None, None]], dim=2)
        return x.squeeze(1).to(params.dtype)

    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        logits, slopes = self._split(params)
        u = rand(logits[:, 0].shape, rng=rng, device=params.device)[:, None]
        x = logits[:, :1, :0]
        for c in range(logits.shape[2]):
            k = draw_index(_chained(logits, slopes, x), u[:, :, c])
            x = torch.cat([x, bin_center(k, self.levels, x.dtype)[:, :, None]], dim=2)
        return x.squeeze(1).to(params.dtype)


class GaussianMixture(Likelihood):
    """A mixture of Gaussians with diagonal covariances, for data without levels.

    Args:
        levels: of the data; must be None.
        components: number of mixture components.
    """

    def __init__(self, levels: int | None = None, components: int = 8):
        super().__init__()
        if levels is not None:
            raise ValueError(
                f"a Gaussian mixture is for real vectors, not images with {levels} levels: use a discrete likelihood"
            )
        if components < 1:
            raise ValueError(f"components must be at least 1, not {components}")
        self.components = components

    def num_params(self, channels: int) -> int:
        return self.components * (1 + 2 * channels)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (B, M, 1, ...), means and log standard deviations (B, M, C, ...)."""
        C = self.channels(params)
        logits, mean, log_std = _precise(params).unflatten(1, (self.components, -1)).split([1, C, C], dim=2)
        return logits, mean, projected_clamp(log_std, LOG_SCALE_MIN)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        logits, mean, log_std = self._split(params)
        z = (x[:, None] - mean) * torch.exp(-log_std)
        log_normal = -(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(2)
        return _summed((logits.squeeze(2).log_softmax(1) + log_normal).logsumexp(1))

    def location(self, params: Tensor) -> Tensor:
        logits, mean, _ = self._split(params)
        return (logits.softmax(1) * mean).sum(1).to(params.dtype)

    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        logits, *moments = self._split(params)
        u = rand(logits[:, 0].shape, rng=rng, device=params.device)
        index = draw_index(logits.squeeze(2), u)[:, :, None]
        mean, log_std = (part.gather(1, index.expand(-1, -1, *part.shape[2:])).squeeze(1) for part in moments)
        eps = randn(mean.shape, rng=rng, device=params.device, dtype=mean.dtype)
        return (mean + torch.exp(log_std) * eps).to(params.dtype)


def log_ndtr(x: Tensor) -> Tensor:
    """Log of the standard normal CDF, elementwise, with the correct gradient in the lower tail.

    The gradient of torch.special.log_ndtr is wrong there: in float32 0.4 at -3e4.
    """
    below = x < -1
    tail = torch.where(below, x, -1.0)
    log_tail = torch.log(torch.special.erfcx(-tail * math.sqrt(0.5)) / 2) - tail.square() / 2
    return torch.where(below, log_tail, torch.special.log_ndtr(torch.where(below, -1.0, x)))


def discretized_gaussian_log_mass(x: Tensor, mean: Tensor, log_var: Tensor, levels: int) -> Tensor:
    """Log probability of the level of each element under a discretised Gaussian, elementwise.

    The first and the last bin extend to infinity (Ho et al. 2020, eq. 13).

    Args:
        x: data on [-1, 1], (B, ...).
        mean: of the same shape.
        log_var: broadcasts with it.
        levels: K.
    """
    k = quantize(x, levels)
    centre = bin_center(k, levels, mean.dtype)
    inverse = torch.exp(-0.5 * log_var)
    upper = (centre + 1 / levels - mean) * inverse
    lower = (centre - 1 / levels - mean) * inverse
    # Use the tail where both limits are negative, to avoid differences of numbers near 1.
    flip = centre > mean
    hi = torch.where(flip, -lower, upper)
    lo = torch.where(flip, -upper, lower)
    log_hi, log_lo = log_ndtr(hi), log_ndtr(lo)
    # In the far tail the logarithms round to equal numbers; the bound keeps exp below 1.
    least = max(1e-12, torch.finfo(log_hi.dtype).eps)
    inner = log_hi + torch.log1p(-torch.exp((log_lo - log_hi).clamp(max=-least)))
    first, last = log_ndtr(upper), log_ndtr(-lower)
    return torch.where(k == 0, first, torch.where(k == levels - 1, last, inner))


def default_likelihood(levels: int | None) -> Likelihood:
    """Return the default likelihood of VAEs: a discretised logistic for images, a Gaussian for real vectors."""
    return Gaussian() if levels is None else DiscretizedLogistic(levels)


def default_pixel_likelihood(levels: int | None) -> Likelihood:
    """Return the default likelihood of autoregressive models: a mixture of logistics for images, of Gaussians otherwise."""
    return GaussianMixture(levels) if levels is None else LogisticMixture(levels)
