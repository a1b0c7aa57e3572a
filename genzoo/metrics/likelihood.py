"""Likelihood metrics on held-out data: bits per dimension for images, nats for vectors.

The name of the metric depends on ``Density.bound``: ``bpd`` for an exact density, ``bpd_upper`` for a lower bound of it,
``bpd_estimate`` for an unbiased estimate; ``nll``, ``nll_upper``, ``nll_estimate`` for vectors.
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
    """A value with its standard error and sample size."""

    value: float
    stderr: float | None  # None for a single event
    n: int


def mean_and_stderr(values: Tensor) -> Score:
    """Mean and its standard error, s/sqrt(n), in float64."""
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
    """Compute the bits/dim or the negative log-likelihood of held-out events.

    The noise of event ``i``, including dequantisation, is f(seed, i) for any batch size.

    Args:
        model: in evaluation mode.
        x: integer images, (N, C, H, W), or vectors, (N, D).
        y: conditions, (N, *condition.shape), of a conditional model.
        num_samples: Monte Carlo samples per event of a bound or an estimate.
        batch_size: events per batch.
        seed: of the noise.
        progress: called with the number of processed events.

    Returns:
        The name of the metric and its score.
    """
    metric = CatMetric(mean_and_stderr, torch.float64)
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
