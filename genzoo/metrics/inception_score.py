r"""Inception Score: how sure a classifier is of each sample, and how many classes the samples have together.

    IS = exp(E_x KL(p(y | x) || p(y)))

between 1 and the number of classes; it never sees the data. Made of another classifier than Inception-v3 it is not called so.

References:
    Salimans et al., "Improved Techniques for Training GANs", 2016, https://arxiv.org/abs/1606.03498 (section 4).
    Obukhov et al., torch-fidelity, https://github.com/toshas/torch-fidelity (its shuffle and its splits).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genzoo.metrics.finite import check_finite
from genzoo.metrics.likelihood import Score, mean_with_error

SPLITS, SEED = 10, 2020  # of torch-fidelity


def inception_score(logits: Tensor) -> Score:
    """Mean of the score over ten shuffled splits, and the standard error of that mean.

    Args:
        logits: of the classifier, (N, K), without its bias where torch-fidelity leaves it out.

    Raises:
        ValueError: for fewer samples than splits.
        NotFinite: for logits that are not.
    """
    check_finite(logits=logits)
    N = len(logits)
    if N < SPLITS:
        raise ValueError(f"{N} samples make no {SPLITS} splits")
    order = np.random.RandomState(SEED).permutation(N)
    log_p = logits[torch.from_numpy(order)].double().log_softmax(1)
    scores = []
    for i in range(SPLITS):
        part = log_p[i * N // SPLITS : (i + 1) * N // SPLITS]
        marginal = part.exp().mean(0, keepdim=True).log()
        # A class that no sample of the split has adds 0 log 0 = 0.
        scores.append((part.exp() * (part - marginal)).nan_to_num(0.0).sum(1).mean().exp())
    mean, stderr, _ = mean_with_error(torch.stack(scores))
    return Score(mean, stderr, N)
