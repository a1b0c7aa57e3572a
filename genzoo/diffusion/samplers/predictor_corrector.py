"""The predictor-corrector sampler of score-based models.

References:
    Song et al., "Score-Based Generative Modeling through SDEs", 2021, https://arxiv.org/abs/2011.13456 (appendix E, G).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from genzoo.diffusion.samplers.chain import ChainSampler, CountedDenoiser, StepCoefficients, axpby
from genzoo.numerics.random import randn


class PredictorCorrector(ChainSampler):
    """A predictor step of reverse diffusion, then Langevin corrector steps at the same noise level (Song et al. 2021, alg. 1).

        predictor:  x <- (2 - alpha_ts) x + var_ts score + sqrt(var_ts) z                    (eq. 46, reverse diffusion)
        corrector:  x <- x + e score + sqrt(2 e) z,    e = 2 alpha_ts^2 (snr |z| / |score|)^2        (algorithm 4, 5)

    The authors average the norms over the batch, which couples the samples. ``norms="expected"`` uses the high-dimensional
    limits ``|z| = sqrt(D)`` and ``|score| = sqrt(D)/sigma``, so that ``e = 2 (alpha_ts snr sigma)^2``; ``norms="sample"`` uses
    the norms of each sample, but in few dimensions a score may vanish.

    Args:
        snr: signal-to-noise ratio of the corrector.
        corrector_steps: corrector steps after each predictor step; 0 for reverse diffusion alone.
        norms: "expected", "sample" or "batch", see above.
        steps, clip, trajectory: as in ``Sampler``.
    """

    stochastic = True

    def __init__(
        self,
        steps: int | None = 500,
        snr: float = 0.16,
        corrector_steps: int = 1,
        norms: Literal["expected", "sample", "batch"] = "expected",
        clip: bool = True,
        trajectory: bool = False,
    ):
        super().__init__(steps, clip, trajectory)
        if snr <= 0 or corrector_steps < 0:
            raise ValueError(f"snr must be positive and corrector_steps not negative, not {snr} and {corrector_steps}")
        if norms not in ("expected", "sample", "batch"):
            raise ValueError(f"norms must be expected, sample or batch, not {norms!r}")
        self.snr, self.corrector_steps, self.norms = snr, corrector_steps, norms

    def step(self, denoise: CountedDenoiser, x_t: Tensor, c: StepCoefficients, rng: torch.Generator | None) -> Tensor:
        x0, _ = denoise(x_t, c)
        if c.last:
            return x0
        z = randn(x_t.shape, rng=rng, device=x_t.device, dtype=x_t.dtype)
        x = axpby(2 - c.alpha_t / c.alpha_s, x_t, -c.var_ts / c.sigma_t, c.eps(x_t, x0)).add_(z, alpha=c.var_ts**0.5)
        at_s = denoise.next_step(c)
        for _ in range(self.corrector_steps):
            score = -at_s.eps(x, denoise(x, at_s)[0]) / at_s.sigma_t
            z = randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
            # The fraction of the signal kept by a step, 1 - beta; 1 for VE.
            kept = (c.alpha_t / c.alpha_s) ** 2
            size = 2 * kept * (self.snr * self._ratio(z, score, at_s.sigma_t)) ** 2
            x = x + size * score + (2 * size) ** 0.5 * z
        return x

    def _ratio(self, z: Tensor, score: Tensor, sigma: float) -> Tensor | float:
        """Return |z| / |score|."""
        if self.norms == "expected":
            return sigma
        z_norm, score_norm = (v.flatten(1).norm(dim=1) for v in (z, score))
        ratio = z_norm.mean() / score_norm.mean() if self.norms == "batch" else z_norm / score_norm
        return ratio.view(-1, *[1] * (z.ndim - 1))
