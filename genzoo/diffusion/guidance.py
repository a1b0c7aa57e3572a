r"""Guidance: denoisers that move the estimate of one denoiser away from that of another.

With c the conditional prediction and u the one to move away from, every kind of guidance here predicts

    u + s (c - u)

with the **scale** s: 1 is the plain conditional model at the cost of one evaluation, 0 is u, and larger values trade
diversity for the likelihood of the condition. Others write 1 + w for s (Ho, Salimans 2022). All predictions of
``genzoo.diffusion.path`` are linear in each other with coefficients of the path: any of them may be guided.

Every sampler takes a guided denoiser, which is one. No distribution along the path has the guided score, so that stochastic
samplers and ODEs draw from different distributions. On a variance-exploding path, for data N(0, u) of which one class is
N(0, c), the ODE draws from N(0, c^s u^(1-s)).

References:
    Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022, https://arxiv.org/abs/2207.12598 (eq. 6, with w = s - 1).
    Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
    Models", 2024, https://arxiv.org/abs/2404.07724 (eq. 3).
    Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", 2024, https://arxiv.org/abs/2406.02507 (eq. 4).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from genzoo.diffusion.denoiser import Denoiser, DenoiserWrapper
from genzoo.diffusion.path import Prediction, expand
from genzoo.model import GenerativeModel


class Guidance(DenoiserWrapper):
    """A denoiser that is guided away from another prediction.

    Args:
        denoiser: that is guided.
        scale: s, at least 0.
        interval: noise levels sigma/alpha, (lowest, highest), between which it is guided; elsewhere s is 1.
    """

    def __init__(self, denoiser: Denoiser, scale: float, interval: tuple[float, float] | None = None):
        super().__init__(denoiser)
        if not scale >= 0:
            raise ValueError(f"scale must be at least 0, not {scale}")
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise ValueError(f"interval must be two noise levels, the lower one first, not {interval}")
        self.scale, self.interval = scale, interval
        self._evaluations = denoiser.evaluations

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        """Of a network in the latest ``predict``."""
        return self._evaluations

    @abstractmethod
    def reference(self, prediction: Prediction, x_t: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, int]:
        """Return u, the quantity that ``prediction`` is of, (B, *shape), and its evaluations of a network."""

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        """Predict with guidance, see ``Denoiser.predict``; a learned variance is that of the guided denoiser."""
        prediction, self._evaluations = self.denoiser.predict(x_t, t, y), self.denoiser.evaluations
        scale: float | Tensor = self.scale
        if self.interval is not None:
            alpha, sigma, *_ = self.path.schedule.at(t)
            low, high = self.interval
            guided = (sigma >= low * alpha) & (sigma <= high * alpha)
            if not bool(guided.any()):
                return prediction
            scale = expand(torch.where(guided, self.scale, 1.0), x_t)
        elif self.scale == 1.0:
            return prediction
        u, evaluations = self.reference(prediction, x_t, t, y)
        self._evaluations += evaluations
        return prediction._replace(mean=u + scale * (prediction.mean - u))


class ClassifierFreeGuidance(Guidance):
    """Guidance away from the unconditional prediction of the same denoiser (Ho, Salimans 2022).

    Raises:
        ValueError: for a denoiser without conditions, and for a model that was trained without dropped conditions.
    """

    def __init__(self, denoiser: Denoiser, scale: float, interval: tuple[float, float] | None = None):
        super().__init__(denoiser, scale, interval)
        if denoiser.condition is None:
            raise ValueError("guidance: the model is unconditional")
        if isinstance(denoiser, GenerativeModel) and not denoiser.conditioner.dropout:
            raise ValueError(
                "guidance: the model was trained with model.condition_dropout=0 and has no unconditional part"
            )

    def reference(self, prediction: Prediction, x_t: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, int]:
        return self.denoiser.predict(x_t, t, None).mean, self.denoiser.evaluations


class AutoGuidance(Guidance):
    """Guidance away from a worse denoiser of the same data, an earlier or a smaller one (Karras et al. 2024).

    Args:
        denoiser, scale, interval: as in ``Guidance``.
        worse: the other denoiser, with the same condition.

    Raises:
        ValueError: where the two differ in their events or conditions.
    """

    def __init__(self, denoiser: Denoiser, worse: Denoiser, scale: float, interval: tuple[float, float] | None = None):
        super().__init__(denoiser, scale, interval)
        if (denoiser.event, denoiser.condition) != (worse.event, worse.condition):
            raise ValueError(
                f"guidance: models of {denoiser.event}, {denoiser.condition} and of {worse.event}, {worse.condition} differ"
            )
        self.worse = worse

    def reference(self, prediction: Prediction, x_t: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, int]:
        return self.worse.predict_as(prediction.kind, x_t, t, y)
