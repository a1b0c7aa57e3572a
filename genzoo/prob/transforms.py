"""Fixed invertible transformations and their log-determinants."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Logit(nn.Module):
    """From [-1, 1] to the real line: squeeze to [margin, 1 - margin], then a logit.

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
        """Return x; a latent beyond the squeezed interval lands outside [-1, 1]."""
        return (torch.sigmoid(z) - self.margin) / (0.5 - self.margin) - 1
