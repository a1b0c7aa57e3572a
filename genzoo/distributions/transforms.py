"""Invertible transformations without parameters, and their log-determinants."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.numerics import distributed


class Logit(nn.Module):
    """The logit transform of [-1, 1], after rescaling to [margin, 1 - margin].

        p = margin + (1 - 2 margin) (x + 1)/2,    z = log p - log(1 - p)
        log |dz/dx| = softplus(z) + softplus(-z) + log(1/2 - margin)

    References:
        Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017, https://arxiv.org/abs/1605.08803
        (section 4.1, with margin .05).
    """

    def __init__(self, margin: float = 0.05):
        super().__init__()
        if not 0 < margin < 0.5:
            raise ValueError(f"margin must be in (0, 1/2), not {margin}")
        self.margin = margin

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and the log-determinant of each event, (B, ...) -> (B, ...), (B,)."""
        p = self.margin + (0.5 - self.margin) * (x + 1)
        z = torch.log(p) - torch.log1p(-p)
        log_det = F.softplus(z) + F.softplus(-z) + math.log(0.5 - self.margin)
        return z, log_det.flatten(1).sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        """Return x, which may lie slightly outside [-1, 1]."""
        return (torch.sigmoid(z) - self.margin) / (0.5 - self.margin) - 1


class BatchNorm(nn.Module):
    """Invertible batch normalisation over dimension 1, (B, C, ...) -> (B, C, ...).

        z = (x - mean)/sqrt(variance + eps)
        log |det| = -h w sum log(variance + eps)/2

    Mean and variance are those of the batch in training, and running averages in evaluation and in the inverse. The
    log-determinant treats them as constants.

    References:
        Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017, https://arxiv.org/abs/1605.08803
        (section 3.7).

    Args:
        channels: C.
        momentum: weight of a batch in the running averages.
        eps: added to the variance.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-4):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and the log-determinant, shared by the batch, ()."""
        mean, variance = self.mean, self.variance
        if self.training:
            variance, mean = distributed.pooled_moments(*torch.var_mean(x, dim=(0, *range(2, x.ndim)), correction=0))
            self.mean.lerp_(mean.detach(), self.momentum)
            self.variance.lerp_(variance.detach(), self.momentum)
        log_scale = -0.5 * torch.log(variance + self.eps)
        per_channel = (-1, *[1] * (x.ndim - 2))
        z = (x - mean.view(per_channel)) * log_scale.exp().view(per_channel)
        return z, log_scale.sum() * math.prod(x.shape[2:])

    def inverse(self, z: Tensor) -> Tensor:
        per_channel = (-1, *[1] * (z.ndim - 2))
        return z * torch.sqrt(self.variance + self.eps).view(per_channel) + self.mean.view(per_channel)
