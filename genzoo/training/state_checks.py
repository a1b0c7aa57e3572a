"""What a checkpoint says of a training, checked before anything of it is used: it may be anybody's, or damaged with care.

The names, types, ranges and shapes are those of a training of the same configuration: an optimiser's state must look like
that of one that has stepped on weights of the same shape, and its settings are the configuration's and not the file's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genzoo.runs.upgrade import upgraded_names

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
MOST = 2**53  # steps, updates and the like: integers that a float holds


class StateError(ValueError):
    """What no training of this configuration has written; the message is one line."""


def whole(value: Any, name: str, least: int = 0, most: int = MOST) -> int:
    """Return an integer of some range.

    Raises:
        StateError: for anything else.
    """
    if type(value) is not int or not least <= value <= most:
        raise StateError(f"{name}={_shown(value)}: must be an integer from {least} to {most}")
    return value


def real(value: Any, name: str, most: float = 1e100) -> float:
    """Return a number that is not negative.

    Raises:
        StateError: for anything else.
    """
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise StateError(f"{name}={_shown(value)}: must be a number from 0 to {most:g}")
    return value


def check_progress(
    state: Any,
    *,
    stages: int,
    longest: int | None,
    corrections: int,
    updates: Iterable[str],
) -> None:
    """Check where a training was: its steps, its plan, and what it has counted.

    Args:
        state: as ``GenerativeModule.state`` returns it.
        stages: how many the model has.
        longest: steps that the budget of images allows; None where it is none of images.
        corrections: of a plan by the clock, at most, in a stage.
        updates: whose updates of the average are counted.

    Raises:
        StateError: naming what is wrong, and what it should have been.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"holds a {type(state).__name__}, not a mapping")
    planned = whole(state.get("planned_steps"), "planned_steps", 1)
    if longest is not None and planned > longest:
        raise StateError(f"planned_steps={planned}: budget.images allows {longest}")
    steps = whole(state.get("steps"), "steps", 0, planned)
    ends = [0, *(whole(end, "boundaries", 0, planned) for end in _list(state, "boundaries", stages - 1)), planned]
    if ends != sorted(ends):
        raise StateError(f"boundaries={_shown(ends[1:-1])}: stages end one after the other")
    for speed in _list(state, "speeds", 0, stages):
        if speed is not None:  # of a stage that was not measured yet
            real(speed, "speeds")
    if "planned_by" in state:  # which older states lack
        for name in ("planned_by", "counted_by"):
            if state.get(name) not in ("", "images", "seconds", "flops"):
                raise StateError(f"{name}={_shown(state.get(name))}: must be images, seconds or flops")
        for end in _list(state, "counted", 0, stages):
            whole(end, "counted", 0)
    for name in ("begun", "fitted"):
        if name == "fitted" and state.get(name) is None:
            continue
        at, seconds = _list(state, name, 2)
        whole(at, name, 0, steps)
        real(seconds, name)
    whole(state.get("corrections"), "corrections", 0, corrections)
    real(state.get("train_seconds"), "train_seconds")
    whole(state.get("flops"), "flops", 0, 10**40)
    for name in ("skipped", "in_a_row"):
        whole(state.get(name, 0), name)
    if type(state.get("decaying", False)) is not bool:
        raise StateError(f"decaying={_shown(state['decaying'])}: must be true or false")
    counted = _mapping(state, "ema_updates")
    if set(counted) != set(updates):
        raise StateError(f"ema_updates: counts {_shown(list(counted))}, not {_shown(list(updates))}")
    for name, count in counted.items():
        whole(count, f"ema_updates.{name}")
    for name, values in _mapping(state, "window").items():
        if not (isinstance(name, str) and is_plain(values) and values.ndim == 1 and not values.is_complex()):
            raise StateError(f"window.{_shown(name)}: must be a list of numbers")
        whole(len(values), f"length of window.{name}", 0, max(steps, 1))
    for name, value in _mapping({"scaler": {}, **state}, "scaler").items():  # which older states lack
        real(value, f"scaler.{_shown(name)}")


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor with memory of its own for every number: no view that repeats a few of them."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
        and all(stride > 0 or size <= 1 for size, stride in zip(value.shape, value.stride(), strict=True))
    )


def check_optimizer_state(found: Any, optimizer: torch.optim.Optimizer, make: Make, name: str) -> dict[str, Any]:
    """Return what an optimiser of this configuration may load of what a checkpoint holds.

    Args:
        found: in the checkpoint.
        optimizer: that goes on; its settings are kept, but for the learning rate, which changes on the way.
        make: makes one like it.
        name: of it, for messages.

    Raises:
        StateError: naming the entry that no optimiser of this kind and for these weights has.
    """
    if not isinstance(found, Mapping):
        raise StateError(f"{name}: is a {type(found).__name__}, not a mapping")
    own = optimizer.state_dict()["param_groups"]
    theirs = _list(found, "param_groups", len(own))
    groups = [_settings(group, its, optimizer, name) for group, its in zip(own, theirs, strict=True)]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    like = functools.cache(functools.partial(_like, make))
    state = _mapping(found, "state")
    for number, entries in state.items():
        where = f"{name}.state[{_shown(number)}]"
        weight = weights[whole(number, where, 0, len(weights) - 1)]
        _check_entries(entries, weight, like(tuple(side == 1 for side in weight.shape), weight.dtype), where)
    return {"state": dict(state), "param_groups": groups}


