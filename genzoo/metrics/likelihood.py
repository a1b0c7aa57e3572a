"""Scores of a model's log density on held-out data.

Images are scored in bits per dimension of their integers, points of the plane in nats. The name of the score carries
what ``log_prob`` is: ``bpd`` where it is exact, ``bpd_upper`` where a lower bound of the density bounds bits/dim from
above, ``bpd_estimate`` where it is an unbiased estimate; ``nll``, ``nll_upper``, ``nll_estimate`` for points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from genzoo.distributions.discretization import bits_per_dim, dequantize
from genzoo.metrics.cat_metric import CatMetric
from genzoo.model import Density
from genzoo.numerics.random import SampleStreams


class Score(NamedTuple):
    """A number, how sure it is, and over how many events."""

    value: float
    stderr: float | None  # unknown of a single event
    n: int


def mean_with_error(values: Tensor) -> Score:
    """Return the mean of some numbers and its standard error, s/sqrt(n), in float64."""
    values = values.detach().double().flatten()
    n = len(values)
    return Score(float(values.mean()), float(values.std() / n**0.5) if n > 1 else None, n)


@torch.no_grad()
def score_log_prob(
    model: Density,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_samples: int = 20,
    batch_size: int = 250,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[str, Score]:
    """Score a model on held-out events.

    The noise of event ``i``, that of dequantisation included, is f(seed, i), whatever the batch size.

    Args:
        model: in evaluation mode.
        x: integer images (N, C, H, W), or points (N, 2).
        y: classes, (N,), for a conditional model.
        num_samples: draws that a bound or an estimate may use for each event.
        batch_size: events scored at once.
        seed: of the noise.
        progress: called with the number of events done.

    Returns:
        The name of the score with its bound, and the score.
    """
    metric = CatMetric(mean_with_error, torch.float64)
    for start in range(0, len(x), batch_size):
        rows = slice(start, min(start + batch_size, len(x)))
        rng = SampleStreams(seed, range(rows.start, rows.stop), device=model.device)
        batch = x[rows].to(model.device)
        labels = y[rows].to(model.device) if y is not None and model.condition else None
        batch = (batch if model.levels is None else dequantize(batch, model.levels, rng)).to(model.dtype)
        value = model.log_prob(batch, labels, num_samples=num_samples, rng=rng).value.double()
        metric.update((-value if model.levels is None else bits_per_dim(value, model.dim, model.levels)).cpu())
        if progress:
            progress(rows.stop)
    return ("nll" if model.levels is None else "bpd") + model.bound.suffix, metric.compute()
