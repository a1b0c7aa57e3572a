r"""Gaussian paths from data to noise, and the five parameterizations of a prediction.

A path interpolates between a data point ``x`` and noise ``eps ~ N(0, I)``:

    x_t = alpha(t) x + sigma(t) eps,      0 = data, 1 = noise.

Each parameterization is a linear combination ``a x + b eps``; together with ``x_t`` it determines ``x`` and ``eps``, and so
every other parameterization.

    kind        a          b
    x0          1          0
    eps         0          1
    v           -sigma     alpha            (Salimans, Ho 2022)
    velocity    alpha'     sigma'           (dx_t/dt, the target of flow matching)
    score       0          -1/sigma         (grad log p_t, by Tweedie's formula)

The score and stochastic samplers require an independent coupling of noise and data; paths with another one
(optimal-transport pairing, reflow) have ``independent = False``.

References:
    Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022,
    https://arxiv.org/abs/2202.00512 (section 4: v-prediction).
    Song et al., "Score-Based Generative Modeling through SDEs", 2021, https://arxiv.org/abs/2011.13456.
    Lipman et al., "Flow Matching for Generative Modeling", 2023, https://arxiv.org/abs/2210.02747.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from genzoo.diffusion.schedules import Schedule

Parameterization = Literal["x0", "eps", "v", "velocity", "score"]
PARAMETERIZATIONS: tuple[Parameterization, ...] = get_args(Parameterization)
Number = TypeVar("Number", Tensor, float)


class Prediction(NamedTuple):
    """A prediction given ``x_t``.

    Attributes:
        kind: the parameterization.
        mean: the conditional mean, (B, *shape).
        variance_weight: learned interpolation weight of the log variance of a reverse step, (B, *shape): 0 for that of the
            posterior, 1 for that of the forward step. A weight applies to a strided chain too. None for a fixed variance.
    """

    kind: Parameterization
    mean: Tensor
    variance_weight: Tensor | None = None


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Reshape a per-sample value, (B,) or (), to broadcast with a batch, (B, ...), and cast it."""
    return t.to(like.dtype).reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t.to(like.dtype)


def cast_like(x: Tensor, like: Tensor) -> Tensor:
    """Cast to the dtype of another tensor; the check is ten times as fast as a cast without effect."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


def batch_times(t: Tensor, batch: Tensor) -> tuple[Tensor, ...]:
    """Expand T times, (T,), over a batch, (B, ...): T tensors, (B,), on its device, from a single copy."""
    return t.to(batch.device)[:, None].expand(-1, len(batch)).contiguous().unbind()


def conversion_coefficients(
    kind: Parameterization, to: Parameterization, alpha: Number, sigma: Number, d_alpha: Number, d_sigma: Number
) -> tuple[Number, Number]:
    """Return the coefficients of ``x_t`` and of a prediction of ``kind`` in the parameterization ``to``.

    By Cramer's rule on ``[alpha sigma; a b] (x, eps) = (x_t, mean)``, contracted with the row of ``to``.
    """
    a, b, det = _row(kind, alpha, sigma, d_alpha, d_sigma)
    a_to, b_to, _ = _row(to, alpha, sigma, d_alpha, d_sigma)
    return (a_to * b - b_to * a) / det, (b_to * alpha - a_to * sigma) / det


def _row(
    kind: Parameterization, alpha: Number, sigma: Number, d_alpha: Number, d_sigma: Number
) -> tuple[Number | float, Number | float, Number]:
    """Return ``a``, ``b`` and the determinant ``alpha b - sigma a`` of a parameterization."""
    match kind:
        case "x0":
            return 1.0, 0.0, -sigma
        case "eps":
            return 0.0, 1.0, alpha
        case "v":
            return -sigma, alpha, alpha**2 + sigma**2
        case "velocity":
            return d_alpha, d_sigma, alpha * d_sigma - sigma * d_alpha
        case "score":
            return 0.0, -1 / sigma, -alpha / sigma


class GaussianPath(nn.Module):
    """The Gaussian path of a schedule.

    Args:
        schedule: alpha(t) and sigma(t).
        independent: whether noise and data are coupled independently.
    """

    def __init__(self, schedule: Schedule, independent: bool = True):
        super().__init__()
        self.schedule = schedule
        self.independent = independent

    def sample(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return ``x_t = alpha(t) x + sigma(t) eps`` for times ``t``, (B,)."""
        c = self.schedule.at(t)
        return expand(c.alpha, x) * x + expand(c.sigma, x) * eps

    def target(self, kind: Parameterization, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the regression target ``kind`` of a pair ``(x, eps)`` at times ``t``, (B,) in (0, 1)."""
        if kind == "x0" or kind == "eps":
            return x if kind == "x0" else eps
        a, b, _ = _row(kind, *self.schedule.at(t))
        a, b = (expand(weight, x) if isinstance(weight, Tensor) else weight for weight in (a, b))
        return a * x + b * eps

    def convert(self, prediction: Prediction, x_t: Tensor, t: Tensor, to: Parameterization) -> Tensor:
        """Convert a prediction to another parameterization.

        Where the conversion is singular (eps from x0 at t = 0, x0 from eps where alpha = 0), the coefficients of the nearest
        well-conditioned time are used.

        Args:
            prediction: the prediction at ``x_t``.
            x_t: (B, *shape).
            t: (B,) or (), in [0, 1].
            to: the target parameterization.

        Raises:
            ValueError: for the score of a path with coupled noise and data.
        """
        return self.combine(prediction, x_t, self.well_conditioned_time(prediction.kind, to, t), to)

    def combine(self, prediction: Prediction, x_t: Tensor, t: Tensor, to: Parameterization) -> Tensor:
        """Convert a prediction, as ``convert`` does, at well-conditioned times."""
        if "score" in (to, prediction.kind) and not self.independent:
            raise ValueError("a path with coupled noise and data has no score: use an ODE sampler")
        if prediction.kind == to:
            return prediction.mean
        of_x_t, of_mean = conversion_coefficients(prediction.kind, to, *self.schedule.at(t))
        return expand(of_x_t, x_t) * x_t + expand(of_mean, x_t) * prediction.mean

    def well_conditioned_time(self, kind: Parameterization, to: Parameterization, t: Tensor) -> Tensor:
        """Return ``t``, float64, or the nearest time at which the conversion from ``kind`` to ``to`` is well-conditioned."""
        t = t.double()
        if kind == to:
            return t
        c = self.schedule.at(t)
        (a, b, det), (a_to, b_to, _) = _row(kind, *c), _row(to, *c)
        good = torch.as_tensor(a + b + a_to + b_to).isfinite() & (det.abs() > 1e-8)
        return torch.where(good, t, t.clamp(self.schedule.t_min, self.schedule.t_max))
