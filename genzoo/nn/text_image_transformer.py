r"""A causal transformer over a text and the codes of an image. Shapes: B batch, L text tokens, H height, W width, N = HW codes,
K values of a code, V values of a text token, E embedding.

One sequence holds a start token, the L tokens of the text, and the codes in raster order. The output at each place predicts the
next one, text tokens and codes by separate layers:

    place     0      1   ...  L-1      L        L+1  ...  L+N-1
    input   start   t_1  ... t_(L-1)  t_L       x_1  ... x_(N-1)
    output   t_1    t_2  ... t_L      x_1       x_2  ... x_N

The embedding of a text token is that of its value plus that of its place, of a code that of its value plus those of its row and
of its column. A place after the end of a text has an embedding of its own, whatever token it holds, and is attended to (the
"padding tokens" of Ramesh et al.). The blocks are those of ``genzoo.nn.transformer``, with dense causal attention.

References:
    Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021, https://arxiv.org/abs/2102.12092 (section 2.2; appendix B.1:
    embeddings, padding tokens; its sparse attention is for sequences of 1,280 tokens).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition, Tokens
from genzoo.nn.causal import IncrementalState
from genzoo.nn.layers import Dropout
from genzoo.nn.transformer import Block, KVCache
from genzoo.numerics.precision import cumulative_sum

PADDING, END = 0, 1  # tokens of a text


def after_end(text_BL: Tensor) -> Tensor:
    """Return the places after the end of each text, (B, L) bool: after its first end token, and from its first padding on."""
    ends_BL = ((text_BL == END) | (text_BL == PADDING)).float()
    before_BL = cumulative_sum(ends_BL, 1) - ends_BL
    return (before_BL > 0) | (text_BL == PADDING)


class TextImageTransformer(nn.Module):
    """A decoder-only transformer of texts and images, (B, L) and (B, H, W) integers -> (B, L, V - 1) and (B, K, H, W).

    Its logits of a text token are those of the tokens 1..V-1, since padding is never predicted.

    Args:
        in_shape: (1, H, W), of a grid of codes.
        out_shape: (K, H, W).
        condition: of the text.
        width: E.
        layers: number of layers.
        heads: attention heads per layer.
        dropout: after the embeddings, the attention and the MLP of each layer.

    Raises:
        ValueError: for a condition that is no text, and if ``heads`` does not divide the width.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__()
        if not isinstance(condition, Tokens):
            raise ValueError(f"a text-image transformer needs a text as its condition, not {condition}")
        if layers < 1:
            raise ValueError(f"layers must be at least 1, not {layers}")
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} does not divide the width {width}")
        _, *self.sides = in_shape
        self.length = condition.length
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.tokens = nn.Embedding(condition.vocabulary + 1, width)  # with the null value
        self.places = nn.Parameter(0.02 * torch.randn(self.length, width))
        self.padding = nn.Parameter(0.02 * torch.randn(self.length, width))
        self.codes = nn.Parameter(0.02 * torch.randn(out_shape[0], width))
        self.rows = nn.Parameter(0.02 * torch.randn(self.sides[0], 1, width))
        self.columns = nn.Parameter(0.02 * torch.randn(self.sides[1], width))
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.text_head = nn.Linear(width, condition.vocabulary - 1)
        self.head = nn.Linear(width, out_shape[0])

    def _prefix(self, text_BL: Tensor) -> Tensor:
        """Embed the start and the text, (B, 1 + L, E)."""
        embedded_BLE = torch.where(after_end(text_BL)[..., None], self.padding, self.tokens(text_BL) + self.places)
        start_B1E = self.start.expand(len(text_BL), 1, -1)
        return torch.cat([start_B1E, embedded_BLE], dim=1)

    def _positions(self) -> Tensor:
        """Return the embeddings of the positions of all codes, (N, E)."""
        return (self.rows + self.columns).flatten(0, 1)

    def forward(self, text_BL: Tensor, codes_BHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of all text tokens and codes, each given those before it."""
        codes_BNE = (F.embedding(codes_BHW.flatten(1), self.codes) + self._positions())[:, :-1]
        h = self.dropout(torch.cat([self._prefix(text_BL), codes_BNE], dim=1))
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        text_BLV, image_BNK = self.text_head(h[:, : self.length]), self.head(h[:, self.length :])
        return text_BLV, image_BNK.transpose(1, 2).unflatten(2, tuple(self.sides))

    def incremental(self, text_BL: Tensor) -> IncrementalState:
        """Return the state from which the codes of images of these texts are drawn, (B, 1) int64 each."""
        return _State(self, text_BL)


class _State(IncrementalState):
    """The key-value caches of all layers; the first step evaluates the text in parallel."""

    def __init__(self, network: TextImageTransformer, text_BL: Tensor):
        self.network, self.text = network, text_BL
        self.positions = network._positions()
        self.number = 0  # of codes so far
        self.caches = [KVCache() for _ in network.blocks]

    def step(self, pixel_BC: Tensor | None) -> Tensor:
        network = self.network
        if pixel_BC is None:
            h = network._prefix(self.text)
        else:
            h = F.embedding(pixel_BC, network.codes) + self.positions[self.number]
            self.number += 1
        h = network.dropout(h)
        for block, cache in zip(network.blocks, self.caches, strict=True):
            h = block(h, cache)
        return network.head(network.norm(h[:, -1]))
