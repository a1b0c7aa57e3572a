"""The ancestral sampler of DDPM."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from genzoo.diffusion.path import Prediction
from genzoo.diffusion.samplers.chain import ChainSampler, CountedDenoiser, StepCoefficients
from genzoo.numerics.random import randn

Variance = Literal["fixedlarge", "fixedsmall", "learned"]


class Ancestral(ChainSampler):
    """DDPM's ancestral sampling of the reverse chain, without noise at the last step (Ho et al. 2020, algorithm 2).

    Args:
        variance: variance of a reverse step: "fixedlarge", that of the forward step, "fixedsmall", that of the posterior, or
            "learned", predicted by the denoiser.
        steps, clip, trajectory: as in ``Sampler``.
    """

    stochastic = True

    def __init__(
        self,
        variance: Variance = "fixedlarge",
        steps: int | None = None,
        clip: bool = True,
        trajectory: bool = False,
    ):
        super().__init__(steps, clip, trajectory)
        if variance not in ("fixedlarge", "fixedsmall", "learned"):
            raise ValueError(f"variance must be fixedlarge, fixedsmall or learned, not {variance!r}")
        self.variance = variance

    def step(self, denoise: CountedDenoiser, x_t: Tensor, c: StepCoefficients, rng: torch.Generator | None) -> Tensor:
        x0, prediction = denoise(x_t, c)
        x_s = c.posterior_mean(x_t, x0)
        if not c.last:
            x_s += self.std(c, prediction) * randn(x_s.shape, rng=rng, device=x_s.device, dtype=x_s.dtype)
        return x_s

    def std(self, c: StepCoefficients, prediction: Prediction) -> Tensor | float:
        """Standard deviation of a reverse step."""
        if self.variance == "learned":
            if prediction.variance_weight is None:
                raise ValueError("this denoiser has no learned variance: use variance=fixedlarge or fixedsmall")
            return torch.exp(0.5 * log_variance(c, prediction.variance_weight))
        return (c.var_ts if self.variance == "fixedlarge" else c.posterior_var) ** 0.5


def log_variance(c: StepCoefficients, weight: Tensor) -> Tensor:
    """Interpolate between the two fixed log variances (Nichol, Dhariwal 2021, eq. 15)."""
    return weight * math.log(c.var_ts) + (1 - weight) * math.log(c.posterior_var)
