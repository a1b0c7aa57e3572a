r"""Gaussian paths from data to noise, and the five things a network may predict along them.

A path moves a data point ``x`` towards noise ``eps ~ N(0, I)``:

    x_t = alpha(t) x + sigma(t) eps,      0 = data, 1 = noise.

Whatever a network predicts, knowing ``x_t`` it has predicted everything else: each kind is a linear combination
``a x + b eps``, and two linear equations give back ``x`` and ``eps``.

    kind        a          b
    x0          1          0
    eps         0          1
    v           -sigma     alpha            (Salimans, Ho 2022)
    velocity    alpha'     sigma'           (the path's own speed; regressed by flow matching)
    score       0          -1/sigma         (grad log p_t, by Tweedie's formula)

The score and every stochastic sampler presuppose that noise and data are paired independently; where they are not
(optimal-transport pairing, reflow) the path says ``independent = False``.

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
    """What a denoiser says about ``x_t``.

    ``kind`` says which quantity ``mean`` is, (B, *shape). ``variance_share`` is, where the network has learned it, the place of
    a reverse step's log variance between the posterior's, 0, and the forward step's, 1, per element, (B, *shape): a share
    rather than a variance, so that it also serves a chain that is thinned out.
    """

    kind: Parameterization
    mean: Tensor
    variance_share: Tensor | None = None


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Give a per-sample value, (B,) or (), the trailing dimensions and the dtype of a batch, (B, ...)."""
    return t.to(like.dtype).reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t.to(like.dtype)


def cast_like(x: Tensor, like: Tensor) -> Tensor:
    """Give numbers the type of others; to look is a tenth of what a conversion costs that changes nothing."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


def batch_times(t: Tensor, batch: Tensor) -> tuple[Tensor, ...]:
    """Give each of some times, (T,), to every row of a batch, (B, ...): T times, (B,), on its device.

    All of them at once cost no more than a few would one by one.
    """
    return t.to(batch.device)[:, None].expand(-1, len(batch)).contiguous().unbind()


def conversion_coefficients(
    kind: Parameterization, to: Parameterization, alpha: Number, sigma: Number, d_alpha: Number, d_sigma: Number
) -> tuple[Number, Number]:
    """Return the weights of ``x_t`` and of a prediction of ``kind`` in what it says of ``to``.

    Cramer's rule on ``[alpha sigma; a b] (x, eps) = (x_t, mean)``, contracted with the row of ``to``.
    """
    a, b, det = _row(kind, alpha, sigma, d_alpha, d_sigma)
    a_to, b_to, _ = _row(to, alpha, sigma, d_alpha, d_sigma)
    return (a_to * b - b_to * a) / det, (b_to * alpha - a_to * sigma) / det


def _row(
    kind: Parameterization, alpha: Number, sigma: Number, d_alpha: Number, d_sigma: Number
) -> tuple[Number | float, Number | float, Number]:
    """Return ``a``, ``b`` of the kind and the determinant ``alpha b - sigma a``."""
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
    """The path of a schedule.

    Args:
        schedule: gives alpha(t) and sigma(t).
        independent: whether noise and data are paired independently.
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
        """Return the quantity ``kind`` of the pair ``(x, eps)`` at times ``t``, (B,), inside the open interval."""
        if kind == "x0" or kind == "eps":
            return x if kind == "x0" else eps
        a, b, _ = _row(kind, *self.schedule.at(t))
        a, b = (expand(weight, x) if isinstance(weight, Tensor) else weight for weight in (a, b))
        return a * x + b * eps

    def convert(self, prediction: Prediction, x_t: Tensor, t: Tensor, to: Parameterization) -> Tensor:
        """Turn a prediction into another kind.

        Where the conversion would divide zero by zero (the noise of an x0-prediction at t = 0, the data of an
        eps-prediction where alpha = 0), the coefficients of the nearest well-conditioned time are used.

        Args:
            prediction: what the denoiser said about ``x_t``.
            x_t: (B, *shape).
            t: (B,) or (), in [0, 1].
            to: the kind wanted.

        Raises:
            ValueError: for the score of a path whose noise depends on the data.
        """
        return self.combine(prediction, x_t, self.conditioned(prediction.kind, to, t), to)

    def combine(self, prediction: Prediction, x_t: Tensor, t: Tensor, to: Parameterization) -> Tensor:
        """Turn a prediction into another kind, as ``convert`` does, at times at which it can be."""
        if "score" in (to, prediction.kind) and not self.independent:
            raise ValueError("a path whose noise is paired with its data has no score: use an ODE sampler")
        if prediction.kind == to:
            return prediction.mean
        of_x_t, of_mean = conversion_coefficients(prediction.kind, to, *self.schedule.at(t))
        return expand(of_x_t, x_t) * x_t + expand(of_mean, x_t) * prediction.mean

    def conditioned(self, kind: Parameterization, to: Parameterization, t: Tensor) -> Tensor:
        """Return ``t``, float64, and where ``kind`` cannot be turned into ``to`` the nearest time at which it can."""
        t = t.double()
        if kind == to:
            return t
        c = self.schedule.at(t)
        (a, b, det), (a_to, b_to, _) = _row(kind, *c), _row(to, *c)
        good = torch.as_tensor(a + b + a_to + b_to).isfinite() & (det.abs() > 1e-8)
        return torch.where(good, t, t.clamp(self.schedule.t_min, self.schedule.t_max))
