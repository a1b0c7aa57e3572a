"""Classes by the names that their data give them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from genzoo.errors import UsageError, nearest
from genzoo.runs import Run


def class_names(run: str) -> list[str]:
    """Return the names of the classes that a run, which may be anybody's, keeps; none where it keeps none."""
    names = Run(run).status.get("classes")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def class_number(label: int | str, num_classes: int, names: Sequence[str]) -> int:
    """Find the number of a class by its number or its name.

    A number that is no class's number is looked for among the names, as of folders 1995, 1996 and so on.

    Args:
        label: what was asked for.
        num_classes: of the model.
        names: of the classes, if they are known.

    Raises:
        UsageError: for what is neither, and a number that is one class's number and another one's name.
    """
    if not num_classes:
        raise UsageError(f"label={label}: this model has no classes")
    if isinstance(label, bool) or (not isinstance(label, str) and label < 0):
        raise UsageError(f"label={label}: classes are 0..{num_classes - 1}")
    names = names if len(names) == num_classes else []
    if isinstance(label, int) and label < num_classes:
        if str(label) in names and names[label] != str(label):
            raise UsageError(
                f"label={label}: is the number of class {names[label]} and the name of class number {names.index(str(label))}: "
                f"quote the "
                f"name of the one that is meant, label={quoted(names[label])} or label={quoted(str(label))}"
            )
        return label
    if str(label) in names:
        return names.index(str(label))
    if names:
        raise UsageError(
            f"label={label}: this model has the classes 0..{num_classes - 1}, by name: {nearest(str(label), names)}"
        )
    by_name = "" if isinstance(label, int) else ", and its run does not keep their names"
    raise UsageError(f"label={label}: this model has the classes 0..{num_classes - 1}{by_name}")


def quoted(name: str) -> str:
    """Quote a name for the shell and for Hydra."""
    return f"'{json.dumps(name, ensure_ascii=False)}'"
