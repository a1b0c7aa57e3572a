"""Allow list of the classes in the configuration of a run.

Configurations of runs are untrusted, and a ``_target_`` is imported and called. Full names are looked up in exact lists, built
without imports by parsing genzoo's sources and configurations. Users extend them by exact names in ``trust=`` or in the files
of a ``--config-dir``.
"""

from __future__ import annotations

import ast
import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from genzoo.config.names import is_full_name
from genzoo.config.paths import CONF, PACKAGE
from genzoo.errors import UsageError
from genzoo.runs import YAML_BYTES

# Files whose public classes are allowed as parts of models.
PARTS = (
    "conditions.py",
    "event.py",
    "families/*.py",
    "nn/*.py",
    "diffusion/noise_levels.py",
    "diffusion/samplers/*.py",
    "diffusion/schedules.py",
    "diffusion/time_pairs.py",
    "distributions/likelihoods.py",
    "metrics/perceptual.py",
)

# Composes a model from parts that are checked by the same rules.
FROZEN = "genzoo.model.frozen"

# Functions that read other runs and have a ``trust`` argument of their own.
_NEVER = ("genzoo.cli.", "genzoo.config.", "genzoo.load")


def check_names(node: Any, key: str, trust: Sequence[str] = ()) -> None:
    """Check all ``_target_`` values of a section of a run's configuration before importing any of them.

    Args:
        node: plain types.
        key: key of the node; its first part is the section.
        trust: further allowed full names.

    Raises:
        UsageError: for a name that is not allowed.
    """
    accepted = allowed(re.split(r"[.\[]", key, maxsplit=1)[0]).union(trust)

    def check(node: Any, key: str) -> None:
        if isinstance(node, list):
            for i, item in enumerate(node):
                check(item, f"{key}[{i}]")
        if not isinstance(node, dict):
            return
        if "_target_" in node:
            target = node["_target_"]
            if not is_full_name(target):
                raise UsageError(f"{key}._target_={str(target)[:200]!r}: must be the full name of a class")
            if target not in accepted or target.startswith(_NEVER):
                hint = "" if target.startswith(_NEVER) else f"; trust=[{target}] allows it"
                raise UsageError(f"{key}._target_={target}: not among the classes allowed in a run{hint}")
        for name, value in node.items():
            check(value, f"{key}.{name}")

    check(node, key)


@functools.cache
def allowed(section: str) -> frozenset[str]:
    """List the classes allowed in a section of a run's configuration.

    Args:
        section: "model", "optimizer", "trainer", "logger" or "data".

    Returns:
        Full names; empty for a section without objects.
    """
    if section == "model":
        return frozenset({FROZEN, *_parts(), *named_in(CONF / "model")})
    if section == "optimizer":
        return _optimizers().union(named_in(CONF / section))
    return frozenset(named_in(CONF / section))


def _parts() -> Iterator[str]:
    for pattern in PARTS:
        for path in PACKAGE.glob(pattern):
            # Samplers are exported by their package.
            place = path.parent if path.parent.name == "samplers" else path.with_suffix("")
            module = ".".join(place.relative_to(PACKAGE.parent).parts)
            for node in ast.parse(path.read_bytes()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    yield f"{module}.{node.name}"


def _optimizers() -> frozenset[str]:
    import torch

    own = {name: value for name, value in vars(torch.optim).items() if isinstance(value, type)}
    return frozenset(f"torch.optim.{name}" for name, value in own.items() if issubclass(value, torch.optim.Optimizer))


def named_in(config_dir: str | os.PathLike[str], run: str | os.PathLike[str] | None = None) -> set[str]:
    """List the ``_target_`` values of the configurations in a user's directory.

    Run directories are skipped, and so is the top-level folder that contains the current run, so that ``--config-dir .`` does
    not trust files downloaded together with a run.

    Args:
        config_dir: the directory.
        run: the current run, if any.
    """
    top = Path(config_dir).resolve()
    away = Path(run).resolve() if run is not None else None
    found: set[str] = set()
    for here, folders, files in os.walk(top):
        if "config.yaml" in files and ("checkpoints" in folders or "status.json" in files):
            folders.clear()
            continue
        folders[:] = [name for name in folders if here != str(top) or not (away and away.is_relative_to(top / name))]
        for path in (Path(here, name) for name in files if name.endswith(".yaml")):
            if path.is_file() and path.stat().st_size <= YAML_BYTES:
                found.update(_targets(path.read_bytes()))
    return {name for name in found if is_full_name(name) and not name.startswith(_NEVER)}


def _targets(content: bytes) -> Iterator[str]:
    """List the values of all keys ``_target_``; invalid YAML yields none."""
    try:
        left = [yaml.compose(content, Loader=yaml.SafeLoader)] if b"_target_" in content else []
    except (yaml.YAMLError, RecursionError):
        return
    seen = set()  # aliases refer to the same node
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == "_target_" and isinstance(value, yaml.ScalarNode):
                    yield value.value
                left.append(value)
        elif isinstance(node, yaml.SequenceNode):
            left.extend(node.value)
