"""Class labels by name or index."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from genzoo.errors import UsageError, nearest
from genzoo.runs import Run


def class_names(run: str) -> list[str]:
    """Class names of an (untrusted) run; empty if not stored."""
    names = Run(run).status.get("classes")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def class_numbers(labels: int | str | Sequence[int | str], num_classes: int, names: Sequence[str]) -> list[int]:
    """Return the indices of one or several classes.

    Args:
        labels: one index or name, a list of them, or a range of indices such as "0-9", both ends included.
        num_classes, names: as in ``class_number``.

    Raises:
        UsageError: for an unknown label, an empty list or range, and a class that occurs twice.
    """
    if not isinstance(labels, int | str | Sequence):
        raise UsageError(f"label={labels!r}: must be the name or the number of a class, or a list of them")
    listed = [labels] if isinstance(labels, int | str) else labels
    found: list[int] = []
    for label in listed:
        ends = re.fullmatch(r"(\d{1,9})-(\d{1,9})", label) if isinstance(label, str) and label not in names else None
        if ends is None:
            found.append(class_number(label, num_classes, names))
            continue
        first, last = int(ends[1]), int(ends[2])
        if first > last:
            raise UsageError(f"label={label}: the first class of a range must not exceed the last")
        if last >= num_classes:
            class_number(last, num_classes, [])  # raises
        found.extend(range(first, last + 1))
    if not found:
        raise UsageError("label=[]: names no class")
    if twice := sorted({label for label in found if found.count(label) > 1}):
        raise UsageError(f"label={labels}: class {names[twice[0]] if names else twice[0]} occurs twice")
    return found


def check_trained(labels: Sequence[int], probs: Sequence[float], names: Sequence[str]) -> None:
    """Check that the training data had examples of each class.

    Args:
        labels: indices of classes.
        probs: frequencies of all classes in training.
        names: class names, if known.

    Raises:
        UsageError: naming the first class without any.
    """
    for label in labels:
        if probs[label] == 0:
            raise UsageError(f"label={names[label] if names else label}: no training image has this class")


def class_number(label: int | str, num_classes: int, names: Sequence[str]) -> int:
    """Return the index of a class, given its index or name.

    A number that is not a valid index is looked up among the names, as of folders 1995, 1996 and so on.

    Args:
        label: index or name.
        num_classes: of the model.
        names: class names, if known.

    Raises:
        UsageError: for an unknown label, and for a number that is the index of one class and the name of another.
    """
    if not num_classes:
        raise UsageError(f"label={label}: this model has no classes; train one with data.conditional=true")
    if isinstance(label, bool) or (not isinstance(label, str) and label < 0):
        raise UsageError(f"label={label}: classes are 0..{num_classes - 1}")
    names = names if len(names) == num_classes else []
    if isinstance(label, int) and label < num_classes:
        if str(label) in names and names[label] != str(label):
            raise UsageError(
                f"label={label}: is the index of class {names[label]} and the name of class {names.index(str(label))}: "
                f"quote the name, label={quoted(names[label])} or label={quoted(str(label))}"
            )
        return label
    if str(label) in names:
        return names.index(str(label))
    if names:
        raise UsageError(
            f"label={label}: this model has the classes 0..{num_classes - 1}, by name: {nearest(str(label), names)}"
        )
    by_name = "" if isinstance(label, int) else ", and its run does not store their names"
    raise UsageError(f"label={label}: this model has the classes 0..{num_classes - 1}{by_name}")


def quoted(name: str) -> str:
    """Quote a name for the shell and for Hydra."""
    return f"'{json.dumps(name, ensure_ascii=False)}'"
