r"""Cross-attention to a text. Shapes: B batch, C channels, H height, W width, N positions, L tokens, D width of the text,
E embedding.

One encoder of the text serves a network twice: the mean of its features joins the embedding of time, and each position of a
feature map attends to the features h_1, ..., h_L of all tokens,

    x <- x + W_out softmax(q(norm(x)) k(h)' / sqrt(c)) v(h),

where padding has the logit -inf. The null text of classifier-free guidance is a sequence of null tokens, with an embedding of
their own. GLIDE appends k(h) and v(h) to the keys and values of its self-attention; here the text has a softmax of its own, as
in latent diffusion, which also serves resolutions without self-attention.

References:
    Nichol et al., "GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models", 2022,
    https://arxiv.org/abs/2112.10741 (section 3.1).
    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022, https://arxiv.org/abs/2112.10752
    (section 3.3).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from genzoo.conditions import Condition, Joint, Tokens
from genzoo.nn.attention import attend
from genzoo.nn.layers import TimeAndCondition, group_norm, zero_
from genzoo.nn.text import TextEncoder


class Text(NamedTuple):
    """Features of the tokens of a text."""

    h_BLD: Tensor
    mask_BL: Tensor  # false on padding


class TimeAndText(nn.Module):
    """Embedding of time, a text and further conditions, and the features of the text.

    Args:
        features: E.
        condition: of the model: tokens, alone or joint with other conditions.
        frequencies: dimension of the sinusoidal embedding of time.
        width: D.
        layers: of the encoder of the text.

    Raises:
        ValueError: for a condition without tokens, or with several sequences of them.
    """

    def __init__(self, features: int, condition: Condition | None, frequencies: int, width: int, layers: int):
        super().__init__()
        parts = list(condition.parts if isinstance(condition, Joint) else [condition] if condition else [])
        places = [i for i, part in enumerate(parts) if isinstance(part, Tokens)]
        if condition is None or not places:
            raise ValueError("cross_attention: the data have no captions: set data=shapes data.conditional=true")
        if len(places) > 1:
            raise ValueError(f"cross_attention is to one text, and the condition has {len(places)}")
        self.spec, self.place = condition, places[0]
        text = parts.pop(self.place)
        assert isinstance(text, Tokens)
        fixed = condition.fixed if isinstance(condition, Joint) else 0
        is_fixed = self.place < fixed
        self.rest: Condition | None = Joint(tuple(parts), fixed - is_fixed) if parts else None
        self.time = TimeAndCondition(features, self.rest, frequencies)
        self.encoder = TextEncoder(text.length, text.vocabulary + (not is_fixed), width, layers)
        self.pooled = nn.Linear(width, features)

    def forward(self, t_B: Tensor, y: Tensor | None) -> tuple[Tensor, Text]:
        """Embed times, (B,), and conditions, (B, *condition.shape); None for the null value -> (B, E), and the text."""
        if y is None:
            y = self.spec.missing(len(t_B), t_B.device, self.pooled.weight.dtype)
        rest = None
        if isinstance(self.spec, Joint):
            values = list(self.spec.split(y))
            y = values.pop(self.place)
            rest = self.rest.join(*values) if isinstance(self.rest, Joint) else None
        text = Text(*self.encoder(y))
        return self.time(t_B, rest) + self.pooled(TextEncoder.pooled(*text)), text


class CrossAttention(nn.Module):
    """Attention of positions to a text, (B, N, C) -> (B, N, C), zero-initialised.

    Args:
        channels: C.
        width: D.
        head_channels: channels per head; None for a single head.

    Raises:
        ValueError: if ``head_channels`` does not divide the channels.
    """

    def __init__(self, channels: int, width: int, head_channels: int | None = None):
        super().__init__()
        if head_channels is not None and channels % head_channels:
            raise ValueError(f"head_channels={head_channels} does not divide the {channels} channels")
        self.heads = 1 if head_channels is None else channels // head_channels
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(width, 2 * channels)
        self.out = zero_(nn.Linear(channels, channels))

    def forward(self, x_BNC: Tensor, text: Text) -> Tensor:
        B, N, C = x_BNC.shape
        L, heads, c = text.h_BLD.shape[1], self.heads, C // self.heads
        q = self.q(x_BNC).view(B, N, heads, c).transpose(1, 2)
        k, v = self.kv(text.h_BLD).view(B, L, 2, heads, c).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v, text.mask_BL).transpose(1, 2).reshape(B, N, C))


class MapCrossAttention(nn.Module):
    """Residual attention of a feature map to a text, (B, C, H, W) -> (B, C, H, W); arguments as in ``CrossAttention``."""

    def __init__(self, channels: int, width: int, head_channels: int | None = None):
        super().__init__()
        self.norm = group_norm(channels)
        self.attend = CrossAttention(channels, width, head_channels)

    def forward(self, x_BCHW: Tensor, text: Text) -> Tensor:
        h_BNC = self.norm(x_BCHW).flatten(2).transpose(1, 2)
        return x_BCHW + self.attend(h_BNC, text).transpose(1, 2).reshape(x_BCHW.shape)
