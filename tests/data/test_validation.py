"""The validation split: a function of each example, that of a folder, or none; and who reads which split."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from genzoo.config.instantiate import build
from genzoo.data import DataError, DataSet, Split, digits, with_validation
from genzoo.data.from_arrays import as_dataset, as_examples
from genzoo.evaluation.scores import interim, pick_network
from genzoo.evaluation.settings import EvalData, EvalSettings
from tests.commands import SMALL, described


def points(n: int, seed: int = 0, classes: int = 0) -> DataSet:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator)
    y = torch.randint(classes, (n,), generator=generator) if classes else None
    return DataSet(Split(x, y), Split(x[:1], y[:1] if classes else None), None, tuple(map(str, range(classes))))


def rows_of(split: Split) -> set[tuple[float, ...]]:
    return {tuple(row) for row in split.x.flatten(1).tolist()}


def test_the_splits_part_the_training_examples_and_leave_the_test_split():
    whole = points(10_000)
    cut = with_validation(whole, 0.1)
    train, validation = rows_of(cut.train), rows_of(cut.validation)
    assert not train & validation and train | validation == rows_of(whole.train)
    assert abs(len(validation) - 1000) < 4 * 30  # four standard deviations of the binomial law
    assert cut.test is whole.test and cut.sha256 != whole.sha256


def test_an_example_is_on_the_same_side_whatever_the_others_are():
    whole = points(1000)
    half = dataclasses.replace(whole, train=whole.train.select(torch.arange(0, 1000, 2)))
    few, many = with_validation(half, 0.2), with_validation(whole, 0.2)
    assert rows_of(few.validation) == rows_of(many.validation) & rows_of(half.train)
    twice = dataclasses.replace(whole, train=Split(whole.train.x.repeat(2, 1), None))
    assert len(with_validation(twice, 0.2).validation.x) == 2 * len(many.validation.x)


def test_conditions_go_with_their_examples_and_every_class_is_trained():
    whole = points(60, classes=30)
    cut = with_validation(whole, 0.5)
    of = {tuple(x): int(y) for x, y in zip(whole.train.x.tolist(), whole.train.y, strict=True)}
    for split in (cut.train, cut.validation):
        assert [of[tuple(x)] for x in split.x.tolist()] == split.y.tolist()
    assert set(cut.train.y.tolist()) == set(whole.train.y.tolist())


@pytest.mark.parametrize("n", [2, 3, 5])
def test_each_split_has_an_example(n):
    for seed in range(20):
        for fraction in (1e-9, 0.1, 0.9, 1 - 1e-12):
            cut = with_validation(points(n, seed), fraction)
            assert len(cut.train.x) and len(cut.validation.x)


def test_no_validation_split_where_none_can_be():
    assert with_validation(points(10), 0).validation is None
    alone = dataclasses.replace(points(10), test=Split(torch.empty(0, 2), None))
    assert with_validation(alone, 0.5) is alone  # a reference without splits
    equal = dataclasses.replace(points(4), train=Split(torch.ones(4, 2), None))
    assert with_validation(equal, 0.5) is equal
    with pytest.raises(DataError, match=r"train with data\.validation=0\.1"):
        points(4).scored_on("validation")


def test_the_split_is_independent_of_a_test_split_by_hash():
    x = np.random.default_rng(0).normal(size=(2000, 2))
    cut = with_validation(as_dataset(as_examples(x), test_fraction=0.1), 0.1)
    assert abs(len(cut.validation.x) - 180) < 4 * 13


def test_choices_do_not_depend_on_the_test_split():
    data = with_validation(digits(), 0.1)
    poisoned = dataclasses.replace(data, test=Split(torch.full_like(data.test.x, 16), data.test.y))
    model = build(described(*SMALL["realnvp"])["model"], "model")
    settings = EvalSettings(n=64, features="digits")
    network = pick_network(settings, "digits", data.event, needed=True)
    found = [interim(model, EvalData(d, "digits", False), settings, 64, network, 0) for d in (data, poisoned)]
    assert found[0] == found[1] and any(name.startswith("validation/fd") for name in found[0])
    without = interim(model, EvalData(digits(), "digits", False), settings, 64, network, 0)
    assert {name.partition("/")[0] for name in without} == {"train"}
