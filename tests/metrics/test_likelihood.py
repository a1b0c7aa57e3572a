"""Means with their errors against numpy in float64, and scores that depend on the model and the events alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels
from genzoo.event import EventSpec
from genzoo.metrics.cat_metric import CatMetric
from genzoo.metrics.likelihood import mean_and_stderr, score_log_prob
from genzoo.model import Bound, Density, LogProb, Loss, Samples
from genzoo.numerics.random import SampleStreams, randn


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e8, 1e12])
@pytest.mark.parametrize("parts", [[7, 1, 300, 92], [400]], ids=str)
def test_mean_and_error_are_numpys_however_large_the_offset_and_the_batches(offset, parts):
    x = np.random.default_rng(0).normal(size=400) + offset
    metric = CatMetric(mean_and_stderr, torch.float64)
    for part in np.split(x, np.cumsum(parts)[:-1]):
        metric.update(torch.from_numpy(part))
    value, stderr, n = metric.compute()
    assert n == 400
    assert value == pytest.approx(x.mean(), rel=1e-15)
    assert stderr == pytest.approx(x.std(ddof=1) / math.sqrt(400), rel=1e-12)


def test_float32_is_summed_in_float64():
    x = torch.full((2**20,), 0.1)
    metric = CatMetric(mean_and_stderr, torch.float64)
    metric.update(x)
    assert metric.compute().value == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_one_event_has_no_error_and_two_equal_ones_have_none():
    metric = CatMetric(mean_and_stderr, torch.float64)
    metric.update(torch.tensor([3.0]))
    assert metric.compute() == (3.0, None, 1)
    metric.reset()
    metric.update(torch.tensor([3.0, 3.0]))
    assert metric.compute() == (3.0, 0.0, 2)


class Known(Density):
    """log p(x) = -|x|^2, or with draws a noisy number whose noise is each event's own."""

    def __init__(self, event=EventSpec((2,)), condition=None, bound=Bound.EXACT):
        super().__init__(event, condition)
        self.bound = bound
        self.seen: list[Tensor | None] = []

    def _loss(self, x, y, rng) -> Loss:
        raise AssertionError("scores train nothing")

    def _sample(self, n, y, rng) -> Samples:
        raise AssertionError("scores draw nothing")

    def _log_prob(self, x, y, num_samples, rng) -> LogProb:
        self.seen.append(y)
        noise = sum(randn((len(x),), rng=rng, dtype=x.dtype) for _ in range(num_samples))
        return LogProb(-x.square().flatten(1).sum(1) + (noise if self.bound else 0))


def points(n: int = 23) -> Tensor:
    return torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_points_are_scored_by_the_mean_of_their_negative_log_density():
    x = points()
    name, score = score_log_prob(Known().double(), x)
    nll = x.square().sum(1).numpy()
    assert name == "nll"
    assert score == pytest.approx((nll.mean(), nll.std(ddof=1) / math.sqrt(23), 23), rel=1e-12)


def test_images_are_scored_in_bits_of_their_integers():
    k = torch.randint(5, (11, 1, 2, 2), dtype=torch.uint8)
    name, score = score_log_prob(Known((1, 2, 2), levels=5).double(), k, seed=4)
    u = SampleStreams(4, range(11)).draw("uniform", k.shape).double()
    x = 2 * (k + u) / 5 - 1
    bpd = x.square().flatten(1).sum(1).numpy() / (4 * math.log(2)) + math.log2(5 / 2)
    assert name == "bpd"
    # The noise is a float32 and so is x where it is made.
    assert score == pytest.approx((bpd.mean(), bpd.std(ddof=1) / math.sqrt(11), 11), rel=1e-6)


@pytest.mark.parametrize("levels", [None, 5])
def test_a_score_does_not_depend_on_the_batch_size(levels):
    shape = (2,) if levels is None else (1, 2, 2)
    x = points() if levels is None else torch.randint(5, (23, *shape), dtype=torch.uint8)
    model = Known(shape, levels=levels, bound=Bound.LOWER).double()
    scores = [score_log_prob(model, x, num_samples=3, batch_size=size, seed=2)[1] for size in (1, 5, 23, 100)]
    for score in scores[1:]:
        assert score == pytest.approx(scores[0], rel=1e-12)
    assert score_log_prob(model, x, num_samples=3, seed=3)[1].value != scores[0].value


@pytest.mark.parametrize(
    ("bound", "suffix"),
    [
        (Bound.EXACT, ""),
        (Bound.LOWER, "_upper"),
        (Bound.ESTIMATE, "_estimate"),
        (Bound.LOWER | Bound.ESTIMATE, "_upper_estimate"),
    ],
)
def test_the_name_says_what_the_number_is(bound, suffix):
    assert score_log_prob(Known(bound=bound).double(), points())[0] == f"nll{suffix}"
    assert (
        score_log_prob(Known((1, 1, 1), levels=2, bound=bound), torch.zeros(3, 1, 1, 1, dtype=torch.uint8))[0]
        == f"bpd{suffix}"
    )


def test_classes_are_told_to_a_conditional_model_alone():
    x, y = points(5), torch.tensor([0, 1, 2, 0, 1])
    conditional, unconditional = Known(condition=ClassLabels(3)).double(), Known().double()
    score_log_prob(conditional, x, y, batch_size=3)
    assert torch.cat(conditional.seen).tolist() == y.tolist()
    score_log_prob(unconditional, x, y)
    assert unconditional.seen == [None]


def test_progress_counts_the_events():
    done: list[int] = []
    score_log_prob(Known().double(), points(), batch_size=10, progress=done.append)
    assert done == [10, 20, 23]
