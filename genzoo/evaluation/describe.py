"""Descriptions of objects in plain types, for the cards of scores.

Samplers that differ in any nested attribute have different descriptions, which distinguish the rows of a report.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


def describe(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """Describe a value in plain types.

    Objects are replaced by their names and attributes, recursively; tensors, arrays and weights by the SHA-256 of their bytes;
    functions by their names, and local functions also by their code, defaults and closure.

    Args:
        value: any object.
        inside: ids of the enclosing objects.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if id(value) in inside:
        return "itself"
    deeper = functools.partial(describe, inside=(*inside, id(value)))
    if isinstance(value, torch.Tensor | np.ndarray):
        return _tensor(torch.as_tensor(value))
    if isinstance(value, Mapping):
        return _each(deeper, value)
    if isinstance(value, list | tuple):
        items = [deeper(item) for item in value]
        return items if type(value) in (list, tuple) else {"name": _name(type(value)), "items": items}
    if isinstance(value, set | frozenset):
        return sorted((deeper(item) for item in value), key=repr)
    if isinstance(value, functools.partial):
        of = deeper(value.func)
        named = {"name": of} if isinstance(of, str) else {"name": "partial", "of": of}
        return {**named, "items": deeper(value.args), **_each(deeper, value.keywords)}
    if inspect.ismethod(value):
        return {"name": _name(value), "of": deeper(value.__self__)}
    if isinstance(value, types.FunctionType) and "<" in value.__qualname__:  # the name is not unique
        return {"name": _name(value), **_each(deeper, _closure(value))}
    if inspect.isroutine(value) or isinstance(value, type):
        return _name(value)
    return {"name": _name(type(value)), **_each(deeper, _state(value))}


def _each(describe: Callable[[Any], Any], values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): describe(value) for key, value in values.items()}


def _name(thing: Any) -> str:
    """Name of a class or a function, with its module outside of genzoo."""
    module = str(thing.__module__)
    return thing.__qualname__ if module.partition(".")[0] == "genzoo" else f"{module}.{thing.__qualname__}"


def _closure(function: types.FunctionType) -> dict[str, Any]:
    """Code, defaults and closure of a local function."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {
        "code": _code(function.__code__),
        "defaults": [*(function.__defaults__ or ()), function.__kwdefaults__],
        "encloses": {name: cell.cell_contents for name, cell in cells if cell != types.CellType()},
    }


def _code(code: types.CodeType) -> str:
    constants = [_code(c) if isinstance(c, types.CodeType) else describe(c) for c in code.co_consts]
    return hashlib.sha256(repr([code.co_code, code.co_names, constants]).encode()).hexdigest()


def _state(value: Any) -> Mapping[Any, Any]:
    """Attributes of an object; settings, children, weights and buffers of a module."""
    if isinstance(value, nn.Module):
        settings = {name: v for name, v in vars(value).items() if not name.startswith("_") and name != "training"}
        own = [*value.named_parameters(recurse=False), *value.named_buffers(recurse=False)]
        return {**settings, **dict(value.named_children()), **dict(own)}
    state = value.__getstate__()
    if isinstance(state, tuple) and len(state) == 2:  # of a class with slots
        state = {**(state[0] or {}), **(state[1] or {})}
    if state is None:
        return {} if type(value).__repr__ is object.__repr__ else {"value": repr(value)}
    return state if isinstance(state, Mapping) else {"state": state}


def _tensor(x: torch.Tensor) -> dict[str, Any]:
    content = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    sha256 = hashlib.sha256(content).hexdigest()
    return {"name": "Tensor", "shape": list(x.shape), "dtype": str(x.dtype), "sha256": sha256}
