r"""A causal transformer. Shapes: B batch, C channels, H height, W width, N tokens, E embedding, P parameters of a pixel.

The pixels of an image in raster order are the tokens of a sequence. Token n is the pixel before pixel n, the first a learned
start, each with a learned embedding of its position and of the class; a layer with its normalisations in front is

    h <- h + Attention(LayerNorm(h)),    h <- h + W_2 gelu(W_1 LayerNorm(h))

where position n attends to positions 1..n alone. An image is made token by token, with the keys and values of all earlier
tokens kept.

References:
    Radford, Wu, Child, Luan, Amodei, Sutskever, "Language Models are Unsupervised Multitask Learners", 2019,
    https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf (section 2.3).
    Chen et al., "Generative Pretraining from Pixels", 2020, https://proceedings.mlr.press/v119/chen20s.html (section 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition, embed
from genzoo.nn.causal import CausalNetwork, Walk
from genzoo.nn.layers import Dropout, attend


class Memory:
    """Keys and values of the tokens that one layer has seen, in storage that grows by a few tokens at a time.

    Storage for all that it will see would leave a gap behind those of each head, and reading across gaps takes longer.
    """

    GROWTH = 16

    def __init__(self) -> None:
        self.seen = 0
        self.stored: Tensor | None = None

    def extend(self, kv: Tensor) -> Tensor:
        """Add the next token's key and value, (2, B, heads, 1, E/heads), and return all, (2, B, heads, seen, E/heads)."""
        if self.stored is None or self.seen == self.stored.shape[3]:
            room = kv.new_empty(*kv.shape[:3], self.GROWTH, kv.shape[4])
            self.stored = room if self.stored is None else torch.cat([self.stored, room], dim=3)
        self.stored[..., self.seen : self.seen + 1, :] = kv
        self.seen += 1
        return self.stored[..., : self.seen, :]


class Block(nn.Module):
    """Causal attention and a perceptron, each behind a normalisation and beside a skip, (B, N, E) -> (B, N, E)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = Dropout(dropout)

    def forward(self, h_BNE: Tensor, memory: Memory | None = None) -> Tensor:
        """Run on a whole sequence, or with a memory on the one token that follows those remembered."""
        B, N, E = h_BNE.shape
        qkv = self.qkv(self.norm1(h_BNE)).view(B, N, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        if memory is None:
            attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        else:
            attended = attend(qkv[0], *memory.extend(qkv[1:]))
        h = h_BNE + self.dropout(self.out(attended.transpose(1, 2).reshape(B, N, E)))
        return h + self.dropout(self.mlp(self.norm2(h)))


class Transformer(CausalNetwork):
    """A decoder-only transformer, (B, C, H, W) and conditions -> (B, P, H, W).

    Args:
        in_shape: (C, H, W).
        out_shape: (P, H, W).
        condition: of the model; None for an unconditional network.
        width: E.
        layers: how many.
        heads: of each layer.
        dropout: after the embeddings and both halves of each layer.

    Raises:
        ValueError: where ``heads`` does not divide the width.
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
        # A perceptron and not a matrix: a grey value is one number, of which the law of the next is no linear function.
        self.stem = nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width))
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.positions = nn.Parameter(0.02 * torch.randn(self.tokens, width))
        self.embed_y = embed(condition, width)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, out_shape[0])

    def embed(self, y: Tensor | None) -> Tensor | float:
        """Return what the class adds to every token, (B, 1, E)."""
        return self.embed_y(y)[:, None] if self.embed_y is not None else 0.0

    def forward(self, x_BCHW: Tensor, y: Tensor | None = None) -> Tensor:
        tokens_BNE = self.stem(x_BCHW.flatten(2).transpose(1, 2)[:, :-1])
        start_B1E = self.start.to(tokens_BNE.dtype).expand(len(x_BCHW), 1, -1)
        h = self.dropout(torch.cat([start_B1E, tokens_BNE], dim=1) + self.positions + self.embed(y))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)).transpose(1, 2).unflatten(2, tuple(self.sides))

    def walk(self, n: int, y: Tensor | None = None) -> Walk:
        return _TokenWalk(self, n, y)


class _TokenWalk(Walk):
    """Remembers the keys and values of each layer."""

    def __init__(self, network: Transformer, n: int, y: Tensor | None):
        self.network, self.n, self.position = network, n, 0
        self.embedding = network.embed(y)
        self.memories = [Memory() for _ in network.blocks]

    def step(self, pixel_BC: Tensor | None) -> Tensor:
        network = self.network
        token = network.start.expand(self.n, 1, -1) if pixel_BC is None else network.stem(pixel_BC[:, None])
        h = network.dropout(token + network.positions[self.position] + self.embedding)
        self.position += 1
        for block, memory in zip(network.blocks, self.memories, strict=True):
            h = block(h, memory)
        return network.head(network.norm(h))[:, 0]
