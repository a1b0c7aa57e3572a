"""Configurations of runs of earlier releases, in the words of this one."""

from __future__ import annotations

from typing import Any

# Dotted names that have moved, the longest prefix first.
MOVED = {
    "genzoo.prob.paths": "genzoo.diffusion.path",
    "genzoo.prob.schedules": "genzoo.diffusion.schedules",
    "genzoo.prob.noise_levels": "genzoo.diffusion.noise_levels",
    "genzoo.prob.likelihoods": "genzoo.distributions.likelihoods",
    "genzoo.samplers": "genzoo.diffusion.samplers",
}


def upgraded(node: Any) -> Any:
    """Return a configuration, plain types, with every ``_target_`` that has moved since it was written renamed."""
    if isinstance(node, list):
        return [upgraded(item) for item in node]
    if not isinstance(node, dict):
        return node
    new = {key: upgraded(value) for key, value in node.items()}
    target = node.get("_target_")
    if isinstance(target, str):
        module, _, name = target.rpartition(".")
        new["_target_"] = f"{MOVED.get(module, module)}.{name}" if module else target
    return new
