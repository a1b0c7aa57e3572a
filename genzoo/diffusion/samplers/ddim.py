"""The DDIM sampler.

References:
    Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2021, https://arxiv.org/abs/2010.02502 (eq. 12, 16).
"""

from __future__ import annotations

import torch
from torch import Tensor

from genzoo.diffusion.samplers.chain import ChainSampler, CountedDenoiser, StepCoefficients
from genzoo.numerics.random import randn


class DDIM(ChainSampler):
    """DDIM: deterministic at ``eta = 0``, ancestral sampling at ``eta = 1`` (Song et al. 2021, eq. 12).

    Args:
        eta: scale of the noise added at each step, in units of the posterior standard deviation (eq. 16).
        steps, clip, trajectory: as in ``Sampler``.
    """

    def __init__(self, steps: int | None = 50, eta: float = 0.0, clip: bool = True, trajectory: bool = False):
        super().__init__(steps, clip, trajectory)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], not {eta}")
        self.eta = eta
        self.stochastic = eta > 0

    def step(self, denoise: CountedDenoiser, x_t: Tensor, c: StepCoefficients, rng: torch.Generator | None) -> Tensor:
        x0, _ = denoise(x_t, c)
        fresh_var = self.eta**2 * c.posterior_var
        # eps follows from the clipped estimate, so that x_t = alpha x0 + sigma eps holds.
        x_s = c.renoise(x_t, x0, max(c.sigma_s**2 - fresh_var, 0.0) ** 0.5)
        if fresh_var > 0:
            x_s += fresh_var**0.5 * randn(x_s.shape, rng=rng, device=x_s.device, dtype=x_s.dtype)
        return x_s
