"""The Inception Score in cases where it is known, and against its definition split by split."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from genzoo.metrics.inception_score import inception_score


def in_order(rows: torch.Tensor) -> torch.Tensor:
    """Place rows so that the published shuffle brings them back into this order."""
    placed = torch.empty_like(rows)
    placed[torch.from_numpy(np.random.RandomState(2020).permutation(len(rows)))] = rows
    return placed


@pytest.mark.parametrize("K", [2, 5, 10])
def test_sure_and_varied_predictions_count_the_classes(K):
    logits = 1e4 * torch.eye(K).repeat(30, 1)
    value, stderr, n = inception_score(in_order(logits))
    assert (value, n) == (pytest.approx(K, rel=1e-12), 30 * K) and stderr == pytest.approx(0, abs=1e-9)


def test_classes_that_no_sample_has_count_nothing():
    logits = 1e4 * torch.eye(5)[:2].repeat(30, 1)
    assert inception_score(in_order(logits)).value == pytest.approx(2, rel=1e-12)


def test_equal_predictions_are_one_class_however_sure():
    for logits in (torch.zeros(100, 7), torch.tensor([[9.0, 0.0, -3.0]]).repeat(100, 1)):
        assert inception_score(logits).value == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("p", [0.5, 0.7, 0.99])
def test_two_classes_have_the_exponential_of_their_information(p):
    rows = torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64).log().repeat(50, 1)
    information = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    assert inception_score(in_order(rows)).value == pytest.approx(math.exp(information), rel=1e-12)


def test_a_constant_added_to_all_logits_changes_nothing():
    logits = torch.randn(73, 6, dtype=torch.float64)
    assert inception_score(logits + torch.randn(73, 1)).value == pytest.approx(inception_score(logits).value, rel=1e-10)


@pytest.mark.parametrize("n", [10, 100, 237])
def test_value_and_error_are_those_of_ten_shuffled_splits(n):
    logits = 2 * torch.randn(n, 6, dtype=torch.float64)
    order = np.random.RandomState(2020).permutation(n)
    exps = np.exp(logits.numpy()[order])
    p = exps / exps.sum(1, keepdims=True)
    scores = []
    for i in range(10):
        part = p[i * n // 10 : (i + 1) * n // 10]
        scores.append(math.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    expected = np.mean(scores), np.std(scores, ddof=1) / math.sqrt(10), n
    assert inception_score(logits) == pytest.approx(expected, rel=1e-10)


def test_fewer_samples_than_splits_are_refused():
    with pytest.raises(ValueError, match="9 samples are fewer than the 10 splits"):
        inception_score(torch.zeros(9, 3))
