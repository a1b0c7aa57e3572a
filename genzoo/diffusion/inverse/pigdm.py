r"""Pseudoinverse-guided diffusion (PiGDM): a likelihood with isotropic uncertainty of the data given x_t,

    p(x | x_t) = N(E[x | x_t], r_t^2 I),      r_t^2 = v sigma_t^2 / (v alpha_t^2 + sigma_t^2)
    E[x | x_t, value] = E[x | x_t] + sigma_t^2/alpha_t J' A' (r_t^2 A A' + sigma^2 I)^-1 (value - A E[x | x_t])

with the Jacobian J of the denoiser in x_t. It is exact for data N(m, v I). This is the guidance of eq. 7 with the r_t of
section 3.2, without the weights of their algorithm 1, which belong to deterministic DDIM.

References:
    Song, Vahdat, Mardani, Kautz, "Pseudoinverse-Guided Diffusion Models for Inverse Problems", 2023,
    https://openreview.net/forum?id=9_gsMA8MRKQ (eq. 7).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from genzoo.diffusion.inverse.operators import Observation
from genzoo.diffusion.inverse.sampler import PosteriorMeanSampler
from genzoo.diffusion.samplers.sampler import Sampler


class PiGDM(PosteriorMeanSampler):
    """Pseudoinverse-guided diffusion; one vector-Jacobian product per evaluation.

    Args:
        observation, sampler: as in ``InverseSampler``.
        std: standard deviation of the data, sqrt(v); 1 in Song et al. 2023.
    """

    def __init__(self, observation: Observation, sampler: Sampler, std: float = 1.0):
        super().__init__(observation, sampler)
        if not std > 0:
            raise ValueError(f"std must be positive, not {std}")
        self.std = std

    def correction(
        self, x0: Tensor, vjp: Callable[[Tensor], Tensor], observation: Observation, alpha: float, sigma: float
    ) -> tuple[Tensor, int]:
        operator, v = observation.operator, self.std**2
        variance = v * sigma**2 / (v * alpha**2 + sigma**2)
        weighted = operator.solve(observation.residual(x0), variance, observation.sigma**2)
        return sigma**2 / alpha * vjp(operator.adjoint(weighted)), 1
