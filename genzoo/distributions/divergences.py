"""Kullback-Leibler divergences in closed form, in nats, elementwise.

References:
    Kingma, Welling, "Auto-Encoding Variational Bayes", 2014, https://arxiv.org/abs/1312.6114 (appendix B).
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_normal(
    mean_q: Tensor, log_var_q: Tensor, mean_p: Tensor | float = 0.0, log_var_p: Tensor | float = 0.0
) -> Tensor:
    """KL(N(mean_q, exp log_var_q) || N(mean_p, exp log_var_p)), elementwise; p is N(0, 1) by default."""
    if not isinstance(log_var_p, Tensor):  # a copy from the host would synchronise
        log_var_p = torch.full((), log_var_p, dtype=mean_q.dtype, device=mean_q.device)
    ratio = log_var_q - log_var_p
    return 0.5 * (ratio.exp() - 1 - ratio + (mean_q - mean_p) ** 2 * torch.exp(-log_var_p))
