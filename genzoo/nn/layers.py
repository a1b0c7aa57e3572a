"""Shared layers. Shapes: B batch, C channels, H height, W width, N tokens, E embedding.

Every network of this package is built as ``Network(in_shape, out_shape, condition=None, **hyperparameters)``; families take
the class, or a ``functools.partial`` with hyperparameters, and provide the shapes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from genzoo.conditions import Condition
from genzoo.nn.attention import attend
from genzoo.nn.embeddings import embed
from genzoo.numerics import distributed


def zero_(module: nn.Module) -> nn.Module:
    """Zero-initialise a layer."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with the most groups, up to 32, that divide the channels into at least 4 each."""
    groups = max(g for g in range(1, min(32, max(channels // 4, 1)) + 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def apply_spectral_norm(network: nn.Module) -> None:
    """Apply spectral normalisation to all weights of a network.

    Singular vectors are updated by one power iteration per training pass, not in evaluation.

    References:
        Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018,
        https://arxiv.org/abs/1802.05957 (section 2.1; appendix A, the algorithm).
    """
    for module in list(network.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            spectral_norm(module)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm with statistics of the global batch in distributed training.

    In one process it is bitwise identical to torch's. ``nn.SyncBatchNorm`` supports GPUs only.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(x_BCHW)
        h = x_BCHW.to(torch.promote_types(x_BCHW.dtype, torch.float32))
        variance, mean = distributed.pooled_moments(*torch.var_mean(h, dim=(0, 2, 3), correction=0))
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            assert self.momentum is not None
            n = distributed.world_size() * h.numel() // h.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * (n / (n - 1)), self.momentum)
        h = (h - mean[:, None, None]) * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            h = h * self.weight[:, None, None] + self.bias[:, None, None]
        return h.to(x_BCHW.dtype)


class Dropout(nn.Dropout):
    """Dropout whose mask is drawn for the global batch in distributed training; each rank uses its own rows.

    In one process it is bitwise identical to torch's. All ranks must have the same seed of torch's global generator.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Set each element to zero with probability ``p``, (B, ...) -> (B, ...)."""
        if not self.training or distributed.world_size() == 1 or not self.p:
            return super().forward(x)
        # A single process draws in memory order: the mask has the memory format of x.
        order = sorted(range(x.ndim), key=x.stride, reverse=True)
        sizes = [distributed.world_size() * len(x), *x.shape[1:]]
        ones = torch.ones([sizes[d] for d in order], dtype=x.dtype, device=x.device)
        mask = F.dropout(ones.permute([order.index(d) for d in range(x.ndim)]), self.p)
        return x * mask[distributed.rank() * len(x) : (distributed.rank() + 1) * len(x)]


class SinusoidalEmbedding(nn.Module):
    """Sines and cosines of ``1000 t`` at geometric frequencies, (B,) -> (B, E).

    References:
        Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762 (section 3.5).
    """

    frequencies: Tensor

    def __init__(self, features: int, max_period: float = 10_000.0):
        super().__init__()
        if features < 4 or features % 2:
            raise ValueError(f"a sinusoidal embedding needs an even number of features, at least 4, not {features}")
        half = features // 2
        frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float64) / (half - 1)) * 1000
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.to(self.frequencies.dtype)[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimeAndCondition(nn.Module):
    """Embedding of time and condition, (B,), (B, *condition.shape) -> (B, E).

    Args:
        features: E.
        condition: of the model; None for an unconditional network.
        frequencies: dimension of the sinusoidal embedding of time.
    """

    def __init__(self, features: int, condition: Condition | None, frequencies: int):
        super().__init__()
        self.time = nn.Sequential(
            SinusoidalEmbedding(frequencies), nn.Linear(frequencies, features), nn.SiLU(), nn.Linear(features, features)
        )
        self.condition = NullableCondition(condition, features)

    def forward(self, t: Tensor, y: Tensor | None) -> Tensor:
        return self.condition(self.time(t), y)


class NullableCondition(nn.Module):
    """Add the embedding of a condition, for y = None of the null value, (B, E), (B, *condition.shape) -> (B, E).

    Args:
        condition: None for an unconditional network, where this is the identity.
        features: E.
    """

    def __init__(self, condition: Condition | None, features: int):
        super().__init__()
        self.spec = condition
        self.embed_y = embed(condition, features, null=True)

    def forward(self, h_BE: Tensor, y: Tensor | None) -> Tensor:
        if self.spec is None or self.embed_y is None:
            return h_BE
        if y is None:
            y = self.spec.missing(len(h_BE), h_BE.device, h_BE.dtype)
        return h_BE + self.embed_y(y)


class ResBlock(nn.Module):
    """A residual block of two normalised 3x3 convolutions, conditioned on an embedding.

    The embedding is added after the first convolution, or with ``scale_shift`` scales and shifts the second norm.

    References:
        Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239 (appendix B).
        Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, https://arxiv.org/abs/2102.09672
        (appendix A).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int = 0,
        dropout: float = 0.0,
        scale_shift: bool = False,
    ):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = scale_shift
        self.project = nn.Linear(embedding, (2 if scale_shift else 1) * out_channels) if embedding else None
        self.norm2 = group_norm(out_channels)
        self.dropout = Dropout(dropout)
        self.conv2 = zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x_BCHW: Tensor, e_BE: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_BCHW)))
        e = None if self.project is None or e_BE is None else self.project(F.silu(e_BE))[:, :, None, None]
        if self.scale_shift and e is not None:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h if e is None else h + e)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.skip(x_BCHW) + h


class UpsampleConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling, by default by 2, and a 3x3 convolution, (B, C, H, W) -> (B, C', *size).

    Upsampling by 2 is fused with the convolution: a 3x3 window covers at most 2x2 different pixels, whose weights are summed
    first. The result is a transposed convolution of stride 2 with a 4x4 kernel, with 4/9 of the multiplications.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        H, W = x_BCHW.shape[-2:]
        if size not in (None, (2 * H, 2 * W)):
            return super().forward(F.interpolate(x_BCHW, size=size, mode="nearest"))
        # Sums of 2x2 weights.
        weight = F.avg_pool2d(self.weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1).transpose(0, 1)
        return F.conv_transpose2d(x_BCHW, weight, self.bias, stride=2, padding=1)


class Attention(nn.Module):
    """Residual self-attention over the pixels of a feature map.

    Args:
        channels: C.
        head_channels: channels per head; None for a single head.
        scale: factor of the residual sum.
    """

    def __init__(self, channels: int, head_channels: int | None = None, scale: float = 1.0):
        super().__init__()
        if head_channels is not None and channels % head_channels:
            raise ValueError(f"head_channels={head_channels} does not divide the {channels} channels")
        self.scale = scale
        self.heads = 1 if head_channels is None else channels // head_channels
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_(nn.Conv2d(channels, channels, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        # The fused kernel is slow for strided inputs.
        qkv_BHNC = (
            self.qkv(self.norm(x_BCHW)).view(B, 3 * self.heads, C // self.heads, H * W).transpose(2, 3).contiguous()
        )
        q, k, v = qkv_BHNC.chunk(3, dim=1)
        h = attend(q, k, v)
        return self.scale * (x_BCHW + self.out(h.transpose(2, 3).reshape(B, C, H, W)))
