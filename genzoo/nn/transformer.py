r"""A causal transformer. Shapes: B batch, C channels, H height, W width, N tokens, E embedding, P parameters of a pixel.

The pixels of an image in raster order are the tokens of a sequence. Token n is pixel n - 1, the first a learned start token,
each with learned embeddings of its position and of the condition; codes among the conditions have features at each pixel, added
to the token that predicts it. A pre-norm layer is

    h <- h + Attention(LayerNorm(h)),    h <- h + W_2 gelu(W_1 LayerNorm(h))

with causal attention, from position n to positions 1..n. Sampling uses a key-value cache.

References:
    Radford, Wu, Child, Luan, Amodei, Sutskever, "Language Models are Unsupervised Multitask Learners", 2019,
    https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf (section 2.3).
    Chen et al., "Generative Pretraining from Pixels", 2020, https://proceedings.mlr.press/v119/chen20s.html (section 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.nn.attention import attend
from genzoo.nn.causal import CausalNetwork, IncrementalState
from genzoo.nn.embeddings import CodeFeatures, embed
from genzoo.nn.layers import Dropout


class KVCache:
    """The key-value cache of a layer, which grows by a few tokens at a time after those of a first call.

    Preallocation for the full sequence would leave strided views, on which attention is slower.
    """

    GROWTH = 16

    def __init__(self) -> None:
        self.length = 0
        self.buffer: Tensor | None = None

    def extend(self, kv: Tensor) -> Tensor:
        """Append keys and values of n tokens, (2, B, heads, n, E/heads); return all, (2, B, heads, length, E/heads)."""
        n = kv.shape[3]
        if self.buffer is None or self.length + n > self.buffer.shape[3]:
            room = kv.new_empty(*kv.shape[:3], n - 1 + self.GROWTH, kv.shape[4])
            self.buffer = room if self.buffer is None else torch.cat([self.buffer, room], dim=3)
        self.buffer[..., self.length : self.length + n, :] = kv
        self.length += n
        return self.buffer[..., : self.length, :]


class Block(nn.Module):
    """A pre-norm transformer block with causal attention, (B, N, E) -> (B, N, E)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = Dropout(dropout)

    def forward(self, h_BNE: Tensor, cache: KVCache | None = None) -> Tensor:
        """Apply to a sequence, or with a cache to its first tokens and then to one token at a time."""
        B, N, E = h_BNE.shape
        qkv = self.qkv(self.norm1(h_BNE)).view(B, N, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        kv = qkv[1:] if cache is None else cache.extend(qkv[1:])
        first = kv.shape[3] == N
        assert first or N == 1, "one token at a time follows the first ones"
        attended = attend(qkv[0], kv[0], kv[1], causal=first)
        h = h_BNE + self.dropout(self.out(attended.transpose(1, 2).reshape(B, N, E)))
        return h + self.dropout(self.mlp(self.norm2(h)))


class Transformer(CausalNetwork):
    """A decoder-only transformer, (B, C, H, W) and conditions -> (B, P, H, W).

    Args:
        in_shape: (C, H, W).
        out_shape: (P, H, W).
        condition: of the model; None for an unconditional network.
        width: E.
        layers: number of layers.
        heads: attention heads per layer.
        dropout: after the embeddings, the attention and the MLP of each layer.

    Raises:
        ValueError: if ``heads`` does not divide the width.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, not {layers}")
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} does not divide the width {width}")
        channels, *self.sides = in_shape
        self.tokens = self.sides[0] * self.sides[1]
        # An MLP, since the next pixel's distribution is a nonlinear function of a scalar grey value.
        self.stem = nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width))
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.positions = nn.Parameter(0.02 * torch.randn(self.tokens, width))
        self.code_features = CodeFeatures(condition, width, self.sides)
        self.embed_y = embed(self.code_features.rest, width, null=True)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, out_shape[0])

    def embed(self, y: Tensor | None) -> Tensor | float:
        """Return the embedding of the condition, added to every token, (B, 1, E); of codes to each, (B, N, E)."""
        features, y = self.code_features(y)
        e = self.embed_y(y)[:, None] if self.embed_y is not None else 0.0
        return e if features is None else features.flatten(2).transpose(1, 2) + e

    def forward(self, x_BCHW: Tensor, y: Tensor | None = None) -> Tensor:
        tokens_BNE = self.stem(x_BCHW.flatten(2).transpose(1, 2)[:, :-1])
        start_B1E = self.start.to(tokens_BNE.dtype).expand(len(x_BCHW), 1, -1)
        h = self.dropout(torch.cat([start_B1E, tokens_BNE], dim=1) + self.positions + self.embed(y))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)).transpose(1, 2).unflatten(2, tuple(self.sides))

    def incremental(self, n: int, y: Tensor | None = None) -> IncrementalState:
        return _TransformerState(self, n, y)


class _TransformerState(IncrementalState):
    """The key-value caches of all layers."""

    def __init__(self, network: Transformer, n: int, y: Tensor | None):
        self.network, self.n, self.position = network, n, 0
        self.embedding = network.embed(y)
        self.caches = [KVCache() for _ in network.blocks]

    def step(self, pixel_BC: Tensor | None) -> Tensor:
        network = self.network
        token = network.start.expand(self.n, 1, -1) if pixel_BC is None else network.stem(pixel_BC[:, None])
        e = self.embedding
        if isinstance(e, Tensor) and e.shape[1] > 1:
            e = e[:, self.position, None]
        h = network.dropout(token + network.positions[self.position] + e)
        self.position += 1
        for block, cache in zip(network.blocks, self.caches, strict=True):
            h = block(h, cache)
        return network.head(network.norm(h))[:, 0]
