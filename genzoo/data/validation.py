"""A validation split, cut from the training split by a hash of each example."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor

from genzoo.data.dataset import DataSet


def with_validation(data: DataSet, fraction: float) -> DataSet:
    """Cut a validation split from the training split, unless the data have one.

    An example is a validation example if the hash of its values is below the fraction, whatever the other examples are; equal
    examples are on the same side. The validation split has at least one example, and the training split one of each class.

    Args:
        data: the data; those without a test split are references, of which none is cut.
        fraction: expected fraction of the training examples, in [0, 1); 0 for no validation split.

    Returns:
        The data with their validation split; without one if the training examples are all equal.
    """
    if data.validation is not None or fraction == 0 or not (len(data.train.x) and len(data.test.x)):
        return data
    hashes = _unit_hashes(data.train.x)
    chosen = hashes < fraction
    if not chosen.any():
        chosen = hashes == hashes.min()
    for members in _classes(data):
        if chosen[members].all():
            chosen[members] = hashes[members] < hashes[members].max()
    if not chosen.any():
        return data
    return dataclasses.replace(data, train=data.train.select(~chosen), validation=data.train.select(chosen))


def _unit_hashes(x: Tensor) -> Tensor:
    """Hash examples, (N, *shape), to [0, 1), reproducibly on every machine and independently of other splits by hash."""
    rows = x.flatten(1).contiguous().numpy()
    digests = (hashlib.blake2b(row, digest_size=6).digest() for row in rows)
    return torch.tensor([int.from_bytes(digest, "big") / 2**48 for digest in digests], dtype=torch.float64)


def _classes(data: DataSet) -> list[Tensor]:
    """Masks of the training examples of each class, or of all without classes."""
    y = data.train.y
    if y is None or not data.classes:
        return [torch.ones(len(data.train.x), dtype=torch.bool)]
    return [y == c for c in y.unique()]
