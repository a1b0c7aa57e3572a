"""A table of what models can do, from the abilities that they inherit.

A new ability is one entry of ``ABILITIES``. ``tests/test_abilities.py`` compares the table in the README with that of all
families, and ``python -m tests.test_abilities`` prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from genzoo.compression import kind_of_code
from genzoo.diffusion.denoiser import Denoiser, path_model
from genzoo.latents import can_encode, has_normal_prior, latent_space
from genzoo.model import (
    AbilityError,
    Bound,
    Causal,
    Composite,
    Continuous,
    Decoder,
    Density,
    Discrete,
    GenerativeModel,
    LogitGuided,
    Unnormalised,
)

YES, NO = "yes", ""


def _density(model: GenerativeModel) -> str:
    if isinstance(model, Unnormalised):
        return "unnormalised"
    if not isinstance(model, Density):
        return NO
    names = {Bound.LOWER: "lower bound", Bound.ESTIMATE: "estimate"}
    return ", ".join(name for bound, name in names.items() if bound in model.bound) or "exact"


def _encode(model: GenerativeModel) -> str:
    if not can_encode(model):
        return NO
    return "codes" if isinstance(latent_space(model), Discrete) else YES


def _decode(model: GenerativeModel) -> str:
    try:
        latent_space(model)
    except AbilityError:
        return NO
    return YES


def _interpolate(model: GenerativeModel) -> str:
    if not _decode(model) or isinstance(latent_space(model), Discrete):
        return NO
    return "spherical" if has_normal_prior(model) else "linear"


def _attribute(model: GenerativeModel) -> str:
    return YES if _interpolate(model) and can_encode(model) else NO


def _guidance(model: GenerativeModel) -> str:
    part = model
    while isinstance(part, Composite):
        part = part.prior
    return YES if isinstance(part, Denoiser) else "of logits" if isinstance(part, LogitGuided) else NO


def _edit(model: GenerativeModel) -> str:
    if isinstance(model, Composite):
        return NO
    if isinstance(model, Denoiser):
        return YES
    if isinstance(model, Causal):
        return "continues"
    return "Langevin" if isinstance(model, Decoder) and isinstance(model.latent, Continuous) else NO


ABILITIES: Mapping[str, Callable[[GenerativeModel], str]] = {
    "sample": lambda model: YES,
    "density": _density,
    "encode, reconstruct": _encode,
    "decode": _decode,
    "interpolate": _interpolate,
    "traverse": lambda model: YES if _interpolate(model) else NO,
    "attribute": _attribute,
    "`guidance=`": _guidance,
    "edit": _edit,
    "trajectory, `sampler=`": lambda model: YES if path_model(model) is not None else NO,
    "compress": kind_of_code,
}


def ability_table(models: Mapping[str, GenerativeModel]) -> str:
    """Return a Markdown table of models, by name, and their abilities."""
    rows = [["`model=`", *ABILITIES], ["---"] * (1 + len(ABILITIES))]
    rows += [[f"`{name}`", *(ability(model) for ability in ABILITIES.values())] for name, model in models.items()]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows)
