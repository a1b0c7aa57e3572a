"""The networks of DCGAN: strided convolutions and batch norm. Shapes: B batch, C channels, H height, W width.

The generator upsamples with transposed convolutions and ends with a convolution at full resolution; the critic downsamples
with strided convolutions. The resolutions are those of ``genzoo.nn.resnet.resolutions``, down to 4 or 7 for common sizes. The
critic's batch norm has no running statistics, which generator steps would change; a critic is evaluated on batches only.

References:
    Radford, Metz, Chintala, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
    Networks", 2016, https://arxiv.org/abs/1511.06434 (sections 3 and 4).
    Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018, https://arxiv.org/abs/1802.05957
    (appendix B, the standard CNN: convolutions at full resolution, and 3x3 convolutions between the strided ones).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.nn.embeddings import embed
from genzoo.nn.layers import BatchNorm2d, apply_spectral_norm
from genzoo.nn.resnet import resolutions


def _initialise(network: nn.Module) -> None:
    """Draw the weights of all convolutions and dense layers from N(0, 0.02^2) (Radford et al. 2016, section 4)."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, std=0.02)


class DCGANGenerator(nn.Module):
    """Vector to image, (B, *in_shape) -> (B, C, H, W).

    Args:
        in_shape: of one input.
        out_shape: (C, H, W).
        condition: of the model, whose embedding is added to the input; None for an unconditional network.
        width: channels at full resolution; doubled at each downsampling.
    """

    def __init__(
        self, in_shape: Sequence[int], out_shape: Sequence[int], condition: Condition | None = None, width: int = 64
    ):
        super().__init__()
        channels, *sides = out_shape
        sizes = resolutions(*sides)
        widths = [width * 2**i for i in reversed(range(len(sizes)))]
        features = math.prod(in_shape)
        self.start = (widths[0], *sizes[-1])
        self.embed_y = embed(condition, features)
        self.stem = nn.Linear(features, math.prod(self.start))
        layers: list[nn.Module] = [BatchNorm2d(widths[0]), nn.ReLU()]
        for before, w in itertools.pairwise(widths):
            layers += [nn.ConvTranspose2d(before, w, 4, stride=2, padding=1, bias=False), BatchNorm2d(w), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))
        _initialise(self)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        z = z.flatten(1)
        if self.embed_y is not None:
            z = z + self.embed_y(y)
        return self.body(self.stem(z).view(-1, *self.start))


class DCGANCritic(nn.Module):
    """Image to vector, (B, C, H, W) -> (B, *out_shape).

    Args:
        in_shape: (C, H, W).
        out_shape: of one output.
        condition: of the model, whose embedding scales the last features; None for an unconditional network.
        width: channels of the first convolution; doubled with each further strided one.
        refine: whether to add a 3x3 convolution first and after each downsampling, as in the CNN of Miyato et al., unlike that
            of Radford et al. Always added with fewer than two downsamplings, where the critic would be too shallow.
        norm: whether to use batch norm after every convolution but the first; not with a gradient penalty, which is per sample.
        spectral_norm: whether to apply spectral normalisation to all weights.
        slope: negative slope of the leaky ReLU.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 64,
        refine: bool = False,
        norm: bool = True,
        spectral_norm: bool = False,
        slope: float = 0.2,
    ):
        super().__init__()
        channels, *sides = in_shape
        sizes = resolutions(*sides)
        self.out_shape = tuple(out_shape)
        refine = refine or len(sizes) < 3
        convs = [(width, False)] if refine else []  # channels, and whether strided
        for i in range(1, len(sizes)):
            w = width * 2 ** (i if refine else i - 1)
            convs += [(w, True), *([(w, False)] if refine else [])]
        layers: list[nn.Module] = []
        before = channels
        for w, halve in convs:
            normed = norm and bool(layers)  # not on the input (Radford et al. 2016, section 3)
            kernel, stride = (4, 2) if halve else (3, 1)
            layers.append(nn.Conv2d(before, w, kernel, stride, padding=1, bias=not normed))
            layers += [BatchNorm2d(w, track_running_stats=False)] if normed else []
            layers.append(nn.LeakyReLU(slope))
            before = w
        self.body = nn.Sequential(*layers, nn.Flatten())
        features = before * math.prod(sizes[-1])
        self.head = nn.Linear(features, math.prod(out_shape))
        self.embed_y = embed(condition, features)
        _initialise(self)
        if spectral_norm:
            apply_spectral_norm(self)

    def forward(self, x_BCHW: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.body(x_BCHW)
        if self.embed_y is not None:
            h = h * (1 + self.embed_y(y))
        return self.head(h).view(-1, *self.out_shape)
