"""Arrays and torch data sets as data: what is taken, and what is refused in one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from genzoo.data.dataset import DataError
from genzoo.data.from_arrays import as_examples

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(20, 2))
BYTES = RNG.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)


def test_bfloat16_is_taken():
    x = torch.rand(20, 3, 8, 8)
    assert np.abs(as_examples(x.bfloat16()).x.astype(int) - as_examples(x).x).max() <= 1


@pytest.mark.parametrize(
    ("data", "y", "message"),
    [
        (None, None, "NoneType is not an array"),
        (5, None, "int is not an array"),
        (np.float32(1), None, "float32 is not an array"),
        (np.array(1.0), None, "no examples"),
        (np.zeros((20, 0)), None, "contains no numbers"),
        (np.zeros((20, 0, 8, 1), np.uint8), None, "contains no numbers"),
        (BYTES // 128, None, "bytes of 0 and 1 alone"),
        ([{"x": point} for point in POINTS], None, "dict is not an array of numbers"),
        ([(point, np.zeros(1 + i % 2)) for i, point in enumerate(POINTS)], None, "y: examples of different shapes"),
        (POINTS, 3, "y: no conditions for 20"),
        (POINTS, [None] * 20, "y: list is not an array"),
        (POINTS, [[1.0], [1.0, 2.0]], "y: .*inhomogeneous"),
        (POINTS, np.arange(20) * 10**9, "y: classes .* 1,000,000"),
        (POINTS * 1e300, None, "NaN or infinity"),
    ],
)
def test_what_cannot_be_data_is_refused_in_one_line(data: Any, y: Any, message: str, recwarn):
    with pytest.raises(DataError, match=message) as refusal:
        as_examples(data, y)
    assert "\n" not in str(refusal.value) and str(refusal.value).count("data:") <= 1
    assert not recwarn.list
