"""Trained models of commands: loading by a configuration, conditions by class names, and draws of latents."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
        augmentation=config.get("augmentation"),
        prior_guidance=config.get("prior_guidance"),
        trust=config["trust"],
    )


class Chosen(NamedTuple):
    """The conditions of a command line."""

    y: Tensor  # (k, *condition.shape), on the CPU
    names: list[str]  # the class or the text of each


def chosen_conditions(config: dict[str, Any], model: GenerativeModel) -> Chosen | None:
    """Return the conditions of ``label=``, ``text=`` or ``texts=``; None without any.

    Raises:
        UsageError: for an unknown class, a text that is empty or too long, and a model without classes or captions.
    """
    text: str | None = config.get("text")
    file: str | None = config.get("texts")
    if sum(value is not None for value in (config["label"], text, file)) > 1:
        raise UsageError("label, text, texts: set only one of them")
    if file is not None:
        from genzoo.text import read_texts

        return text_conditions(Path(config["run"]), model, read_texts(Path(file)))
    if text is None:
        indices = class_indices(config, model)
        if indices is None:
            return None
        import torch

        from genzoo.labels import class_names

        names = class_names(config["run"]) or [str(i) for i in range(max(indices) + 1)]
        return Chosen(torch.tensor(indices), [names[i] for i in indices])
    return text_conditions(Path(config["run"]), model, [text])


def text_conditions(run: Path, model: GenerativeModel, texts: list[str]) -> Chosen:
    """Encode texts by the tokenizer of a run; a note on stderr names characters that no training caption has.

    Raises:
        UsageError: for a text that is empty or too long, and a model that has no captions as its condition.
    """
    from genzoo.runs import Run
    from genzoo.text import encode_texts

    return Chosen(encode_texts(Run(run), model.condition, texts), texts)


def captions_of(run: Path, model: GenerativeModel, y: Tensor | None) -> list[str] | None:
    """Decode the captions of conditions, (n, L); None for other conditions."""
    from genzoo.conditions import Tokens
    from genzoo.runs import Run
    from genzoo.text import run_tokenizer

    return run_tokenizer(Run(run)).decode(y) if y is not None and isinstance(model.condition, Tokens) else None


def class_indices(config: dict[str, Any], model: GenerativeModel) -> list[int] | None:
    """Return the classes of ``label=``, by index or by the class names of the run; None without labels.

    Raises:
        UsageError: for an unknown class, a class without training images, and a model without classes.
    """
    if config["label"] is None:
        return None
    from genzoo.conditions import ClassLabels, Tokens
    from genzoo.labels import check_trained, class_names, class_numbers

    if isinstance(model.condition, Tokens):
        raise UsageError(f"label={config['label']}: this model has captions in place of classes: set text=...")
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
    chosen = chosen_conditions(config, model)
    y = None if chosen is None else chosen.y[torch.arange(n) % len(chosen.y)].to(model.device)
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
