"""Configurations: where they lie, what is wrong with them, and how they become objects.

What a user may get wrong is answered in one line that names the key, what is wrong and the nearest valid choice, before any
directory is made. What came with somebody's run is trusted with less than what the user typed: ``build(..., trusted=False)``
makes nothing but genzoo's own families, networks, schedules, likelihoods and samplers.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

VERBS = ("train", "sample", "evaluate")
_PACKAGE = Path(__file__).resolve().parent.parent
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

# Modules whose public classes the configuration of a stranger's run may name.
_TRUSTED = ("genzoo.families.", "genzoo.nn.", "genzoo.samplers.", "genzoo.prob.schedules.", "genzoo.prob.likelihoods.")


class UsageError(ValueError):
    """Something that the user can mend; the message is one line."""


def one_line(error: BaseException | str) -> str:
    """Squeeze a message into one line."""
    return " ".join(str(error).split())


def nearest(word: str, choices: Iterable[str]) -> str:
    """Say which of the choices was probably meant, or list them where none is near."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"choose from {', '.join(choices)}" if 0 < len(choices) <= 20 else "see --help"


@contextlib.contextmanager
def _hydra(config_dir: str | None) -> Iterator[ConfigLoader]:
    """Open the configuration directory, and the user's own one, to be composed or listed."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="genzoo"):
        yield GlobalHydra.instance().config_loader()


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(config, DictConfig):
        for key in config:
            yield f"{prefix}{key}"
            # Only the shape is wanted: an interpolation or a missing value is a leaf.
            if not OmegaConf.is_interpolation(config, key) and not OmegaConf.is_missing(config, key):
                yield from _keys(config._get_node(key), f"{prefix}{key}.")


def _parent(config: DictConfig, key: str) -> tuple[DictConfig, str]:
    """Split a dotted key into the mapping that holds it and its last part, without resolving anything."""
    *above, last = key.split(".")
    for part in above:
        config = config._get_node(part)  # type: ignore[assignment]
    return config, last


def _first(override: Override) -> str:
    """Return one override of a sweep, as text: the first of its choices."""
    if not override.is_sweep_override():
        return override.input_line or ""
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


def preflight(verb: str, overrides: Sequence[str], config_dir: str | None = None) -> None:
    """Compose a command line and check it, without importing torch.

    Raises:
        UsageError: naming the key, what is wrong and the nearest valid choice.
    """
    search = [f"hydra.searchpath=[file://{os.path.abspath(config_dir)}]"] if config_dir else []
    try:
        parsed = [OverridesParser.create().parse_overrides([text])[0] for text in overrides]
    except HydraException as error:
        bad = next(text for text in overrides if not _parses(text))
        raise UsageError(f"cannot read '{bad}': write key=value, with quotes around special characters") from error
    with _hydra(config_dir) as loader:
        for override in parsed:
            _check_choice(loader, override, config_dir)
        try:
            config = compose(verb, [*search, *(_first(o) for o in parsed)], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise _explain(verb, parsed, search, error) from error
    with contextlib.suppress(KeyError):
        del config._content["hydra"]
    validate(verb, config)


def _parses(text: str) -> bool:
    try:
        OverridesParser.create().parse_overrides([text])
    except HydraException:
        return False
    return True


def _check_choice(loader: ConfigLoader, override: Override, config_dir: str | None) -> None:
    """Refuse a choice that its group does not have."""
    group = override.key_or_group
    options = _options(loader, group, config_dir)
    if not options or override.is_delete():
        return
    values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
    for value in values:
        if isinstance(value, str) and value not in options and value != "null":
            raise UsageError(f"unknown {group} '{value}': {nearest(value, options)}")


def _options(loader: ConfigLoader, group: str, config_dir: str | None) -> list[str]:
    options = loader.get_group_options(group, results_filter=ObjectType.CONFIG)
    folder = Path(config_dir or "", group)
    if config_dir and folder.is_dir():
        options = [*options, *(path.stem for path in folder.glob("*.yaml"))]
    return options


def _explain(verb: str, overrides: Sequence[Override], search: list[str], error: Exception) -> UsageError:
    """Find the override that does not compose, and say what was probably meant."""
    good = list(search)
    groups = [o for o in overrides if o.package is not None or "." not in o.key_or_group]
    values = [o for o in overrides if o not in groups]
    for override in [*groups, *values]:
        try:
            compose(verb, [*good, _first(override)])
            good.append(_first(override))
        except (HydraException, OmegaConfBaseException) as cause:
            key = override.key_or_group
            known = set(_keys(compose(verb, good))) if not override.is_add() else set()
            if known and key not in known:
                tops = known | {path.name for path in CONF.iterdir() if path.is_dir()}
                tail = [k for k in known if k.rsplit(".", 1)[0] == key.rsplit(".", 1)[0]] if "." in key else []
                return UsageError(f"unknown key '{key}': {nearest(key, tail or tops)}")
            return UsageError(f"{override.input_line}: {one_line(cause)}")
    return UsageError(one_line(error))


def validate(verb: str, config: DictConfig) -> dict[str, Any]:
    """Check the values of a composed configuration and return it as plain types.

    Raises:
        UsageError: naming the full key.
    """
    from pydantic import ValidationError

    from genzoo.commands.schema import SCHEMAS

    missing = [key for key in _keys(config) if OmegaConf.is_missing(*_parent(config, key))]
    if missing:
        example = {"run": "outputs/vae-digits/20260101-120000-000000-abcdef"}.get(missing[0], "...")
        raise UsageError(f"{missing[0]} is missing: say {missing[0]}={example}")
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UsageError(one_line(error)) from error
    try:
        SCHEMAS[verb].model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            fields = SCHEMAS[verb].known_keys()
            raise UsageError(f"unknown key '{key}': {nearest(key, fields)}") from error
        raise UsageError(f"{key}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from error
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def _resolve(target: str, key: str) -> Any:
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{key}._target_={target}: no such class: {one_line(error)}") from error


def _trusted(target: str, trust: Sequence[str]) -> bool:
    if target in trust:
        return True
    module, _, name = target.rpartition(".")
    if not any(f"{module}.".startswith(prefix) for prefix in _TRUSTED) or name.startswith("_"):
        return False
    known = inspect.getattr_static(importlib.import_module(module), name, None) if _is_ours(module) else None
    return inspect.isclass(known) and known.__module__ == module


def _is_ours(module: str) -> bool:
    path = _PACKAGE.parent.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def build(node: Any, key: str, *, trusted: bool = True, trust: Sequence[str] = (), **extra: Any) -> Any:
    """Turn a configuration into the object that it describes; the one place that does.

    Args:
        node: plain types, with ``_target_`` where an object is wanted.
        key: where the node stands, for messages.
        trusted: whether the user wrote it; otherwise only genzoo's own building blocks are made.
        trust: classes that are made all the same.
        extra: further arguments of the outermost object.

    Raises:
        UsageError: for an unknown class or argument, an argument of the wrong type, or one that its class refuses.
    """
    if isinstance(node, list):
        return [build(item, f"{key}[{i}]", trusted=trusted, trust=trust) for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        return {name: build(value, f"{key}.{name}", trusted=trusted, trust=trust) for name, value in node.items()}
    target = node["_target_"]
    if not isinstance(target, str) or (not trusted and not _trusted(target, trust)):
        raise UsageError(f"{key}._target_={target}: not among the classes that a run may name; trust=[{target}] allows it")
    arguments = {
        name: build(value, f"{key}.{name}", trusted=trusted, trust=trust)
        for name, value in node.items()
        if name not in ("_target_", "_partial_")
    }
    function = _resolve(target, key)
    partial = bool(node.get("_partial_", False))
    _check_arguments(function, {**arguments, **extra}, key, partial)
    try:
        return functools.partial(function, **arguments, **extra) if partial else function(**arguments, **extra)
    except UsageError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(f"{key}: {one_line(error)}") from error


def _check_arguments(function: Any, arguments: dict[str, Any], key: str, partial: bool) -> None:
    """Compare arguments with a signature: names, and types where they are plain ones."""
    try:
        signature = inspect.signature(function)
        hints = inspect.get_annotations(function.__init__ if inspect.isclass(function) else function, eval_str=True)
    except (TypeError, ValueError, NameError):
        return
    parameters = signature.parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in arguments.items():
        if name not in parameters and not open_ended:
            raise UsageError(f"unknown key '{key}.{name}': {nearest(name, parameters)}")
        problem = _wrong_type(value, hints.get(name))
        if problem:
            raise UsageError(f"{key}.{name}={value!r}: {problem}")
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind in kinds]
    lacking = [name for name in needed if name not in arguments]
    if lacking and not partial:
        raise UsageError(f"{key}.{lacking[0]} is missing")


def _wrong_type(value: Any, hint: Any) -> str | None:
    """Say what a plain value should have been, None where it fits or the hint is no plain type."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if hint is None or not isinstance(value, (int, float, str, bool, list, type(None))):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return "must be finite"
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception:  # noqa: BLE001  pydantic raises many kinds for annotations that it cannot read
        return None
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        return f"{message[0].lower()}{message[1:]}"
    return None


def pick_precision(name: str, device: str) -> str:
    """Turn "auto" into bf16 autocast where the processor computes in it, else float32."""
    import torch

    if name != "auto":
        return name
    native = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if native else "32-true"


def pick_device(name: str) -> str:
    """Turn "auto" into what this machine has.

    Raises:
        UsageError: for a device that is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda: torch finds no CUDA device here; say device=cpu")
    return name
