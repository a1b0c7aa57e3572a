r"""Likelihoods: laws of an event given the output of a network.

A likelihood turns the output of a network, (B, P, ...), into a law of the event, (B, C, ...), with ``P = num_params(C)``
numbers for the C channels of each pixel, and answers three questions about it: the log density of an event, its mean, and
a draw. Pixels are independent given the output. Every log density is on the measure of the data, so that a discrete
probability P counts as log P + D log(K/2) (see ``genzoo.distributions.discretization``).

Channels are independent too, except in ``Categorical`` and ``LogisticMixture``, which chain them: red, then green given
red, then blue given both.

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
    """The law of an event given ``num_params(C)`` numbers for each of its pixels."""

    levels: int | None = None  # of the integers whose law it is; None for a density of real vectors

    @abstractmethod
    def num_params(self, channels: int) -> int:
        """Return how many numbers the law of a pixel takes."""

    @abstractmethod
    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Return the log density of each event, (B, num_params(C), ...) and (B, C, ...) -> (B,)."""

    @abstractmethod
    def mean(self, params: Tensor) -> Tensor:
        """Return the mean of the law, (B, C, ...), where the data have levels on the level that holds it."""

    @abstractmethod
    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Draw from the law, (B, C, ...)."""

    def check(self, levels: int | None) -> None:
        """Refuse data with other levels; the dequantised values of any image have a density.

        Raises:
            ValueError: saying both numbers.
        """
        if self.levels not in (None, levels):
            raise ValueError(f"the likelihood is of integers with {self.levels} levels, the data have levels={levels}")

    def encoder_input(self, x: Tensor) -> Tensor:
        """Return what may be known of an event, such as by an encoder: its levels where the law is one of integers.

        The noise of dequantisation is no part of an integer: a posterior that saw it would bound nothing.
        """
        return x if self.levels is None else to_bin_centers(x, self.levels)

    def channels(self, params: Tensor) -> int:
        """Return how many channels the event has that a network's output describes."""
        return next(c for c in itertools.count(1) if self.num_params(c) >= params.shape[1])


def _precise(params: Tensor) -> Tensor:
    """Move the output of a network to float32 or better: log-likelihoods are sums of many terms."""
    return params if params.dtype == torch.float64 else params.float()


def _levels(levels: int | None) -> int:
    """Refuse data without levels."""
    if levels is None:
        raise ValueError("a discrete likelihood needs data with levels: use a Gaussian one for points of the plane")
    return levels


def _summed(log_p: Tensor) -> Tensor:
    """Add up the pixels of each event, (B, ...) -> (B,); a vector is a single pixel, with no dimension of its own."""
    return log_p.reshape(len(log_p), math.prod(log_p.shape[1:])).sum(1)


def _draw_index(logits: Tensor, u: Tensor) -> Tensor:
    """Draw an index of dimension 1 by inversion of the cumulative sum, (B, K, ...) and uniform (B, 1, ...) -> (B, 1, ...)."""
    cdf = cumulative_sum(logits.double().softmax(1), 1)
    below = cdf <= u * cdf[:, -1:]
    return below.sum(1, keepdim=True).clamp_(max=logits.shape[1] - 1)


def _logistic(u: Tensor) -> Tensor:
    """Turn uniform noise into that of the standard logistic law, without its infinite ends."""
    u = u.clamp(1e-5, 1 - 1e-5)
    return torch.log(u) - torch.log1p(-u)


def _chained(own: Tensor, slopes: Tensor, before: Tensor) -> Tensor:
    """Shift the next channel's own numbers by the channels before it, (B, M, C, ...) and (B, 1 or M, c, ...) -> (B, M, ...)."""
    c = before.shape[2]
    start = c * (c - 1) // 2
    return own[:, :, c] + (slopes[:, :, start : start + c] * before).sum(2)


