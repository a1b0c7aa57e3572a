r"""Calibration of posterior samples: how often central intervals of K draws contain the truth.

If the truth and K draws are exchangeable, as with draws of the exact posterior, the rank of the truth among the K + 1 numbers
is uniform on 0..K. With V ~ U[0, 1) so is

    u = (rank + V)/(K + 1) ~ U[0, 1],

the randomised probability integral transform, and the central interval of level p contains the truth if |u - 1/2| <= p/2, with
probability p exactly for every K. The expectation over V is computed in closed form: no draw is needed, and no correction for
a finite K; but K draws cannot show an interval to cover less than ``max(0, (p - 1)(K + 1)/2 + 1)``, 0.5 for p = 0.9 and K = 9.
Where draws equal the truth, as for integer levels, the rank is uniform over the places of the tie.

References:
    Gneiting, Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation", 2007,
    https://doi.org/10.1198/016214506000001437 (section 6.2, central prediction intervals).
    Czado, Gneiting, Held, "Predictive Model Assessment for Count Data", 2009,
    https://doi.org/10.1111/j.1541-0420.2009.01191.x (eq. 1-2: the transform of discrete distributions).
    Hamill, "Interpretation of Rank Histograms for Verifying Ensemble Forecasts", 2001,
    https://doi.org/10.1175/1520-0493(2001)129<0550:IORHFV>2.0.CO;2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEVELS = (0.5, 0.8, 0.9)


def central_coverage(truth: Tensor, draws: Tensor, levels: Sequence[float] = LEVELS) -> Tensor:
    """Compute the probability that central intervals of the draws contain the truth.

    Args:
        truth: any shape.
        draws: K draws for each number, (K, *truth.shape).
        levels: nominal probabilities of the intervals.

    Returns:
        (len(levels), *truth.shape) float64 in [0, 1], whose mean over exchangeable truths is the nominal level.
    """
    K = len(draws)
    below, ties = (draws < truth).sum(0).double(), (draws == truth).sum(0).double()
    low, high = below / (K + 1), (below + ties + 1) / (K + 1)
    p = torch.tensor(levels, dtype=torch.float64, device=truth.device).view(-1, *[1] * truth.ndim)
    inside = torch.minimum(high, (1 + p) / 2) - torch.maximum(low, (1 - p) / 2)
    return inside.clamp(min=0) / (high - low)
