r"""The network of a hierarchical VAE: a deterministic bottom-up path and a top-down path of stochastic layers.

Resolutions are halved down to a final single pixel: 32 -> 16 -> 8 -> 4 -> 1. The bottom-up path computes an activation ``a`` at
each resolution. The top-down path is a residual stream ``h`` that starts as a constant; at rung l it parameterises the prior
and, with the activation of its resolution, the posterior of the latent z_l, which is added to it:

    p(z_l | z_<l) from prior(h),      h <- h + features(h) + W z_l,
    q(z_l | z_<l, x) from posterior([h, a]),      h <- h + block(h).

Vectors are images of one pixel, where convolutions are linear maps.

Shapes: B batch, C channels of the stream, Z of a latent, H height, W width.

References:
    Child, "Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images", 2021,
    https://arxiv.org/abs/2011.10650 (section 3), and https://github.com/openai/vdvae, for the blocks, the topology and the
    initialisation.
    Sonderby et al., "Ladder Variational Autoencoders", 2016, https://arxiv.org/abs/1602.02282.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.nn.embeddings import embed
from genzoo.nn.resnet import resolutions

Size = tuple[int, int]


def _conv(inputs: int, outputs: int, size: Size, side: int = 1, scale: float = 1.0) -> nn.Module:
    """Build a convolution with zero-initialised bias.

    Args:
        inputs, outputs: channels.
        size: of the feature map. For a single pixel it is a linear layer, twice as fast on a CPU.
        side: kernel size, for feature maps larger than 2x2; otherwise 1.
        scale: factor of the initial weights; N^-1/2 for N residual branches preserves the scale of the stream.
    """
    side = side if min(size) > 2 else 1
    single = size == (1, 1)
    conv = nn.Linear(inputs, outputs) if single else nn.Conv2d(inputs, outputs, side, padding=side // 2)
    with torch.no_grad():
        conv.weight *= scale
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Flatten(), conv, nn.Unflatten(1, (outputs, 1, 1))) if single else conv


def _bottleneck(inputs: int, inner: int, outputs: int, size: Size, scale: float = 1.0) -> nn.Sequential:
    """Build a bottleneck of four convolutions, 1x1, 3x3, 3x3, 1x1; ``scale`` is that of the last one."""
    convs = [
        _conv(inputs, inner, size),
        _conv(inner, inner, size, side=3),
        _conv(inner, inner, size, side=3),
        _conv(inner, outputs, size, scale=scale),
    ]
    return nn.Sequential(*(layer for conv in convs for layer in (nn.GELU(), conv)))


class Entry(nn.Module):
    """The initial stream at a resolution: a learned constant, the condition and the upsampled stream."""

    def __init__(self, width: int, size: Size, condition: Condition | None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width, *size))
        self.embed_y = embed(condition, width)

    def forward(self, h_BCHW: Tensor, y_B: Tensor | None) -> Tensor:
        h_BCHW = self.bias + F.interpolate(h_BCHW, size=self.bias.shape[1:], mode="nearest")
        return h_BCHW if self.embed_y is None else h_BCHW + self.embed_y(y_B)[:, :, None, None]


class Rung(nn.Module):
    """A stochastic layer of the top-down path.

    Args:
        width: C.
        channels: Z.
        inner: bottleneck width.
        size: (H, W).
        scale: of the initial weights of residual branches.
        entry: for the first rung of a resolution.
    """

    def __init__(self, width: int, channels: int, inner: int, size: Size, scale: float, entry: Entry | None):
        super().__init__()
        self.entry, self.size = entry, size
        self.split = [2 * channels, width]
        self.of_prior = _bottleneck(width, inner, sum(self.split), size, scale=0.0)  # initialised as N(0, 1)
        self.of_posterior = _bottleneck(2 * width, inner, 2 * channels, size)
        self.project = _conv(channels, width, size, scale=scale)
        self.block = _bottleneck(width, inner, width, size, scale=scale)

    def enter(self, h_BCHW: Tensor, y_B: Tensor | None) -> Tensor:
        """Bring the stream to this resolution."""
        return h_BCHW if self.entry is None else self.entry(h_BCHW, y_B)

    def prior(self, h_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log std of p(z | h), (B, 2Z, H, W), and the features added to the stream, (B, C, H, W)."""
        moments, features = self.of_prior(h_BCHW).split(self.split, dim=1)
        return moments, features

    def posterior(self, h_BCHW: Tensor, a_BCHW: Tensor) -> Tensor:
        """Return mean and log std of q(z | h, x), (B, 2Z, H, W)."""
        return self.of_posterior(torch.cat([h_BCHW, a_BCHW], dim=1))

    def merge(self, h_BCHW: Tensor, z_BZHW: Tensor) -> Tensor:
        """Add a latent to the stream, and apply the residual block."""
        h_BCHW = h_BCHW + self.project(z_BZHW)
        return h_BCHW + self.block(h_BCHW)


