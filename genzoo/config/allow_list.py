"""What the configuration of a run may name.

A run may be anybody's, and a class that is named is imported and called. So the names are looked up in lists that are
exact, and nothing is imported to make up one's mind: genzoo's own sources and configurations are read as text. What the
reader allows besides, by ``trust=`` or in a ``--config-dir``, is exact too.
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

# Where the parts of models are defined: every public class of these files is one.
PARTS = (
    "conditions.py",
    "event.py",
    "families/*.py",
    "nn/*.py",
    "diffusion/noise_levels.py",
    "diffusion/samplers/*.py",
    "diffusion/schedules.py",
    "distributions/likelihoods.py",
)

# What puts a model together out of parts that are built by these same rules.
FROZEN = "genzoo.model.frozen"

# Commands read other runs, and are told themselves whom to trust.
_NEVER = ("genzoo.cli.", "genzoo.config.", "genzoo.load")


def check_names(node: Any, key: str, trust: Sequence[str] = ()) -> None:
    """Look up every name in a section of a run's configuration, before any of them is imported.

    Args:
        node: plain types.
        key: where the node stands; its first word is the section.
        trust: full names that are allowed besides.

    Raises:
        UsageError: for a name that is on no list.
    """
    may = allowed(re.split(r"[.\[]", key, maxsplit=1)[0]).union(trust)

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
            if target not in may or target.startswith(_NEVER):
                hint = "" if target.startswith(_NEVER) else f"; trust=[{target}] allows it"
                raise UsageError(f"{key}._target_={target}: not among the classes that a run may name{hint}")
        for name, value in node.items():
            check(value, f"{key}.{name}")

    check(node, key)


@functools.cache
def allowed(section: str) -> frozenset[str]:
    """List what a section of a run's configuration may name.

    Args:
        section: the first word of its keys: "model", "optimizer", "trainer", "logger", "data".

    Returns:
        The full names; none for a section that describes no object.
    """
    if section == "model":
        return frozenset({FROZEN, *_parts(), *named_in(CONF / "model")})
    if section == "optimizer":
        return _optimizers()
    return frozenset(named_in(CONF / section))


def _parts() -> Iterator[str]:
    for pattern in PARTS:
        for path in PACKAGE.glob(pattern):
            # Samplers are named by their package, which exports them.
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
    """List what the configurations in a directory of the reader's own name as ``_target_``.

    Directories of runs are passed over, and so is whatever lies beside the run that is read, below the first folder
    that leads to it: ``--config-dir .`` says nothing for what was downloaded into the same place.

    Args:
        config_dir: the directory.
        run: the run that is read, if there is one.
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
    """List the values of all keys ``_target_``; what is no YAML names nothing."""
    try:
        left = [yaml.compose(content, Loader=yaml.SafeLoader)] if b"_target_" in content else []
    except (yaml.YAMLError, RecursionError):
        return
    seen = set()  # an alias leads to the same node again
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
