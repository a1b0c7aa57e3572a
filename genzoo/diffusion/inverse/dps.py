r"""Diffusion posterior sampling (DPS): after each step of a chain, a gradient step on the misfit of the estimate of the data,

    x_s <- x_s - zeta/||r|| grad_{x_t} ||r||^2,      r = value - A E[x | x_t].

In the notation of Chung et al. 2023 zeta is zeta'. Since ``grad ||r||^2 = 2 ||r|| grad ||r||``, it is half the ``scale`` of
their code, which differentiates the norm. Without the normalisation the step is zeta times the gradient of the square, and
the sampler affine for Gaussian data.

References:
    Chung et al., "Diffusion Posterior Sampling for General Noisy Inverse Problems", 2023, https://arxiv.org/abs/2209.14687
    (algorithm 1; appendix D.1 for the step size).
"""

from __future__ import annotations

import torch
from torch import Tensor

from genzoo.diffusion.denoiser import Denoiser
from genzoo.diffusion.inverse.operators import Observation
from genzoo.diffusion.inverse.sampler import InverseSampler
from genzoo.diffusion.path import expand
from genzoo.diffusion.samplers.chain import ChainSampler, CountedDenoiser, StepCoefficients
from genzoo.diffusion.samplers.sampler import Sampler, Trajectory


class DPS(InverseSampler):
    """Diffusion posterior sampling; one vector-Jacobian product per evaluation, which counts as an evaluation.

    Args:
        observation: as in ``InverseSampler``.
        sampler: a chain sampler, such as ancestral or ddim.
        zeta: step size.
        normalize: whether the step is divided by the norm of the residual, as in algorithm 1.

    Raises:
        ValueError: for a sampler of ODEs.
    """

    def __init__(self, observation: Observation, sampler: Sampler, zeta: float = 0.5, normalize: bool = True):
        super().__init__(observation, sampler)
        if not isinstance(sampler, ChainSampler):
            raise ValueError(f"dps needs a chain sampler, such as ancestral or ddim, not {type(sampler).__name__}")
        if not zeta >= 0:
            raise ValueError(f"zeta must be at least 0, not {zeta}")
        self.chain_sampler, self.zeta, self.normalize = sampler, zeta, normalize

    def iterate_posterior(
        self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None
    ) -> Trajectory:
        x, denoise = self.chain_sampler.start(denoiser, noise, y)
        yield x, 0
        for step in denoise.chain:
            x = self.step(denoise, x, step, rng)
            yield x, denoise.nfe

    def step(self, denoise: CountedDenoiser, x_t: Tensor, c: StepCoefficients, rng: torch.Generator | None) -> Tensor:
        """Return the state at s, (n, *shape)."""
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            x_s = self.chain_sampler.step(denoise, x_t, c, rng)
            assert denoise.previous is not None, "the step has called the denoiser"
            square = self.observation.residual(denoise.previous.x0).square().flatten(1).sum(1)
            (gradient,) = torch.autograd.grad(square.sum(), x_t)
        denoise.nfe += denoise.denoiser.evaluations
        # The gradient vanishes with the residual, and faster than its norm.
        step = self.zeta / square.detach().sqrt().clamp(min=1e-12) if self.normalize else self.zeta
        denoise.previous = denoise.previous._replace(x0=denoise.previous.x0.detach())
        return x_s.detach() - (expand(step, gradient) if isinstance(step, Tensor) else step) * gradient
