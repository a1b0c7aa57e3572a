"""The Euler-Maruyama sampler of the reverse SDE.

References:
    Song et al., "Score-Based Generative Modeling through SDEs", 2021, https://arxiv.org/abs/2011.13456 (eq. 6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from genzoo.diffusion.samplers.chain import ChainSampler, CountedDenoiser, StepCoefficients, axpby
from genzoo.numerics.random import randn


class EulerMaruyama(ChainSampler):
    """Euler-Maruyama for the reverse SDE, ``dx = (f x - g^2 score) dt + g dw`` (Song et al. 2021, eq. 6).

    ``f = alpha'/alpha`` and ``g^2 = 2 sigma sigma' - 2 f sigma^2`` are those of the linear SDE with the marginals of the path.
    The last step returns the estimate of the data.

    Args:
        steps, clip, trajectory: as in ``Sampler``.
    """

    stochastic = True

    def __init__(self, steps: int | None = 500, clip: bool = True, trajectory: bool = False):
        super().__init__(steps, clip, trajectory)

    def step(self, denoise: CountedDenoiser, x_t: Tensor, c: StepCoefficients, rng: torch.Generator | None) -> Tensor:
        x0, _ = denoise(x_t, c)
        if c.last:
            return x0
        f = c.d_alpha_t / c.alpha_t
        g2 = 2 * c.sigma_t * c.d_sigma_t - 2 * f * c.sigma_t**2
        dt = c.t - c.s
        z = randn(x_t.shape, rng=rng, device=x_t.device, dtype=x_t.dtype)
        return axpby(1 - dt * f, x_t, -dt * g2 / c.sigma_t, c.eps(x_t, x0)).add_(z, alpha=(g2 * dt) ** 0.5)
