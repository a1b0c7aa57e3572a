r"""The perceptual distance of two images in the layers of an embedded classifier.

    d(x, y) = sum_l mean over positions of |phi_l(x)/|phi_l(x)| - phi_l(y)/|phi_l(y)||^2

with ``phi_l`` the activations before each downsampling and after the last layer, and norms over channels. The layers have equal
weights, where LPIPS has learned ones. It is differentiable, so that a codec can be trained by it.

A score by the same network, such as ``fd_digits``, favours models that were trained by it.

References:
    Zhang, Isola, Efros, Shechtman, Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018,
    https://arxiv.org/abs/1801.03924 (eq. 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.metrics.features import Embedded, FeatureError

CLASSIFIERS = ("digits", "fashion_mnist")  # embedded


class PerceptualDistance(nn.Module):
    """The perceptual distance by a frozen embedded classifier, always in evaluation mode.

    Args:
        name: of an embedded classifier, "digits" or "fashion_mnist"; images of another size are resized, colour is averaged.

    Raises:
        FeatureError: for another name.
    """

    def __init__(self, name: str):
        super().__init__()
        if name not in CLASSIFIERS:
            raise FeatureError(f"perceptual network '{name}': choose {' or '.join(CLASSIFIERS)}")
        found = Embedded(name).network
        self.side = found.side
        self.body = found.body.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stay in evaluation mode, whose batch norm has the statistics of the classifier's training data."""
        return super().train(False)

    def _layers(self, x: Tensor) -> list[Tensor]:
        h = x.mean(1, keepdim=True)
        if h.shape[-2:] != (self.side, self.side):
            h = F.interpolate(h, (self.side, self.side), mode="bilinear", antialias=True)
        layers = []
        for layer in self.body:
            if isinstance(layer, nn.MaxPool2d):
                layers.append(h)
            h = layer(h)
        return [*layers, h]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of each pair of images on [-1, 1], (B, C, H, W) each -> (B,)."""
        n = len(x)
        total = x.new_zeros(n)
        for layer in self._layers(torch.cat([x, y])):
            a, b = F.normalize(layer, dim=1, eps=1e-8).split(n)
            total = total + (a - b).square().sum(1).mean((1, 2))
        return total
