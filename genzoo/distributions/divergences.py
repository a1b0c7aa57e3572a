"""Divergences: Kullback-Leibler in closed form, in nats, elementwise; maximum mean discrepancy between samples.

References:
    Kingma, Welling, "Auto-Encoding Variational Bayes", 2014, https://arxiv.org/abs/1312.6114 (appendix B).
    Gretton et al., "A Kernel Two-Sample Test", 2012, https://jmlr.org/papers/v13/gretton12a.html (eq. 3).
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


def squared_mmd(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    r"""Unbiased estimate of the squared MMD of two distributions, which may be negative and is differentiable.

        E k(a, a') + E k(b, b') - 2 E k(a, b),      k(a, b) = exp(-|a - b|^2/(2 bandwidth^2))

    Args:
        a, b: samples, (N, D) and (M, D); a set of one sample counts as 0 in the first two terms.
        bandwidth: of the kernel.

    Returns:
        ().
    """

    def kernel(p: Tensor, q: Tensor) -> Tensor:
        square = p.square().sum(1)[:, None] + q.square().sum(1) - 2 * p @ q.T
        return torch.exp(-square / (2 * bandwidth**2))

    def within(p: Tensor) -> Tensor:
        k = kernel(p, p)
        return (k.sum() - k.trace()) / max(len(p) * (len(p) - 1), 1)

    return within(a) + within(b) - 2 * kernel(a, b).mean()
