"""Budgets refuse what is no limit, and learning rates follow their formulas."""

from __future__ import annotations

import math

import pytest

from genzoo.training.budget import Budget, LearningRate


def test_a_budget_keeps_its_limits():
    assert Budget(images=10) == Budget(10, None) and Budget(seconds=0.5).images is None
    assert Budget(10, 2.0).seconds == 2.0


@pytest.mark.parametrize(
    "limits, message",
    [
        ({}, "needs budget.images, budget.seconds or budget.flops"),
        ({"images": 0}, "budget.images must be positive and finite, not 0"),
        ({"images": 10, "seconds": -1.0}, r"budget.seconds must be positive and finite, not -1\.0"),
        ({"seconds": math.inf}, "budget.seconds must be positive and finite, not inf"),
        ({"seconds": math.nan}, "budget.seconds must be positive and finite, not nan"),
    ],
)
def test_what_is_no_limit_is_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        Budget(**limits)


@pytest.mark.parametrize(
    "decay, expected",
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25, 0, 0]),
        ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0, 0]),
    ],
)
def test_the_rate_decays_by_its_formula_and_stays_at_its_end(decay, expected):
    rate = LearningRate(decay)
    assert [rate(images, 1000) for images in (0, 250, 500, 750, 1000, 1250)] == pytest.approx(expected, abs=1e-12)


def test_warm_up_rises_linearly_and_then_leaves_the_decay_alone():
    rate = LearningRate("linear", warmup=99)
    assert [rate(images, 1000) for images in (0, 49, 99)] == pytest.approx([1 / 100, 0.951 * 0.5, 0.901])
    assert rate(400, 1000) == LearningRate("linear")(400, 1000)
    assert rate(0, 1000) > 0, "the first step moves"


def test_progress_is_relative_to_the_plan():
    rate = LearningRate("cosine")
    assert all(rate(s, 64) == rate(1000 * s, 64_000) for s in range(0, 65, 8))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"decay": "cosin"}, "constant, linear, cosine or wsd, not 'cosin'"),
        ({"warmup": -1}, "must not be negative, not -1"),
    ],
)
def test_unknown_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearningRate(**arguments)
