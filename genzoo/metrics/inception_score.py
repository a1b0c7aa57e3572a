r"""Inception Score: the confidence of a classifier on each sample, and the diversity of the predicted classes.

    IS = exp(E_x KL(p(y | x) || p(y)))

between 1 and the number of classes, without a reference. With another classifier than Inception-v3 it has another name.

References:
    Salimans et al., "Improved Techniques for Training GANs", 2016, https://arxiv.org/abs/1606.03498 (section 4).
    Obukhov et al., torch-fidelity, https://github.com/toshas/torch-fidelity (its shuffle and its splits).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genzoo.metrics.finite import check_finite
from genzoo.metrics.likelihood import Score, mean_and_stderr

SPLITS, SEED = 10, 2020  # of torch-fidelity


def inception_score(logits: Tensor) -> Score:
    """Mean and standard error of the score over ten shuffled splits.

    Args:
        logits: of the classifier, (N, K), for Inception-v3 without bias as in torch-fidelity.

    Raises:
        ValueError: for fewer samples than splits.
        NonFiniteError: for non-finite logits.
    """
    check_finite(logits=logits)
    N = len(logits)
    if N < SPLITS:
        raise ValueError(f"{N} samples are fewer than the {SPLITS} splits")
    order = np.random.RandomState(SEED).permutation(N)
    log_p = logits[torch.from_numpy(order)].double().log_softmax(1)
    scores = []
    for i in range(SPLITS):
        part = log_p[i * N // SPLITS : (i + 1) * N // SPLITS]
        marginal = part.exp().mean(0, keepdim=True).log()
        # 0 log 0 = 0 for classes of zero probability.
        scores.append((part.exp() * (part - marginal)).nan_to_num(0.0).sum(1).mean().exp())
    mean, stderr, _ = mean_and_stderr(torch.stack(scores))
    return Score(mean, stderr, N)
