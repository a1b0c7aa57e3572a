"""Data sets from arrays, tensors and torch data sets.

Images are uint8, or floats on [0, 1] or [-1, 1]; other ranges raise an error. The test split is chosen by a hash of each
example's values, so that it depends neither on the order nor on the number of examples, and duplicates never lie in both
splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genzoo.conditions import Condition, Image, Vector
from genzoo.data.arrays import read_array
from genzoo.data.dataset import DataError, DataSet, Split

CLASSES_MAX = 1_000_000  # beyond them integers are times or numbers of documents


class Examples(NamedTuple):
    """Examples of a data set before the split."""

    x: np.ndarray  # images uint8 (N, C, H, W), or vectors float32 (N, d)
    y: np.ndarray | None  # classes int64 (N,), or other conditions float32 (N, ...)


def as_examples(data: Any, y: Any = None) -> Examples:
    """Convert user data to ``Examples``.

    Args:
        data: an array or tensor of images, (N, H, W, C), (N, C, H, W) or (N, H, W), or of vectors, (N, d); or an iterable, such
            as a torch ``Dataset``, of examples ``x`` or pairs ``(x, y)``.
        y: conditions, classes as integers (N,) or floats (N, ...); not with pairs.

    Raises:
        DataError: naming the invalid range, shape or type.
    """
    if not isinstance(data, np.ndarray | Tensor):
        data, found = _collected(data)
        if found is not None and y is not None:
            raise DataError("data: contains pairs (x, y) already: omit y")
        y = found if y is None else y
    x = _numpy(data)
    if not x.ndim or len(x) < 2:
        raise DataError(f"data: {len(x) if x.ndim else 'no'} examples, at least 2 are needed")
    if not x.size:
        raise DataError(f"data: shape {x.shape} contains no numbers")
    x = _vectors(x) if x.ndim == 2 else _images(x)
    return Examples(x, None if y is None else _conditions(_numpy(y, "y"), len(x)))


def _collected(data: Iterable[Any]) -> tuple[np.ndarray, np.ndarray | None]:
    if not isinstance(data, Iterable | Sized):
        raise DataError(
            f"data: {type(data).__name__} is not an array, a tensor, a Dataset, a folder or the name of a data set"
        )
    items = list(data) if isinstance(data, Iterable) else [data[i] for i in range(len(data))]  # a torch Dataset
    if not items:
        raise DataError("data: no examples")
    pairs = isinstance(items[0], tuple | list)
    x = _stacked([item[0] if pairs else item for item in items], "data")
    return x, _stacked([item[1] for item in items], "y") if pairs and len(items[0]) > 1 else None


def _stacked(items: list[Any], name: str) -> np.ndarray:
    arrays = [_numpy(item, name) for item in items]
    if len(shapes := {array.shape for array in arrays}) > 1:
        raise DataError(f"{name}: examples of different shapes, such as {' and '.join(map(str, sorted(shapes)[:2]))}")
    return np.stack(arrays)


def _numpy(value: Any, name: str = "data") -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # numpy has no bfloat16
    try:
        array = np.asarray(value)
    except ValueError as error:  # of a list of lists of unlike lengths
        raise DataError(f"{name}: {error}") from error
    if array.dtype == object:
        raise DataError(f"{name}: {type(value).__name__} is not an array of numbers; convert images to arrays first")
    return array


def _vectors(x: np.ndarray) -> np.ndarray:
    if not np.issubdtype(x.dtype, np.floating) and not np.issubdtype(x.dtype, np.integer):
        raise DataError(f"data: vectors of {x.dtype}; floats are needed")
    with np.errstate(over="ignore"):  # what overflows is refused
        x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise DataError("data: vectors with NaN or infinity")
    return x


def _images(x: np.ndarray) -> np.ndarray:
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4:
        raise DataError(f"data: shape {x.shape}; images are (N, H, W, C), (N, C, H, W) or (N, H, W), vectors (N, d)")
    if x.shape[1] not in (1, 3):
        if x.shape[3] not in (1, 3):
            raise DataError(f"data: shape {x.shape}; images have 1 channel (grey) or 3 (colour), first or last")
        x = np.moveaxis(x, 3, 1)
    if x.dtype == np.uint8:
        if x.max() == 1:
            raise DataError("data: bytes of 0 and 1 alone; images are uint8 on 0..255, or floats on [0, 1] or [-1, 1]")
        return np.ascontiguousarray(x)
    if not np.issubdtype(x.dtype, np.floating):
        raise DataError(f"data: images of {x.dtype}; uint8 on 0..255, or floats on [0, 1] or [-1, 1]")
    low, high = float(x.min()), float(x.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError("data: images with NaN or infinity")
    if low >= 0 and high <= 1:
        scaled = x * 255
    elif low >= -1 and high <= 1:
        scaled = (x + 1) * 127.5
    else:
        raise DataError(f"data: floats from {low:g} to {high:g}; images are on [0, 1] or [-1, 1], or uint8 on 0..255")
    return np.ascontiguousarray(np.round(scaled).astype(np.uint8))


def _conditions(y: np.ndarray, n: int) -> np.ndarray:
    if not y.ndim or len(y) != n:
        raise DataError(f"y: {len(y) if y.ndim else 'no'} conditions for {n} examples")
    if np.issubdtype(y.dtype, np.integer) and y.ndim == 1:
        if y.min() < 0:
            raise DataError(f"y: classes are 0, 1, ..., not {y.min()}")
        if y.max() >= CLASSES_MAX:
            raise DataError(f"y: classes are 0, 1, ..., and {y.max()} would be one of more than {CLASSES_MAX:,}")
        return y.astype(np.int64)
    if np.issubdtype(y.dtype, np.floating) and y.ndim in (1, 2, 4):
        y = (y[:, None] if y.ndim == 1 else y).astype(np.float32)
        if not np.isfinite(y).all():
            raise DataError("y: conditions with NaN or infinity")
        return y
    raise DataError(f"y: {y.dtype} of shape {y.shape}; classes are integers (N,), other conditions floats (N, d)")


def load_arrays(path: str | Path, levels: int | None = 256, test_fraction: float = 0.1) -> DataSet:
    """Load images or vectors, and optionally conditions, from a file.

    Args:
        path: an .npz with ``x`` and optionally ``y``, or an .npy.
        levels: 256 for images, None for vectors.
        test_fraction: fraction of held-out examples.

    Raises:
        DataError: naming the file and the cause.
    """
    path = Path(path)
    x = read_array(path, ("x", "samples", "images", "arr_0"))
    y = None
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            names = set(archive.files)
        y = read_array(path, ("y",)) if "y" in names else None
    try:
        examples = as_examples(x, y)
    except DataError as error:
        raise DataError(f"data.root={path}: {error}") from error
    if (examples.x.ndim == 4) != (levels is not None):
        kind = "images: set data=array" if examples.x.ndim == 4 else "vectors: set data=vectors"
        raise DataError(f"data.root={path}: contains {kind}")
    return as_dataset(examples, test_fraction)


def as_dataset(examples: Examples, test_fraction: float = 0.1) -> DataSet:
    """Split examples into training and test data.

    Raises:
        DataError: if a split would be empty.
    """
    held_out = np.array([_unit_hash(example) < test_fraction for example in examples.x])
    if held_out.all() or (test_fraction and not held_out.any()):
        raise DataError(
            f"data: {held_out.sum()} of {len(held_out)} examples are held out; test_fraction={test_fraction:g} needs more"
        )
    x = torch.from_numpy(examples.x)
    y = None if examples.y is None else torch.from_numpy(examples.y)
    train, test = (
        Split(x[chosen], None if y is None else y[chosen]) for chosen in map(torch.from_numpy, (~held_out, held_out))
    )
    condition: Condition | None = None
    classes: tuple[str, ...] = ()
    if y is not None and y.dtype == torch.int64:
        classes = tuple(str(i) for i in range(int(y.max()) + 1))
    elif y is not None:
        condition = Vector(y.shape[1]) if y.ndim == 2 else Image(tuple(y.shape[1:]))
    return DataSet(train, test, 256 if x.ndim == 4 else None, classes, conditions=condition)


def _unit_hash(example: np.ndarray) -> float:
    """Map the values of an example to [0, 1)."""
    digest = hashlib.sha256(np.ascontiguousarray(example).tobytes()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