class Gaussian(Likelihood):
    """A normal law; its log variance is one learned number, or with ``per_element`` an output of the network."""

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

    def mean(self, params: Tensor) -> Tensor:
        return self._moments(params)[0]

    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        mean, log_var = self._moments(params)
        return mean + torch.exp(0.5 * log_var) * randn(mean.shape, rng=rng, device=mean.device, dtype=mean.dtype)


def logistic_log_mass(k: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    r"""Log probability of each level under a logistic law integrated over bins, elementwise.

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
    """A logistic law of each element integrated over the bin of each level.

    The log scale is an output of the network, at least -7.
    """

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

    def mean(self, params: Tensor) -> Tensor:
        return to_bin_centers(params.chunk(2, dim=1)[0], self.levels)

    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        mean, log_scale = params.chunk(2, dim=1)
        noise = _logistic(rand(mean.shape, rng=rng, device=mean.device, dtype=mean.dtype))
        return to_bin_centers(mean + torch.exp(log_scale.clamp(min=LOG_SCALE_MIN)) * noise, self.levels)


class LogisticMixture(Likelihood):
    r"""A mixture of discretised logistic laws whose indicator is common to the channels of a pixel, which are chained.

        P(r, g, b) = sum_m pi_m P(r | mu_r, s_r) P(g | mu_g + c_1 r, s_g) P(b | mu_b + c_2 r + c_3 g, s_b)

    with all parameters those of component m, and c the hyperbolic tangent of an output.

    Args:
        levels: K.
        components: how many logistic laws are mixed.
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

    def mean(self, params: Tensor) -> Tensor:
        """Return the mean of the locations: bins, and what the ends cut off, are left out of account."""
        logits, mean, _, coefficients = self._split(params)
        x = mean[:, :, :0]
        for _ in range(mean.shape[2]):
            x = torch.cat([x, _chained(mean, coefficients, x).clamp(-1, 1)[:, :, None]], dim=2)
        return to_bin_centers((logits.softmax(1) * x).sum(1).to(params.dtype), self.levels)

    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        logits, *laws = self._split(params)
        u = rand(logits[:, 0].shape, rng=rng, device=params.device)
        index = _draw_index(logits.squeeze(2), u)[:, :, None]
        mean, log_scale, coefficients = (law.gather(1, index.expand(-1, -1, *law.shape[2:])) for law in laws)
        noise = torch.exp(log_scale) * _logistic(rand(mean[:, 0].shape, rng=rng, device=params.device))[:, None]
        x = mean[:, :, :0]
        for c in range(mean.shape[2]):
            drawn = to_bin_centers(_chained(mean, coefficients, x) + noise[:, :, c], self.levels)
            x = torch.cat([x, drawn[:, :, None]], dim=2)
        return x.squeeze(1).to(params.dtype)


class Bernoulli(Likelihood):
    """A coin for each element of a binary image.

    Cross-entropy against grey values is the likelihood of no data: other numbers of levels are refused.
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

    def mean(self, params: Tensor) -> Tensor:
        return to_bin_centers(0.5 * torch.tanh(params / 2), 2)

    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        u = rand(params.shape, rng=rng, device=params.device)
        return bin_center((u < torch.sigmoid(_precise(params))).long(), 2, params.dtype)


class Categorical(Likelihood):
    r"""A probability for each level; the levels need have no order.

    The channels of a pixel are chained: those before tilt the logits of channel c,

        P(k_c = k | k_0, ..., k_{c-1}) = softmax_k(l_ck + sum_{j<c} t_cjk x_j),    x_j the centre of bin k_j

    whose slopes t are outputs of the network as the logits l are. A normal law of channel c with a mean linear in x is of
    this form, with a slope proportional to k.
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

    def mean(self, params: Tensor) -> Tensor:
        """Return the mean of each channel given the means of those before it."""
        logits, slopes = self._split(params)
        centre = bin_center(torch.arange(self.levels, device=params.device), self.levels, logits.dtype)
        x = logits[:, :1, :0]
        for _ in range(logits.shape[2]):
            probs = _chained(logits, slopes, x).softmax(1)
            x = torch.cat([x, torch.einsum("bk...,k->b...", probs, centre)[:, None, None]], dim=2)
        return to_bin_centers(x.squeeze(1).to(params.dtype), self.levels)

    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        logits, slopes = self._split(params)
        u = rand(logits[:, 0].shape, rng=rng, device=params.device)[:, None]
        x = logits[:, :1, :0]
        for c in range(logits.shape[2]):
            k = _draw_index(_chained(logits, slopes, x), u[:, :, c])
            x = torch.cat([x, bin_center(k, self.levels, x.dtype)[:, :, None]], dim=2)
        return x.squeeze(1).to(params.dtype)


class GaussianMixture(Likelihood):
    """A mixture of normal laws with diagonal covariances, for data without levels.

    Args:
        levels: of the data; must be None.
        components: how many normal laws are mixed.
    """

    def __init__(self, levels: int | None = None, components: int = 8):
        super().__init__()
        if levels is not None:
            raise ValueError(
                f"a Gaussian mixture knows nothing of the {levels} levels of images: use a discrete likelihood"
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

    def mean(self, params: Tensor) -> Tensor:
        logits, mean, _ = self._split(params)
        return (logits.softmax(1) * mean).sum(1).to(params.dtype)

    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        logits, *law = self._split(params)
        u = rand(logits[:, 0].shape, rng=rng, device=params.device)
        index = _draw_index(logits.squeeze(2), u)[:, :, None]
        mean, log_std = (part.gather(1, index.expand(-1, -1, *part.shape[2:])).squeeze(1) for part in law)
        eps = randn(mean.shape, rng=rng, device=params.device, dtype=mean.dtype)
        return (mean + torch.exp(log_std) * eps).to(params.dtype)


def log_ndtr(x: Tensor) -> Tensor:
    """Log of the standard normal distribution function, elementwise, with the right gradient far out in the lower tail.

    There torch.special.log_ndtr has the value and loses the gradient: in float32 that at -3e4 is .4.
    """
    below = x < -1
    tail = torch.where(below, x, -1.0)
    log_tail = torch.log(torch.special.erfcx(-tail * math.sqrt(0.5)) / 2) - tail.square() / 2
    return torch.where(below, log_tail, torch.special.log_ndtr(torch.where(below, -1.0, x)))


def discretized_gaussian_log_mass(x: Tensor, mean: Tensor, log_var: Tensor, levels: int) -> Tensor:
    """Log probability of the level of each element under a normal law integrated over bins, elementwise.

    The first and the last bin reach to infinity (Ho et al. 2020, eq. 13).

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
    # Work in the tail where both ends are negative, so that the difference of two numbers near 1 never occurs.
    flip = centre > mean
    hi = torch.where(flip, -lower, upper)
    lo = torch.where(flip, -upper, lower)
    log_hi, log_lo = log_ndtr(hi), log_ndtr(lo)
    # Far out in the tail the two logarithms round to one number; exp of this one is still below 1.
    least = max(1e-12, torch.finfo(log_hi.dtype).eps)
    inner = log_hi + torch.log1p(-torch.exp((log_lo - log_hi).clamp(max=-least)))
    first, last = log_ndtr(upper), log_ndtr(-lower)
    return torch.where(k == 0, first, torch.where(k == levels - 1, last, inner))


def default_likelihood(levels: int | None) -> Likelihood:
    """Return the likelihood of autoencoders: a discretised logistic of integers, a normal of real numbers."""
    return Gaussian() if levels is None else DiscretizedLogistic(levels)


def default_pixel_likelihood(levels: int | None) -> Likelihood:
    """Return the likelihood of a pixel given earlier ones: a mixture of logistics of integers, of normals of real numbers."""
    return GaussianMixture(levels) if levels is None else LogisticMixture(levels)
