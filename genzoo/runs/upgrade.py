"""Conversion of configurations and weights of earlier releases to the current names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

# Renamed modules.
MOVED = {
    "genzoo.prob.paths": "genzoo.diffusion.path",
    "genzoo.prob.schedules": "genzoo.diffusion.schedules",
    "genzoo.prob.noise_levels": "genzoo.diffusion.noise_levels",
    "genzoo.prob.likelihoods": "genzoo.distributions.likelihoods",
    "genzoo.samplers": "genzoo.diffusion.samplers",
}
RENAMED = {"label_dropout": "condition_dropout"}  # arguments
# Renamed weights, and removed buffers, by the ends of their names.
WEIGHTS = (
    (r"(^|\.)class_probs$", r"\1conditioner.probs"),
    (r"(^|\.)embedding\.label\.", r"\1embedding.condition.embed_y."),
    (r"(^|\.)network\.label\.(?=weight$)", r"\1network.condition.embed_y."),
    (r"(^|\.)label\.", r"\1embed_y."),
    (r"(^|\.)law\.weight$", r"\1top_prior.weight"),
    (r"(^|\.)splits\.(\d+)\.law\.", r"\1splits.\2.moments."),
    (r"(^|\.)measure\.", r"\1transform."),
)
DROPPED = re.compile(r"(^|\.)(initialized|known)$")


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """Convert the configuration of a run, plain types, to the current release."""
    new = _moved(config)
    if isinstance(trainer := new.get("trainer"), dict) and "ema" in trainer:
        new["trainer"] = {"ema_half_life" if key == "ema" else key: value for key, value in trainer.items()}
        new["trainer"]["ema_half_life"] = _half_life(trainer["ema"], trainer.get("batch_size"))
    if isinstance(model := new.get("model"), dict):
        new["model"] = _described(model)
        if new["model"] != model and new["model"].get("condition") and isinstance(data := new.get("data"), dict):
            new["data"] = {**data, "conditional": True}
    return new


def _half_life(decay: Any, batch_size: Any) -> Any:
    """Return the half-life, in images, of an average with a decay for each step; what is not a decay, as it is."""
    if not (isinstance(decay, float | int) and isinstance(batch_size, int) and 0 < decay < 1):
        return None if decay == 0 else decay
    return -batch_size * math.log(2) / math.log(decay)


def _moved(node: Any) -> Any:
    """Rename ``_target_`` values and arguments."""
    if isinstance(node, list):
        return [_moved(item) for item in node]
    if not isinstance(node, dict):
        return node
    new = {RENAMED.get(key, key): _moved(value) for key, value in node.items()}
    target = node.get("_target_")
    if isinstance(target, str):
        module, _, name = target.rpartition(".")
        new["_target_"] = f"{MOVED.get(module, module)}.{name}" if module else target
    return new


def _described(node: Any) -> Any:
    """Replace shape, levels and number of classes of a model, recursively, by its event and condition."""
    if not isinstance(node, dict):
        return node
    new = {key: _described(value) for key, value in node.items()}
    if str(new.get("_target_")).startswith("genzoo.families.") and "shape" in new:
        shape, levels, classes = new.pop("shape"), new.pop("levels", None), new.pop("num_classes", 0)
        new["event"] = {"_target_": "genzoo.event.EventSpec", "shape": shape, "levels": levels}
        new["condition"] = {"_target_": "genzoo.conditions.ClassLabels", "n": classes} if classes else None
    return new


def upgraded_names(found: Iterable[str], wanted: Iterable[str]) -> dict[str, str | None]:
    """Map the names of weights in a file to current names, None for removed buffers.

    Args:
        found: names in the file.
        wanted: names of the model; names in the file that match are never renamed.
    """
    found, wanted = list(found), set(wanted)
    names: dict[str, str | None] = {}
    for name in found:
        new = name
        if name not in wanted:
            for pattern, replacement in WEIGHTS:
                candidate = re.sub(pattern, replacement, name)
                if candidate in wanted:
                    new = candidate
                    break
        names[name] = None if new not in wanted and DROPPED.search(name) else new
    return names
