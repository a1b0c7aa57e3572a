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

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from genzoo.prob.schedules import Coefficients, Schedule

Kind = Literal["x0", "eps", "v", "velocity", "score"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Prediction(NamedTuple):
    """What a denoiser says about ``x_t``.

    ``kind`` says which quantity ``mean`` is, (B, *shape). ``variance_share`` is, where the network has learned it, the place of
    a reverse step's log variance between the posterior's, 0, and the forward step's, 1, per element, (B, *shape): a share
    rather than a variance, so that it also serves a chain that is thinned out.
    """

    kind: Kind
    mean: Tensor
    variance_share: Tensor | None = None


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Give a per-sample value, (B,) or (), the trailing dimensions and the dtype of a batch, (B, ...)."""
    return t.to(like.dtype).reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t.to(like.dtype)


class GaussianPath:
    """The path of a schedule.

    Args:
        schedule: gives alpha(t) and sigma(t).
        independent: whether noise and data are paired independently.
    """

    def __init__(self, schedule: Schedule, independent: bool = True):
        self.schedule = schedule
        self.independent = independent

    def sample(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return ``x_t = alpha(t) x + sigma(t) eps`` for times ``t``, (B,)."""
        c = self.schedule.at(t)
        return expand(c.alpha, x) * x + expand(c.sigma, x) * eps

    def target(self, kind: Kind, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the quantity ``kind`` of the pair ``(x, eps)`` at times ``t``, (B,), inside the open interval."""
        a, b, _ = self._row(kind, self.schedule.at(t))
        return expand(a, x) * x + expand(b, x) * eps

    def convert(self, prediction: Prediction, x_t: Tensor, t: Tensor, to: Kind) -> Tensor:
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
        if "score" in (to, prediction.kind) and not self.independent:
            raise ValueError("a path whose noise is paired with its data has no score: use an ODE sampler")
        if prediction.kind == to:
            return prediction.mean
        c = self.schedule.at(self.conditioned(prediction.kind, to, t))
        a, b, det = self._row(prediction.kind, c)
        a_to, b_to, _ = self._row(to, c)
        # Cramer's rule on [alpha sigma; a b] (x, eps) = (x_t, mean), contracted with (a_to, b_to).
        of_x_t = (a_to * b - b_to * a) / det
        of_mean = (b_to * c.alpha - a_to * c.sigma) / det
        return expand(of_x_t, x_t) * x_t + expand(of_mean, x_t) * prediction.mean

    def conditioned(self, kind: Kind, to: Kind, t: Tensor) -> Tensor:
        """Return ``t``, float64, and where ``kind`` cannot be turned into ``to`` the nearest time at which it can."""
        t = t.double()
        if kind == to:
            return t
        c = self.schedule.at(t)
        bad = torch.zeros_like(t, dtype=torch.bool)
        for row in (self._row(kind, c), self._row(to, c)):
            for value in row[:2]:
                bad |= ~value.isfinite()
        bad |= ~(self._row(kind, c)[2].abs() > 1e-8)
        inside = t.clamp(self.schedule.t_min, self.schedule.t_max)
        return torch.where(bad, inside, t)

    @staticmethod
    def _row(kind: Kind, c: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``a``, ``b`` of the kind and the determinant ``alpha b - sigma a``."""
        zero, one = torch.zeros_like(c.alpha), torch.ones_like(c.alpha)
        a, b = {
            "x0": (one, zero),
            "eps": (zero, one),
            "v": (-c.sigma, c.alpha),
            "velocity": (c.d_alpha, c.d_sigma),
            "score": (zero, -1 / c.sigma),
        }[kind]
        return a, b, c.alpha * b - c.sigma * a