def _per_size(name: str, blocks: int | Sequence[int], sizes: Sequence[Size]) -> list[int]:
    """Return the number of blocks at each resolution."""
    counts = [blocks] * len(sizes) if isinstance(blocks, int) else list(blocks)
    if len(counts) != len(sizes) or min(counts) < 1:
        listed = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise ValueError(f"{name} must be a positive number, or one for each of the sizes {listed}, not {blocks}")
    return counts


class Ladder(nn.Module):
    """The bottom-up and the top-down path of a hierarchical VAE.

    Args:
        in_shape: of the event, (C, H, W) or (D,).
        out_shape: of the output, of the same rank.
        condition: of the model; None for an unconditional network.
        width: channels of both streams.
        latent_channels: Z, of every rung.
        up: residual blocks at each resolution, finest first, or one number for all; the last one of each resolution but the
            coarsest is followed by pooling.
        down: rungs at each resolution, finest first, or one number for all.
        bottleneck: bottleneck width, in units of ``width``.
        patch: side of the pixel blocks folded into channels at the input and unfolded at the output.

    Raises:
        ValueError: if ``patch`` does not divide the sides, or a list has the wrong length.
    """

    zeros: Tensor

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 64,
        latent_channels: int = 16,
        up: int | Sequence[int] = 2,
        down: int | Sequence[int] = 2,
        bottleneck: float = 0.25,
        patch: int = 1,
    ):
        super().__init__()
        if min(width, latent_channels, patch) < 1 or bottleneck <= 0:
            given = f"{width}, {latent_channels}, {patch} and {bottleneck}"
            raise ValueError(f"width, latent_channels, patch and bottleneck must be positive, not {given}")
        channels, H, W = (*in_shape, 1, 1)[:3]
        if H % patch or W % patch:
            raise ValueError(f"patch={patch} does not divide the {H}x{W} image")
        self.in_shape, self.out_shape, self.patch = (channels, H, W), tuple(out_shape), patch
        sizes = resolutions(H // patch, W // patch)
        self.sizes = sizes if sizes[-1] == (1, 1) else [*sizes, (1, 1)]
        ups, self.downs = _per_size("up", up, self.sizes), _per_size("down", down, self.sizes)
        inner = max(1, int(bottleneck * width))

        self.stem = _conv(channels * patch**2, width, self.sizes[0], side=3)
        scale = sum(ups) ** -0.5
        blocks = [
            nn.ModuleList(_bottleneck(width, inner, width, size, scale=scale) for _ in range(count))
            for size, count in zip(self.sizes, ups, strict=True)
        ]
        self.up: Sequence[Sequence[nn.Module]] = nn.ModuleList(blocks)  # type: ignore[assignment]
        scale = sum(self.downs) ** -0.5
        rungs = []
        for size, count in zip(reversed(self.sizes), reversed(self.downs), strict=True):
            for i in range(count):
                entry = None if i else Entry(width, size, condition)
                rungs.append(Rung(width, latent_channels, inner, size, scale, entry))
        self.rungs: Sequence[Rung] = nn.ModuleList(rungs)  # type: ignore[assignment]
        self.latents = [(latent_channels, *rung.size) for rung in rungs]
        self.register_buffer("zeros", torch.zeros(width, 1, 1), persistent=False)
        self.head = _conv(width, self.out_shape[0] * patch**2, self.sizes[0])

    def bottom_up(self, x: Tensor) -> list[Tensor]:
        """Return the activation for each rung, from top to bottom: (B, *in_shape) -> (B, C, H, W) each."""
        h_BCHW = self.stem(F.pixel_unshuffle(x.reshape(-1, *self.in_shape), self.patch))
        activations: list[Tensor] = []
        for i, (*blocks, last) in enumerate(self.up):
            for block in blocks:
                h_BCHW = h_BCHW + block(h_BCHW)
            if i < len(self.up) - 1:
                activations += [h_BCHW] * self.downs[i]
                (H, W), (lower_H, lower_W) = self.sizes[i : i + 2]
                h_BCHW = F.avg_pool2d(h_BCHW + last(h_BCHW), (H // lower_H, W // lower_W))
        activations += [h_BCHW + last(h_BCHW)] * self.downs[-1]
        return activations[::-1]

    def top(self, n: int) -> Tensor:
        """Return the initial stream, zero, (n, C, 1, 1)."""
        return self.zeros.expand(n, -1, -1, -1)

    def output(self, h_BCHW: Tensor) -> Tensor:
        """Map the final stream to the output, (B, C, H, W) -> (B, *out_shape)."""
        return F.pixel_shuffle(self.head(h_BCHW), self.patch).reshape(-1, *self.out_shape)
