r"""The preconditioning of Karras et al., which gives network inputs and targets unit variance at every noise level.

With s the standard deviation of the data, that of x_t is ``q = sqrt(alpha^2 s^2 + sigma^2)``, and the estimate of the data is

    D(x_t, t) = c_skip x_t + c_out F(c_in x_t, t),      c_skip = alpha s^2/q^2,   c_out = sigma s/q,   c_in = 1/q,

which reduces to theirs for alpha = 1.

References:
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364 (eq. 7, table 1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from genzoo.diffusion.path import expand
from genzoo.diffusion.schedules import Schedule


class Preconditioning(NamedTuple):
    """Coefficients of the preconditioning, broadcast to x_t."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor


def precondition(schedule: Schedule, x_t: Tensor, t: Tensor, s: float) -> Preconditioning:
    """Return the coefficients for x_t, (B, *shape), at times t, (B,), and data of standard deviation s."""
    c = schedule.at(t)
    q = torch.sqrt((c.alpha * s) ** 2 + c.sigma**2)
    return Preconditioning(expand(c.alpha * s**2 / q**2, x_t), expand(c.sigma * s / q, x_t), expand(1 / q, x_t))
