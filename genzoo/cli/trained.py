"""Trained models of commands: loading by a configuration, conditions by class names, and draws of latents."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genzoo.devices import pick_device
from genzoo.environment import usable_cores
from genzoo.errors import UsageError
from genzoo.jobs.resources import resources

if TYPE_CHECKING:
    from torch import Tensor

    from genzoo.data.dataset import KnownDensity
    from genzoo.model import GenerativeModel


def open_model(config: dict[str, Any]) -> GenerativeModel:
    """Load the model of ``run=DIR`` with the weights, device, sampler and guidance of a configuration.

    Raises:
        ValueError: with a one-line message, for an invalid run or an unsuitable sampler or guidance.
    """
    import torch

    from genzoo.loading import load

    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))  # OpenMP ignores CPU quotas of containers
    return load(
        Path(config["run"]),
        ema=config["ema"],
        device=pick_device(config["device"]),
        sampler=config.get("sampler"),
        guidance=config.get("guidance"),
        trust=config["trust"],
    )


def class_indices(config: dict[str, Any], model: GenerativeModel) -> list[int] | None:
    """Return the classes of ``label=``, by index or by the class names of the run; None without labels.

    Raises:
        UsageError: for an unknown class, a class without training images, and a model without classes.
    """
    if config["label"] is None:
        return None
    from genzoo.conditions import ClassLabels
    from genzoo.labels import check_trained, class_names, class_numbers

    n = model.condition.n if isinstance(model.condition, ClassLabels) else 0
    names = class_names(config["run"])
    found = class_numbers(config["label"], n, names)
    check_trained(found, model.conditioner.probs.tolist(), names)
    return found


def on_run(command: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """Convert errors of memory and disk of a command with the keys ``out`` and ``batch_size``.

    Raises:
        ResourceError: if memory or disk are full.
    """

    @functools.wraps(command)
    def run(config: dict[str, Any]) -> None:
        with resources(Path(config["out"]), config["batch_size"], "batch_size"):
            command(config)

    return run


def require_encoder(model: GenerativeModel) -> None:
    """Check that the family of a model has an encoder, before its data are loaded.

    Raises:
        AbilityError: naming families that have one.
    """
    from genzoo.latents import check_encoder

    check_encoder(model)


def source_of_latents(config: dict[str, Any], model: GenerativeModel) -> str:
    """Return ``examples=``: by default the test split, or the prior for a model without an encoder.

    Raises:
        AbilityError: for examples of a model without an encoder.
        UsageError: for draws from a prior that is learned.
    """
    from genzoo.latents import can_encode, has_normal_prior

    source = config["examples"]
    if source is None:
        return "test" if can_encode(model) else "prior"
    if source != "prior":
        require_encoder(model)
    elif not has_normal_prior(model):
        raise UsageError(f"examples=prior: the prior of {type(model).__name__} is learned; set examples=test")
    return source


def prior_latents(
    config: dict[str, Any], model: GenerativeModel, n: int, draws: int
) -> tuple[list[Tensor], Tensor | None]:
    """Draw latents from the standard normal prior, and the conditions of a conditional model.

    Args:
        config: with ``seed``, and ``label``, whose classes follow one another.
        model: with a standard normal prior.
        n: number of examples; example i is a function of the seed and i.
        draws: latents of each example.

    Returns:
        ``draws`` latents, (n, *latent.shape) each, and the conditions or None, on the CPU.
    """
    import torch

    from genzoo.latents import latent_space
    from genzoo.numerics.random import SampleStreams, randn

    rng = SampleStreams(config["seed"], range(n), device=model.device)
    classes = class_indices(config, model)
    y = None if classes is None else torch.tensor([classes[i % len(classes)] for i in range(n)], device=model.device)
    y = model.conditioner.draw(n, y, rng)
    shape = (n, *latent_space(model).shape)
    drawn = [randn(shape, rng=rng, device=model.device, dtype=model.dtype).cpu() for _ in range(draws)]
    return drawn, None if y is None else y.cpu()


def plot_background(
    config: dict[str, Any], model: GenerativeModel, x: Tensor
) -> tuple[Tensor | None, KnownDensity | None]:
    """Return examples and the density of the data of a run, for plots of vectors; None for images.

    Args:
        config: of the command.
        model: of the run.
        x: vectors that stand in for data that cannot be loaded, (..., D); a line on stderr then names the cause.
    """
    from genzoo.cli.examples import run_dataset
    from genzoo.jobs.notes import note

    if model.levels is not None:
        return None, None
    try:
        data = run_dataset(config, model)
    except ValueError as error:
        note(f"warning: plotted without the data: {error}")
        return x.flatten(0, -2), None
    return data.train.x[:10_000], data.density
