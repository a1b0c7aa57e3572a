"""Models of finished, or still running, runs."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from genzoo.config.instantiate import build
from genzoo.devices import pick_device
from genzoo.diffusion.denoiser import sampling_denoiser
from genzoo.errors import REFUSALS, UsageError, misfit
from genzoo.model import GenerativeModel, frozen
from genzoo.runs import Run
from genzoo.training.checkpoints import latest, load_file, load_weights

PARENTS = "parents"  # folder of a run, with the weights of the finished models that its training builds on


def load(
    run: Run | str | os.PathLike[str],
    *,
    ema: bool = True,
    device: str = "auto",
    sampler: dict[str, Any] | None = None,
    trust: Sequence[str] = (),
) -> GenerativeModel:
    """Load the model of a run directory, ready to sample from.

        from genzoo import load
        images = load("outputs/vae-digits/...").sample(16).x

    Nothing of the run is executed: weights are safetensors checked against their SHA-256, and the configuration may
    name genzoo's own building blocks alone.

    Args:
        run: the directory.
        ema: the averaged weights, or those that were trained.
        device: "cpu", "cuda" or "auto".
        sampler: configuration of another sampler than the run's, for a ``Denoiser``.
        trust: classes outside genzoo that the run's configuration may name.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: in one line, for a directory that is no run, damaged files, or classes that are not trusted.
    """
    opened = run if isinstance(run, Run) else Run(run)
    config = opened.config.get("model")
    if not isinstance(config, dict) or "_target_" not in config:
        raise UsageError(f"{opened.path / 'config.yaml'}: names no model")
    model = build(config, "model", trusted=False, trust=trust)
    if not isinstance(model, GenerativeModel):
        raise UsageError(f"{opened.path / 'config.yaml'}: model._target_={config['_target_']} is no generative model")
    load_weights(latest(opened.path), model, ema=ema)
    if sampler is not None:
        set_sampler(model, sampler)
    return model.to(pick_device(device)).eval().requires_grad_(False)


LOAD, FROZEN = f"{load.__module__}.{load.__name__}", f"{frozen.__module__}.{frozen.__name__}"


def inline_runs(node: Any) -> Any:
    """Replace every model of a run in a configuration by that run's own model, whose weights are fixed.

    What is written into a new run then needs no other run: the weights lie in its folder ``parents``, and its configuration
    names no command, which a stranger's may not.
    """
    if isinstance(node, list):
        return [inline_runs(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("_target_") == LOAD:
        return {"_target_": FROZEN, "model": Run(node["run"]).config["model"]}
    return {key: inline_runs(value) for key, value in node.items()}


def with_parents(
    node: Any, key: str, make: Callable[[Any, str], Any], folder: Path | None = None
) -> tuple[Any, dict[str, GenerativeModel]]:
    """Build the models of finished runs that a configuration of a model holds.

    Args:
        node: plain types.
        key: where the node stands.
        make: builds what a node describes, given the node and its key.
        folder: that has their weights, of a run that is gone on with; None for a new run, which names the others.

    Returns:
        The configuration with the models in the place of their descriptions, and the models by their keys.

    Raises:
        RunError: for weights that are missing, damaged or another model's.
    """
    if isinstance(node, list):
        items = {str(i): (item, f"{key}[{i}]") for i, item in enumerate(node)}
    elif not isinstance(node, dict):
        return node, {}
    elif node.get("_target_") == (FROZEN if folder else LOAD):
        parent = make(node, key)
        if not isinstance(parent, GenerativeModel):
            raise UsageError(f"{key}: {type(parent).__name__} is no generative model")
        if folder and folder.is_dir():
            load_file(folder, f"{key}.safetensors", parent)
        return parent, {key: parent}
    else:
        items = {name: (item, f"{key}.{name}") for name, item in node.items()}
    built = {name: with_parents(item, path, make, folder) for name, (item, path) in items.items()}
    parents = {path: parent for _, found in built.values() for path, parent in found.items()}
    whole = {name: item for name, (item, _) in built.items()}
    return list(whole.values()) if isinstance(node, list) else whole, parents


def set_sampler(model: GenerativeModel, config: dict[str, Any]) -> None:
    """Give a model another sampler.

    Raises:
        UsageError: for a family that has none, and for a sampler that cannot walk along its path.
    """
    denoiser: Any = sampling_denoiser(model)
    if denoiser is None:
        family = type(getattr(model, "prior", model)).__name__
        raise UsageError(f"sampler: {family} samples in one pass and takes no sampler; leave it out")
    denoiser.sampler = build(config, "sampler")
    check_sampler(model)


def check_sampler(model: GenerativeModel) -> None:
    """Try two steps of a denoiser's sampler, so that what cannot work is said now and not after training.

    Raises:
        UsageError: in the sampler's own words.
    """
    denoiser: Any = sampling_denoiser(model)
    if denoiser is None:
        return
    sampler = denoiser.sampler
    trial = copy.copy(sampler)
    trial.steps = sampler.steps and 2
    try:
        next(sampler.iterate(denoiser, torch.zeros(1, *denoiser.event.shape), None, None))
        with torch.no_grad():
            trial(copy.deepcopy(denoiser).eval(), 1, None, torch.Generator())
    except REFUSALS as error:
        raise misfit("sampler", error) from error
