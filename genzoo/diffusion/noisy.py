r"""Noisy data at any ratio of signal and noise, for networks that are trained once and used on every Gaussian path.

``x_t = alpha x + sigma eps`` is at each time a multiple of the path ``cos(pi u / 2) x + sin(pi u / 2) eps``, at

    u = 2/pi atan2(sigma, alpha),    x_u = x_t / sqrt(alpha^2 + sigma^2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genzoo.diffusion.path import expand
from genzoo.numerics.random import rand, randn


def at_angle(x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_u, (B, *shape), u, (B,) in [0, 1], and the signal cos(pi u / 2), (B,).

    Args:
        x_t: noisy data, (B, *shape).
        alpha, sigma: factors of data and noise, (B,).
    """
    scale = torch.hypot(alpha, sigma)
    u = 2 / math.pi * torch.atan2(sigma, alpha)
    x_u = x_t / expand(scale, x_t).to(x_t.dtype)
    return x_u, u, (alpha / scale).to(x_t.dtype)


def with_noise(x: Tensor, rng: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Draw u uniformly, and noise; return x_t, (B, *shape), alpha and sigma, (B,)."""
    angle = math.pi / 2 * rand((len(x),), rng=rng, device=x.device, dtype=torch.float64)
    eps = randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
    alpha, sigma = torch.cos(angle), torch.sin(angle)
    return expand(alpha, x) * x + expand(sigma, x) * eps, alpha, sigma