def _settings(own: dict[str, Any], theirs: Any, optimizer: torch.optim.Optimizer, name: str) -> dict[str, Any]:
    """Return the settings of a group of weights: those of torch's optimisers are the configuration's."""
    if not isinstance(theirs, Mapping) or theirs.get("params") != own["params"]:
        raise StateError(f"{name}.param_groups: are groups of other weights")
    # Optimisers of other packages keep in them what changes on the way too.
    may_change = ("lr",) if type(optimizer).__module__.startswith("torch.optim.") else own.keys() - {"params"}
    kept = dict(own)
    for key in may_change:
        value = theirs.get(key, own[key])
        if type(value) is not type(own[key]) or (isinstance(value, float) and not math.isfinite(value)):
            raise StateError(f"{name}.param_groups.{key}={_shown(value)}: must be like {_shown(own[key])}")
        kept[key] = real(value, f"{name}.param_groups.lr") if key == "lr" and not isinstance(value, Tensor) else value
    return kept


def _like(make: Make, single: tuple[bool, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], dict[str, Any]] | None:
    """Step once on a small weight, each of whose sides has another length, or 1; None for an optimiser that cannot."""
    sides = [1 if one else side for side, one in zip((2, 3, 5, 7, 11, 13), single, strict=False)]
    weight = nn.Parameter(torch.zeros(sides, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    try:
        optimizer = make([weight])
        optimizer.step()
    except (RuntimeError, ValueError, TypeError):
        return None
    return tuple(weight.shape), dict(optimizer.state[weight])


def _check_entries(
    entries: Any, weight: Tensor, like: tuple[tuple[int, ...], dict[str, Any]] | None, where: str
) -> None:
    if not isinstance(entries, Mapping):
        raise StateError(f"{where}: is a {type(entries).__name__}, not a mapping")
    if like is None:
        return
    sides, expected = like
    if entries and entries.keys() != expected.keys():
        raise StateError(f"{where}: holds {_shown(list(entries))}, not {_shown(list(expected))}")
    for key, value in entries.items():
        model, entry = expected[key], f"{where}.{key}"
        if isinstance(value, Tensor):
            if not is_plain(value) or not isinstance(model, Tensor):
                raise StateError(f"{entry}: is no tensor of its own numbers")
            shape = tuple(model.shape)
            if len(shape) == len(sides):  # of the weight's sides some may be left out, as factored moments do
                shape = tuple(
                    full if side == small else side
                    for side, small, full in zip(shape, sides, weight.shape, strict=True)
                )
            if tuple(value.shape) != shape or value.is_floating_point() != model.is_floating_point():
                raise StateError(f"{entry}: is {value.dtype} {tuple(value.shape)}, not {model.dtype} {shape}")
            counts = key == "step" or model.ndim < len(sides)  # and is no moment of the weight
            if not bool(torch.isfinite(value).all()) or (counts and bool((value < 0).any())):
                raise StateError(f"{entry}: is not finite{', or below 0' if counts else ''}")
        elif isinstance(value, int | float):
            if isinstance(model, Tensor) and model.numel() != 1:
                raise StateError(f"{entry}={_shown(value)}: must be a tensor")
            real(value, entry)
        elif type(value) is not type(model):
            raise StateError(f"{entry}={_shown(value)}: must be like {_shown(model)}")


def check_weights(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse weights of another model, and values that a model of this kind cannot have.

    Args:
        weights: of a file.
        own: of the model, as it was made.

    Raises:
        ValueError: naming a tensor of another type or with NaN in it, probabilities that are none, a permutation that is none.
    """
    for name in weights.keys() & own.keys():
        found, wanted = weights[name], own[name]
        # Some runs are trained in double precision.
        if found.dtype != wanted.dtype and not (found.dtype == torch.float64 and wanted.is_floating_point()):
            raise ValueError(f"{name} is {found.dtype}, not {wanted.dtype}")
        if found.shape != wanted.shape or not found.numel():
            continue  # which load_state_dict refuses
        if found.is_floating_point():
            if not bool(torch.isfinite(found).all()):
                raise ValueError(f"{name} holds NaN or infinity")
            if name.rpartition(".")[2] == "probs" and not (bool((found >= 0).all()) and float(found.sum()) > 0):
                raise ValueError(f"{name} holds no probabilities")
        elif found.dtype == torch.int64:
            order = torch.arange(found.numel())
            if found.ndim == 1 and found.numel() > 1 and torch.equal(wanted.cpu().sort().values, order):
                if not torch.equal(found.sort().values, order):
                    raise ValueError(f"{name} is no permutation")
            elif bool((found < 0).any()):
                raise ValueError(f"{name} holds counts below 0")


def _list(state: Mapping[str, Any], name: str, *lengths: int) -> Sequence[Any]:
    value = state.get(name)
    if not isinstance(value, list | tuple) or len(value) not in lengths:
        raise StateError(f"{name}={_shown(value)}: must be a list of {' or '.join(map(str, sorted(lengths)))}")
    return value


def _mapping(state: Mapping[str, Any], name: str) -> Mapping[Any, Any]:
    value = state.get(name)
    if not isinstance(value, Mapping):
        raise StateError(f"{name}={_shown(value)}: must be a mapping")
    return value


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, int | float | str | list | tuple | None) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}..."


def upgraded_weights(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights that an earlier release has written.

    Args:
        found: by the names of the file.
        own: of the model.
    """
    names = upgraded_names(found, own)
    weights = {new: found[old] for old, new in names.items() if new is not None}
    for name, tensor in weights.items():
        wanted = own.get(name)
        lacks_null = name.endswith("embed_y.weight") and wanted is not None and tensor.ndim == 2
        if lacks_null and wanted is not None and len(wanted) == len(tensor) + 1:  # no embedding of the null value
            weights[name] = torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])
    return weights
