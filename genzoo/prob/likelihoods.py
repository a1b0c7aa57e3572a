r"""Likelihoods: laws of one element of an event given the output of a network.

A likelihood turns the output of a network, (B, C * num_params, ...), into a law of the event, (B, C, ...), and answers
three questions about it: the log density of an event, its mean, and a draw. Every log density is on the measure of the
data, so that a discrete probability P counts as log P + D log(K/2) (see ``genzoo.prob.measure``).

References:
    Salimans, Karpathy, Chen, Kingma, "PixelCNN++", 2017, https://arxiv.org/abs/1701.05517 (eq. 2, discretised logistic).
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239 (eq. 13,
    discretised Gaussian).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.prob.measure import bin_centre, log_density, quantize, snap
from genzoo.prob.random import rand, randn

LOG_SCALE_MIN = -7.0


class Likelihood(nn.Module, ABC):
    """The law of an event given ``num_params`` numbers for each of its elements."""

    num_params: int

    @abstractmethod
    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Return the log density of each event, (B, C * num_params, ...) and (B, C, ...) -> (B,)."""

    @abstractmethod
    def mean(self, params: Tensor) -> Tensor:
        """Return the mean of the law, (B, C, ...)."""

    @abstractmethod
    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Draw from the law, (B, C, ...)."""


class Gaussian(Likelihood):
    """A normal law; its log variance is one learned number, or with ``per_element`` an output of the network."""

    def __init__(self, per_element: bool = False, log_var: float = 0.0):
        super().__init__()
        self.num_params = 2 if per_element else 1
        self.log_var = None if per_element else nn.Parameter(torch.tensor(float(log_var)))

    def _moments(self, params: Tensor) -> tuple[Tensor, Tensor]:
        if self.log_var is not None:
            return params, self.log_var.expand_as(params)
        mean, log_var = params.chunk(2, dim=1)
        return mean, log_var.clamp(min=2 * LOG_SCALE_MIN)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        mean, log_var = self._moments(params)
        return -0.5 * ((x - mean) ** 2 * torch.exp(-log_var) + log_var + math.log(2 * math.pi)).flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        return self._moments(params)[0]

    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        mean, log_var = self._moments(params)
        return mean + torch.exp(0.5 * log_var) * randn(mean.shape, rng=rng, device=mean.device, dtype=mean.dtype)


class DiscretizedLogistic(Likelihood):
    r"""A logistic law integrated over the bin of each level; the first and the last bin reach to infinity.

        P(k) = s((x_k + 1/K - mu)/b) - s((x_k - 1/K - mu)/b),    s the logistic function, x_k the centre of bin k

    The log scale ``log b`` is an output of the network, at least -7.
    """

    num_params = 2

    def __init__(self, levels: int):
        super().__init__()
        if levels is None:
            raise ValueError(
                "a discretised likelihood needs data with levels: use a Gaussian one for points of the plane"
            )
        self.levels = levels

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        mean, log_scale = params.float().chunk(2, dim=1) if params.dtype != torch.float64 else params.chunk(2, dim=1)
        log_scale = log_scale.clamp(min=LOG_SCALE_MIN)
        k = quantize(x, self.levels)
        centre = bin_centre(k, self.levels, mean.dtype)
        inverse = torch.exp(-log_scale)
        upper = (centre + 1 / self.levels - mean) * inverse
        lower = (centre - 1 / self.levels - mean) * inverse
        # log(s(u) - s(l)) = log s(u) + log s(-l) + log(1 - e^(l - u)), exact in both tails.
        width = (2 / self.levels) * inverse
        inner = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-width))
        log_mass = torch.where(
            k == 0, F.logsigmoid(upper), torch.where(k == self.levels - 1, F.logsigmoid(-lower), inner)
        )
        dim = log_mass[0].numel()
        return log_density(log_mass.flatten(1).sum(1), dim, self.levels)

    def mean(self, params: Tensor) -> Tensor:
        return snap(params.chunk(2, dim=1)[0], self.levels)

    def sample(self, params: Tensor, rng: torch.Generator | None = None) -> Tensor:
        mean, log_scale = params.chunk(2, dim=1)
        u = rand(mean.shape, rng=rng, device=mean.device, dtype=mean.dtype).clamp(1e-5, 1 - 1e-5)
        x = mean + torch.exp(log_scale.clamp(min=LOG_SCALE_MIN)) * (torch.log(u) - torch.log1p(-u))
        return snap(x, self.levels)


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
    centre = bin_centre(k, levels, mean.dtype)
    inverse = torch.exp(-0.5 * log_var)
    upper = (centre + 1 / levels - mean) * inverse
    lower = (centre - 1 / levels - mean) * inverse
    # Work in the tail where both ends are negative, so that the difference of two numbers near 1 never occurs.
    flip = centre > mean
    hi = torch.where(flip, -lower, upper)
    lo = torch.where(flip, -upper, lower)
    log_hi, log_lo = torch.special.log_ndtr(hi), torch.special.log_ndtr(lo)
    inner = log_hi + torch.log1p(-torch.exp((log_lo - log_hi).clamp(max=-1e-12)))
    first, last = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower)
    return torch.where(k == 0, first, torch.where(k == levels - 1, last, inner))
