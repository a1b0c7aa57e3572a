r"""RePaint: inpainting by a chain whose known pixels are replaced by noisy copies at the noise level of the state,

    x_s <- alpha_s value + sigma_s n    on known pixels,    a step of the chain from x_t    on unknown pixels.

Known and unknown pixels are drawn independently given x_t and do not harmonise: each ``jump`` steps are taken ``resamplings``
times, with noise added from s back to t in between. The final pixels are exact where the pixels of the data are
independent; elsewhere the bias falls with the resamplings.

References:
    Lugmayr et al., "RePaint: Inpainting using Denoising Diffusion Probabilistic Models", 2022,
    https://arxiv.org/abs/2201.09865 (eq. 8; algorithm 1 is ``jump=1``; section 4.2 for longer jumps).
"""

from __future__ import annotations

import torch
from torch import Tensor

from genzoo.diffusion.denoiser import Denoiser
from genzoo.diffusion.inverse.operators import Inpainting, Observation
from genzoo.diffusion.inverse.sampler import InverseSampler
from genzoo.diffusion.samplers.chain import ChainSampler, CountedDenoiser, StepCoefficients, axpby
from genzoo.diffusion.samplers.sampler import Sampler, Trajectory
from genzoo.numerics.random import randn


class RePaint(InverseSampler):
    """RePaint, for inpainting with exact values; no gradients.

    Args:
        observation: of an ``Inpainting`` with sigma = 0.
        sampler: a chain sampler, such as ancestral or ddim.
        resamplings: U, how often each block of steps is taken; 1 for none. The last step is taken once.
        jump: steps in a block.

    Raises:
        ValueError: for another operator, noisy values, and a sampler of ODEs.
    """

    def __init__(self, observation: Observation, sampler: Sampler, resamplings: int = 10, jump: int = 1):
        super().__init__(observation, sampler)
        if not isinstance(observation.operator, Inpainting) or observation.sigma > 0:
            raise ValueError("repaint needs known pixels without noise: task=inpaint with sigma=0")
        if not isinstance(sampler, ChainSampler):
            raise ValueError(f"repaint needs a chain sampler, such as ancestral or ddim, not {type(sampler).__name__}")
        if resamplings < 1 or jump < 1:
            raise ValueError(f"resamplings and jump must be at least 1, not {resamplings} and {jump}")
        self.operator, self.chain_sampler = observation.operator, sampler
        self.resamplings, self.jump, self.stochastic = resamplings, jump, True

    def iterate_posterior(
        self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None
    ) -> Trajectory:
        x, denoise = self.chain_sampler.start(denoiser, noise, y)
        value = self.operator.adjoint(self.observation.value.to(x))
        yield x, 0
        *steps, last = denoise.chain
        for start in range(0, len(steps), self.jump):
            block = steps[start : start + self.jump]
            for u in range(self.resamplings):
                for step in block:
                    x = self.step(denoise, x, step, value, rng)
                    yield x, denoise.nfe
                if u < self.resamplings - 1:
                    for step in reversed(block):
                        x = step.diffuse(x, like_noise(x, rng))
        yield self.step(denoise, x, last, value, rng), denoise.nfe

    def step(
        self,
        denoise: CountedDenoiser,
        x_t: Tensor,
        c: StepCoefficients,
        value: Tensor,
        rng: torch.Generator | None,
    ) -> Tensor:
        """Return the state at s, (n, *shape), with the noisy values at the known pixels."""
        x_s = self.chain_sampler.step(denoise, x_t, c, rng)
        known = value if c.last else axpby(c.alpha_s, value, c.sigma_s, like_noise(x_s, rng))
        return torch.where(self.operator.unknown.to(x_s.device), x_s, known)


def like_noise(x: Tensor, rng: torch.Generator | None) -> Tensor:
    """Draw standard normal noise like x."""
    return randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
