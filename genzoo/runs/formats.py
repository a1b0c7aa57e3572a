"""Safe parsing of untrusted JSON and YAML: plain values of bounded size and depth."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import yaml

from genzoo.runs.errors import RunError
from genzoo.runs.files import read_file
from genzoo.runs.redact import redact

# Limits, far above the files of genzoo.
YAML_BYTES, JSON_BYTES, PICTURE_BYTES, EVENT_BYTES = 2**20, 2**22, 2**24, 2**28
NAMES = 1000  # values of one event
NODES = 50_000  # values of a configuration
DEPTH = 50  # of nesting
LARGEST = 1e100  # largest number, so that sums of squares are finite


def _check_plain(value: Any) -> None:
    """Reject deep nesting, keys that are not strings, dates, NaN and numbers beyond ``LARGEST``.

    Raises:
        ValueError: naming the value.
    """
    level = [value]
    for _ in range(DEPTH + 1):
        below: list[Any] = []
        for node in level:
            kind = type(node)
            if kind is str or node is None or kind is bool:
                continue
            if kind is float or kind is int:
                if not -LARGEST <= node <= LARGEST:  # true for NaN too
                    raise ValueError(f"contains a number that is not finite or beyond {LARGEST:g}")
            elif kind is dict:
                for key in node:
                    if type(key) is not str:
                        raise ValueError(f"the key {key!r} is not a string")
                below.extend(node.values())
            elif kind is list:
                below.extend(node)
            else:
                raise ValueError(f"contains a {kind.__name__}, which is neither a number nor a string")
        level = below
    if level:
        raise ValueError(f"nested more than {DEPTH} deep")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:i]))
        raise ValueError(f"duplicate key {twice[:100]!r}")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_once)


def parse_json(data: bytes) -> Any:
    """Parse JSON of plain values without duplicate keys.

    Raises:
        ValueError: for anything else.
    """
    try:
        value = _JSON.decode(data.decode())
    except RecursionError as error:
        raise ValueError(f"nested more than {DEPTH} deep") from error
    _check_plain(value)
    return value


AXES = {"step", "images", "planned_images", "seconds", "flops", "images_per_second"}  # of an event


def check_event(event: Any) -> dict[str, Any]:
    """Validate an event of ``metrics.jsonl``: its kind, position along the axes, and named values.

    Raises:
        ValueError: for anything else.
    """
    if type(event) is not dict or type(event.get("event")) is not str:
        raise ValueError("is not an event: event must be a string")
    for name in AXES & event.keys():
        if not _is_number(event[name]) or (event[name] is not None and event[name] < 0):
            raise ValueError(f"{name} must be a number of at least 0, or null")
    values = event.get("values")
    if "values" in event or event["event"] in ("train", "interim"):
        if type(values) is not dict or len(values) > NAMES:
            raise ValueError(f"values must be a mapping of at most {NAMES:,} names to numbers")
        for name, value in values.items():
            if not _is_number(value):
                raise ValueError(f"values: {name[:100]!r} must be a number")
    return event


def _is_number(value: Any) -> bool:
    return value is None or type(value) is float or type(value) is int


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping of a run.

    Raises:
        RunError: naming the file.
    """
    content = read_file(path, JSON_BYTES)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise RunError(f"{path}: broken JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: is not a mapping")
    return value


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def parse_yaml(data: bytes) -> Any:
    """Parse YAML of plain values without tags, aliases and duplicate keys.

    Raises:
        ValueError: for anything else.
    """
    try:
        loader = _Loader(data)
        try:
            value = _compose(loader)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from error
    _check_plain(value)
    return value


def _compose(loader: Any) -> Any:
    """Compose the document of a stream of events iteratively; libyaml's own composer crashes on deep nesting."""
    found: list[Any] = []  # the root of the document
    open_: list[list[Any]] = [found]  # entries of the open collections; keys and values of mappings alternate
    count = documents = 0
    while loader.check_event():
        event = loader.get_event()
        count += 1
        if count > NODES or len(open_) > DEPTH + 1:
            raise ValueError(f"nested more than {DEPTH} deep, or more than {NODES:,} values")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            line = event.start_mark.line + 1 if event.start_mark else "?"
            raise ValueError(f"an alias or a tag in line {line}, which a configuration may not contain")
        if isinstance(event, yaml.ScalarEvent):
            open_[-1].append(_plain_scalar(event.value) if event.implicit[0] else event.value)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append([])
        elif isinstance(event, yaml.SequenceEndEvent):
            entries = open_.pop()
            open_[-1].append(entries)
        elif isinstance(event, yaml.MappingEndEvent):
            entries = open_.pop()
            for key in entries[::2]:
                if type(key) is not str:
                    raise ValueError(f"the key {str(key)[:100]!r} is not a string")
            open_[-1].append(_once(list(zip(entries[::2], entries[1::2], strict=True))))
        elif isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise ValueError("contains two documents")
    return found[0] if found else None


@functools.lru_cache(4096)
def _plain_scalar(text: str) -> Any:
    """Resolve an unquoted scalar: a number, a bool, null or a string."""
    loader = yaml.SafeLoader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text))
    finally:
        loader.dispose()


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any, indent: int | None = 2) -> bytes:
    """Serialise plain types as JSON, with non-finite numbers as null and secrets redacted."""
    separators = None if indent else (",", ":")
    return (json.dumps(_finite(redact(value)), indent=indent, separators=separators, allow_nan=False) + "\n").encode()
