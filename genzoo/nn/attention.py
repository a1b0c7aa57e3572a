"""Scaled dot-product attention. Shapes: B batch, H heads, N queries, L keys, C channels of a head.

References:
    Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762 (eq. 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 64  # keys, up to which the plain product with a mask is faster on a CPU


def attend(
    q_BHNC: Tensor, k_BHLC: Tensor, v_BHLC: Tensor, mask_BL: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention, softmax(q k^T / sqrt(C)) v.

    Args:
        q_BHNC, k_BHLC, v_BHLC: queries, keys and values.
        mask_BL: keys have the weight 0 where it is false; not with ``causal``.
        causal: whether each of N = L queries attends to the keys up to its own place alone.
    """
    mask_B11L = None if mask_BL is None else mask_BL[:, None, None]
    N, L = q_BHNC.shape[2], k_BHLC.shape[2]
    fast = L <= SHORT if mask_BL is not None else N == 1 and L >= 16
    if q_BHNC.device.type == "cpu" and (q_BHNC.dtype == torch.bfloat16 or fast):
        # torch's fused kernel takes up to five times as long here, mostly in the bfloat16 backward pass.
        logits_BHNL = q_BHNC * q_BHNC.shape[-1] ** -0.5 @ k_BHLC.mT
        if mask_B11L is not None:
            logits_BHNL = logits_BHNL.masked_fill(~mask_B11L, -torch.inf)
        if causal:
            future = torch.full((N, L), -torch.inf, dtype=logits_BHNL.dtype, device=logits_BHNL.device).triu(1)
            logits_BHNL = logits_BHNL + future
        return logits_BHNL.softmax(dim=-1) @ v_BHLC
    return F.scaled_dot_product_attention(q_BHNC, k_BHLC, v_BHLC, attn_mask=mask_B11L, is_causal=causal)
