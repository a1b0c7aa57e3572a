r"""A transformer encoder of text. Shapes: B batch, L tokens, E width.

Tokens have learned embeddings of their values and positions; a pre-norm layer is

    h <- h + Attention(LayerNorm(h)),    h <- h + W_2 gelu(W_1 LayerNorm(h))

with attention from every token to all tokens but the padding.

References:
    Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762 (section 3.1).
    Nichol et al., "GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models", 2022,
    https://arxiv.org/abs/2112.10741 (section 3: the sequence of token embeddings, and one vector for the whole text).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genzoo.nn.attention import attend

PADDING = 0  # token


class EncoderBlock(nn.Module):
    """A pre-norm transformer block with full attention, (B, L, E) -> (B, L, E)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h_BLE: Tensor, mask_BL: Tensor) -> Tensor:
        """Apply to a sequence; the mask is true where tokens are attended to."""
        B, L, E = h_BLE.shape
        q, k, v = self.qkv(self.norm1(h_BLE)).view(B, L, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        attended = attend(q, k, v, mask_BL)
        h = h_BLE + self.out(attended.transpose(1, 2).reshape(B, L, E))
        return h + self.mlp(self.norm2(h))


class TextEncoder(nn.Module):
    """A transformer of tokens, (B, L) int64 -> (B, L, E).

    Args:
        length: L.
        vocabulary: number of tokens, that of the null value included.
        width: E.
        layers: number of layers.
        heads: attention heads per layer; None for one of every 32 features, if that divides the width.

    Raises:
        ValueError: if ``heads`` does not divide the width.
    """

    def __init__(self, length: int, vocabulary: int, width: int, layers: int = 2, heads: int | None = None):
        super().__init__()
        heads = heads or max(h for h in range(1, max(width // 32, 1) + 1) if width % h == 0)
        if layers < 1:
            raise ValueError(f"layers must be at least 1, not {layers}")
        if width % heads:
            raise ValueError(f"heads={heads} does not divide the width {width}")
        self.width = width
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, y_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of all tokens, (B, L, E), and a mask that is false on padding, (B, L)."""
        mask_BL = y_BL != PADDING
        mask_BL[:, 0] = True  # so that no row is empty
        h = self.tokens(y_BL) + self.positions
        for block in self.blocks:
            h = block(h, mask_BL)
        return self.norm(h), mask_BL

    @staticmethod
    def pooled(h_BLE: Tensor, mask_BL: Tensor) -> Tensor:
        """Average over all tokens but the padding, (B, E)."""
        weight = mask_BL.to(h_BLE.dtype)
        return (h_BLE * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
