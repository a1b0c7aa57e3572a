"""The data of a run, by its (untrusted) configuration."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from genzoo.config.check import check_section
from genzoo.config.instantiate import build
from genzoo.data import DataSet
from genzoo.errors import UsageError
from genzoo.jobs.building import make_data
from genzoo.runs import Run


def data_section(run: Run) -> dict[str, Any]:
    """Return the validated data section of a run's configuration.

    Raises:
        UsageError: naming the file, for a missing or invalid section.
    """
    where, section = run.path / "config.yaml", run.config.get("data")
    if not isinstance(section, dict):
        raise UsageError(f"{where}: has no data section")
    try:
        return check_section("data", section)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def build_data(run: Run, section: dict[str, Any], trust: Sequence[str] = ()) -> DataSet:
    """Load the data of a run; its classes are checked before they are imported.

    Args:
        run: the run.
        section: of ``data_section``.
        trust: allowed classes outside genzoo.

    Raises:
        UsageError: for a source that is not allowed, or that does not return a ``DataSet``.
        DataError: for missing or invalid files.
    """
    data = make_data(section, functools.partial(build, trusted=False, trust=trust))
    if not isinstance(data, DataSet):
        target = section["source"].get("_target_")
        raise UsageError(f"{run.path / 'config.yaml'}: data.source._target_={target}: does not return a DataSet")
    return data


def has_changed(run: Run, data: DataSet) -> bool:
    """Whether the data differ from those of the training, by their SHA-256."""
    return run.status.get("data_sha256") not in (None, data.sha256)
