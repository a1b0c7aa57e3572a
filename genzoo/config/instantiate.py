"""Instantiation of objects from configurations; those of runs are checked by ``genzoo.config.allow_list``."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

from genzoo.config.check import renamed
from genzoo.config.loader import is_finite
from genzoo.config.memory import within_memory
from genzoo.config.names import is_full_name
from genzoo.errors import BUILD_ERRORS, MISMATCHES, UsageError, nearest, one_line


def targets(node: Any) -> Iterator[str]:
    """List all ``_target_`` values of a configuration."""
    if isinstance(node, dict) and isinstance(node.get("_target_"), str):
        yield node["_target_"]
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from targets(item)


def _resolve(target: Any, key: str) -> Any:
    if not is_full_name(target):
        raise UsageError(f"{key}._target_={target}: must be the full name of a class, package.module.Class")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
        if not callable(found):
            raise AttributeError(f"it is a {type(found).__name__}")
        return found
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{key}._target_={target}: no such class: {error}") from error


def build(node: Any, key: str, *, trusted: bool = True, trust: Sequence[str] = (), **extra: Any) -> Any:
    """Instantiate the object of a configuration, recursively.

    Args:
        node: plain types, with a ``_target_`` for each object.
        key: key of the node, for messages; its first part selects the list of ``genzoo.config.allow_list.allowed``.
        trusted: whether the user wrote it; otherwise all names are checked before any import.
        trust: further allowed full names.
        extra: further arguments of the outermost object.

    Raises:
        UsageError: for an unknown class or argument, an argument of the wrong type, or an error of a constructor.
    """

    if not trusted:
        from genzoo.config.allow_list import check_names

        check_names(node, key, trust)
    with within_memory():
        # Any error of a constructor with untrusted arguments is a usage error.
        return _build(node, key, BUILD_ERRORS if trusted else (Exception,), extra)


class _Part(functools.partial):
    """A partial constructor of a nested object; its errors name the key."""

    key: str

    def __call__(self, /, *arguments: Any, **keywords: Any) -> Any:
        try:
            return super().__call__(*arguments, **keywords)
        except UsageError:
            raise
        except BUILD_ERRORS as error:
            message = _constructor_error(self.func, arguments, self.keywords | keywords, error)
            raise UsageError(f"{self.key}: {message}") from error


def _constructor_error(function: Any, arguments: Sequence[Any], keywords: dict[str, Any], error: BaseException) -> str:
    """Message of a failed constructor, with the arguments unless it names one of them."""
    text = one_line(error) or type(error).__name__
    if isinstance(error, ValueError):  # of an explicit check
        return text
    if not isinstance(error, MISMATCHES) and any(re.search(rf"\b{name}\b", text) for name in keywords):
        return text
    plain = (f"{name}={value}" for name, value in keywords.items() if isinstance(value, int | float | str | None))
    return f"{function.__name__}({', '.join([*map(str, arguments), *plain])[:200]}): {text}"


def _build(node: Any, key: str, refusals: tuple[type[Exception], ...], extra: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(item, f"{key}[{i}]", refusals, {}) for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    arguments = {
        name: _build(value, f"{key}.{name}", refusals, {})
        for name, value in node.items()
        if name not in ("_target_", "_partial_")
    }
    if "_target_" not in node:
        return arguments
    partial = node.get("_partial_", False)
    if not isinstance(partial, bool):
        raise UsageError(f"{key}._partial_={partial}: must be true or false")
    function = _resolve(node["_target_"], key)
    arguments |= extra
    _check_arguments(function, arguments, key, partial)
    try:
        if not partial:
            return function(**arguments)
        if "." not in key:  # an optimizer, instantiated later
            return functools.partial(function, **arguments)
        part = _Part(function, **arguments)
        part.key = key
        return part
    except UsageError:
        raise
    except refusals as error:
        raise UsageError(f"{key}: {_constructor_error(function, (), arguments, error)}") from error


def _check_arguments(function: Any, arguments: dict[str, Any], key: str, partial: bool) -> None:
    """Check the names of arguments against a signature, and their types where annotated."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return
    try:
        hints = inspect.get_annotations(function.__init__ if inspect.isclass(function) else function, eval_str=True)
    except (TypeError, NameError):  # annotations imported under TYPE_CHECKING
        hints = {}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in arguments.items():
        if name not in parameters and not open_ended:
            hint_of = renamed(f"{key}.{name}", (f"{key}.{other}" for other in parameters)) or nearest(name, parameters)
            raise UsageError(f"unknown key '{key}.{name}': {hint_of}")
        hint = hints.get(name)
        problem = _wrong_type(value, hint)
        if not problem and hint in (int, int | None) and value is not None and value < 0 and _is_ours(function):
            problem = "must not be negative"
        if problem:
            raise UsageError(f"{key}.{name}={_shown(value)}: {problem}")
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind in kinds]
    lacking = [name for name in needed if name not in arguments]
    if lacking and not partial:
        raise UsageError(f"{key}.{lacking[0]} is missing: set {key}.{lacking[0]}=...")


def _is_ours(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("genzoo.")


def _shown(value: Any) -> str:
    if not isinstance(value, int | float | str | list | dict | None):
        return f"({type(value).__name__})"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _wrong_type(value: Any, hint: Any) -> str | None:
    """Describe the type mismatch of a value; None if it matches or the hint cannot be checked."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if hint is None:
        return None
    if not is_finite(value):
        return "must be finite"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "must be less than 2**63"
    errors = []
    for candidate in (value, _tuples(value)):  # YAML has no tuples
        try:
            TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(candidate, strict=True)
        except ValidationError as error:
            errors.append(error.errors(include_context=False)[0])
        except Exception:  # pydantic raises errors of many kinds for unsupported annotations
            return None
        else:
            return None
    message = max(errors, key=lambda error: len(error["loc"]))["msg"]
    return f"{message[0].lower()}{message[1:]}"


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
