"""Agreement of samples with the captions that they were drawn for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from genzoo.data.dataset import CaptionChecker, DataSet
from genzoo.evaluation.samples import MetricResult
from genzoo.metrics.likelihood import mean_and_stderr
from genzoo.numerics.random import generator


def held_out_captions(data: DataSet, n: int, seed: int) -> Tensor:
    """Choose n captions of the test split, (n, L): each equally often, up to one, in an order of the seed."""
    assert data.test.y is not None
    order = torch.randperm(len(data.test.y), generator=generator("captions", seed))
    return data.test.y[order[torch.arange(n) % len(order)]]


def attribute_scores(
    x: Tensor, captions: Sequence[str], checker: CaptionChecker, name: str, reference: str
) -> dict[str, MetricResult]:
    """Compute the fraction of samples, all of whose attributes are those of their captions.

    Args:
        x: samples as bytes, (N, C, H, W).
        captions: for which they were drawn.
        checker: reads the attributes from the pixels.
        name: of the metric.
        reference: the captions: data set and split.
    """
    each = checker.check(x, captions)
    read = torch.stack(list(each.values()))
    score = mean_and_stderr((read != 0).all(0))  # NaN: the caption omits it
    protocol = {
        "checker": checker.name,
        "checker_accuracy": checker.accuracy,
        "captions": reference,
        "captions_sha256": hashlib.sha256("\n".join(captions).encode()).hexdigest(),
        "n_fake": len(x),
    }
    detail = {attribute: mean_and_stderr(values[~values.isnan()]).value for attribute, values in each.items()}
    return {name: MetricResult(score.value, score.stderr, protocol, {"per_attribute": detail})}
