"""Loading of the models of finished or running runs."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from genzoo.conditions import Tokens
from genzoo.config.instantiate import build
from genzoo.devices import pick_device
from genzoo.diffusion.denoiser import path_models, replaced
from genzoo.diffusion.guidance import AutoGuidance, ClassifierGuidance, NoisyCritic, guide
from genzoo.errors import BUILD_ERRORS, UsageError, misfit, one_line
from genzoo.metrics.features import CONTRASTIVE, EMBEDDED, EmbeddedContrastive, embedded
from genzoo.model import Augmented, GenerativeModel, ImageEmbedding, SharedEmbedding, TrainableModel, frozen
from genzoo.reranking import Reranked
from genzoo.runs import Run
from genzoo.text import Tokenizer, run_tokenizer
from genzoo.training.checkpoints import latest, load_file, load_weights

PARENTS = "parents"  # folder of a run with the weights of finished models used in its training


def load_trained(
    run: Run | str | os.PathLike[str], *, ema: bool = True, device: str = "auto", trust: Sequence[str] = ()
) -> TrainableModel:
    """Load the model of a run directory, generative or a classifier; arguments as in ``load``.

    Raises:
        ValueError: with a one-line message, for an invalid run, damaged files, or untrusted classes.
    """
    opened = run if isinstance(run, Run) else Run(run)
    config = opened.config.get("model")
    if not isinstance(config, dict) or "_target_" not in config:
        raise UsageError(f"{opened.path / 'config.yaml'}: has no model section")
    model = build(config, "model", trusted=False, trust=trust)
    if not isinstance(model, TrainableModel):
        raise UsageError(f"{opened.path / 'config.yaml'}: model._target_={config['_target_']} is not a GenerativeModel")
    load_weights(latest(opened.path), model, ema=ema)
    return model.to(pick_device(device)).eval().requires_grad_(False)


def load(
    run: Run | str | os.PathLike[str],
    *,
    ema: bool = True,
    device: str = "auto",
    sampler: dict[str, Any] | None = None,
    guidance: dict[str, Any] | None = None,
    augmentation: float | None = None,
    prior_guidance: float | None = None,
    trust: Sequence[str] = (),
) -> GenerativeModel:
    """Load the model of a run directory, ready to sample from.

        from genzoo import load
        images = load("outputs/vae-digits/...").sample(16).x

    Runs are untrusted: weights are safetensors with verified SHA-256, and the configuration is restricted to classes of
    genzoo and ``trust``.

    Args:
        run: the directory.
        ema: whether to load the EMA weights.
        device: "cpu", "cuda" or "auto".
        sampler: configuration that replaces the run's sampler, for a ``Denoiser``.
        guidance: configuration of the guidance of its samples, a file of ``conf/guidance``; the guided model only samples.
        augmentation: noise level of the smaller images of a cascade; None for that of training's evaluation.
        prior_guidance: scale of the guidance of the embeddings of ``ImageEmbedding``; None for that of training's evaluation.
        trust: allowed classes outside genzoo.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: with a one-line message, for an invalid run, damaged files, or untrusted classes.
    """
    model = load_trained(run, ema=ema, device=device, trust=trust)
    return sampled_by(model, sampler, guidance, augmentation, prior_guidance)


def sampled_by(
    model: TrainableModel,
    sampler: dict[str, Any] | None,
    guidance: dict[str, Any] | None,
    augmentation: float | None = None,
    prior_guidance: float | None = None,
) -> GenerativeModel:
    """Return a model with the sampler, guidance and noise level of a configuration, if any; arguments as in ``load``.

    Raises:
        UsageError: for a model without samples, or a sampler or guidance that does not fit it.
    """
    if not isinstance(model, GenerativeModel):
        raise UsageError(f"run: {type(model).__name__} classifies and has no samples")
    if sampler is not None:
        set_sampler(model, sampler)
    if augmentation is not None:
        model = with_augmentation(model, augmentation)
    if prior_guidance is not None:
        model = with_prior_guidance(model, prior_guidance)
    return model if guidance is None else guided(model, guidance)


def guided(model: GenerativeModel, config: dict[str, Any]) -> GenerativeModel:
    """Return a model whose samples are guided, by a configuration.

    Raises:
        UsageError: for a guidance that does not fit the model.
    """
    return guided_by(model, build(config, "guidance"))


def guided_by(model: GenerativeModel, guidance: Callable[..., Any]) -> GenerativeModel:
    """Return a model whose samples are guided, see ``genzoo.diffusion.guidance.guide``.

    Raises:
        UsageError: for a guidance that does not fit the model.
    """
    try:
        return guide(model, guidance)
    except BUILD_ERRORS as error:
        found = str(misfit("guidance", error))
        raise UsageError(found.replace("guidance: guidance", "guidance", 1)) from error


def autoguidance(run: str | os.PathLike[str], scale: float, interval: tuple[float, float] | None = None) -> Any:
    """Return the guidance by the model of a run, see ``genzoo.diffusion.guidance.AutoGuidance``."""
    worse = load(run, device="cpu")
    return functools.partial(AutoGuidance, worse=worse, scale=scale, interval=interval)


def classifier_guidance(run: str | os.PathLike[str], scale: float, interval: tuple[float, float] | None = None) -> Any:
    """Return the guidance by the classifier of a run, see ``genzoo.diffusion.guidance.ClassifierGuidance``.

    Raises:
        UsageError: for a run of another model.
    """
    classifier = load_trained(run, device="cpu")
    if not isinstance(classifier, NoisyCritic):
        raise UsageError(
            f"guidance.run={run}: {type(classifier).__name__} is no classifier of noisy data: "
            "train model=noisy_classifier, or for captions model=noisy_clip"
        )
    return functools.partial(ClassifierGuidance, classifier=classifier, scale=scale, interval=interval)


def load_encoder(run: str | os.PathLike[str]) -> SharedEmbedding:
    """Load the contrastive network of a run, on the CPU.

    Raises:
        UsageError: for a run of another model.
    """
    model = load_trained(run, device="cpu")
    if not isinstance(model, SharedEmbedding):
        raise UsageError(f"encoder.run={run}: {type(model).__name__} is no contrastive network: train model=clip")
    return model


def shipped_encoder(name: str) -> SharedEmbedding:
    """Load a contrastive network that is included in genzoo, such as clip_shapes, on the CPU.

    Raises:
        UsageError: for an unknown name.
    """
    names = [name for name in embedded() if name.startswith(CONTRASTIVE)]
    if name not in names:
        raise UsageError(f"encoder.name={name}: is not among {', '.join(names)}: use encoder=clip or encoder=run")
    model = build(_shipped_config(name), "encoder")
    model.encoders.load_state_dict(EmbeddedContrastive(name).network.state_dict())
    return model.eval().requires_grad_(False)


def _shipped_config(name: str) -> dict[str, Any]:
    """Return the configuration of the model of a contrastive network that is included in genzoo."""
    card = json.loads((EMBEDDED / "networks.json").read_text())[name]
    return {
        "_target_": "genzoo.families.clip.Contrastive",
        "event": {"_target_": "genzoo.event.EventSpec", "shape": [3, card["side"], card["side"]], "levels": 256},
        "condition": {
            "_target_": "genzoo.conditions.Tokens",
            "length": card["length"],
            "vocabulary": card["vocabulary"],
        },
        "network": {"_target_": "genzoo.nn.resnet.ConvEncoder", "_partial_": True, **card["image"]},
        "dim": card["dim"],
        "text_width": card["text_width"],
    }


LOAD, FROZEN = f"{load.__module__}.{load.__name__}", f"{frozen.__module__}.{frozen.__name__}"
LOAD_ENCODER, SHIPPED = (f"{function.__module__}.{function.__name__}" for function in (load_encoder, shipped_encoder))
LOADERS = (LOAD, LOAD_ENCODER, SHIPPED)


def check_tokenizers(node: Any, tokenizer: Tokenizer | None) -> None:
    """Check that the tokens of finished models in the configuration of a new run are those of its data.

    Args:
        node: plain types.
        tokenizer: of the data; None for data without captions.

    Raises:
        UsageError: for models of other tokens.
    """
    if isinstance(node, list):
        for item in node:
            check_tokenizers(item, tokenizer)
    if not isinstance(node, dict):
        return
    target, found = node.get("_target_"), None
    if target in (LOAD, LOAD_ENCODER) and (run := Run(node["run"])).status.get("tokenizer_sha256"):
        found, source = run_tokenizer(run).sha256, f"run={node['run']}"
    elif target == SHIPPED:
        found, source = EmbeddedContrastive(node["name"]).tokenizer.sha256, f"name={node['name']}"
    if found is not None and (tokenizer is None or tokenizer.sha256 != found):
        raise UsageError(
            f"{source}: has another tokenizer than the data; set data.n, data.vocabulary as in its training"
        )
    for item in node.values():
        check_tokenizers(item, tokenizer)


def inline_runs(node: Any) -> Any:
    """Replace references to runs in a configuration by the (frozen) model configurations of those runs.

    A new run is then self-contained, with the weights in its folder ``parents``, and its configuration contains no ``load``,
    which is not allowed in runs.
    """
    if isinstance(node, list):
        return [inline_runs(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("_target_") in LOADERS:
        shipped = node["_target_"] == SHIPPED
        return {
            "_target_": FROZEN,
            "model": _shipped_config(node["name"]) if shipped else Run(node["run"]).config["model"],
        }
    return {key: inline_runs(value) for key, value in node.items()}


def with_parents(
    node: Any, key: str, make: Callable[[Any, str], Any], folder: Path | None = None
) -> tuple[Any, dict[str, TrainableModel]]:
    """Build the models of finished runs in the configuration of a model.

    Args:
        node: plain types.
        key: key of the node.
        make: instantiates a node, given the node and its key.
        folder: folder of their weights in a resumed run; None for a new run.

    Returns:
        The configuration with models in place of their configurations, and the models by key.

    Raises:
        RunError: for weights that are missing, damaged or of another model.
    """
    if isinstance(node, list):
        items = {str(i): (item, f"{key}[{i}]") for i, item in enumerate(node)}
    elif not isinstance(node, dict):
        return node, {}
    elif node.get("_target_") in ((FROZEN,) if folder else LOADERS):
        parent = make(node, key)
        if not isinstance(parent, TrainableModel):
            raise UsageError(f"{key}: {type(parent).__name__} is not a TrainableModel")
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
    """Replace the sampler of a model.

    Raises:
        UsageError: for a family without a sampler, or a sampler incompatible with its path.
    """
    denoisers: list[Any] = list(path_models(model))
    if not denoisers:
        family = type(getattr(model, "prior", model)).__name__
        raise UsageError(f"sampler: {family} samples in one pass and takes no sampler; omit it")
    for denoiser in denoisers:
        denoiser.sampler = build(config, "sampler")
    check_sampler(model)


def with_sampler(model: GenerativeModel, sampler: Any, steps: int | None = None) -> GenerativeModel:
    """Return a model with another sampler, or other number of steps; the given one is unchanged and shares its weights.

    Raises:
        UsageError: for a family without a sampler.
    """
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    denoisers: list[Any] = list(path_models(copied))
    if not denoisers:
        raise UsageError(f"sampler: {type(model).__name__} samples in one pass and takes no sampler; omit it")
    sampler = copy.copy(sampler)
    sampler.steps = steps or sampler.steps
    for denoiser in denoisers:
        denoiser.sampler = sampler
    return copied


def with_augmentation(model: GenerativeModel, augmentation: float) -> GenerativeModel:
    """Return a model with another noise level of conditioning augmentation, sharing the weights of the given one.

    Raises:
        UsageError: for a model without it, and a level outside those of training.
    """
    if not isinstance(model, Augmented):
        raise UsageError(f"augmentation: {type(model).__name__} has no super-resolution models; omit it")
    try:
        model.check_augmentation(augmentation)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return replaced(model, augmentation=augmentation)


def with_prior_guidance(model: GenerativeModel, scale: float) -> GenerativeModel:
    """Return a model with another scale of the guidance of its embeddings, sharing the weights of the given one.

    Raises:
        UsageError: for a model without it, and a prior that cannot be guided.
    """
    if not isinstance(model, ImageEmbedding):
        raise UsageError(f"prior_guidance: {type(model).__name__} has no prior over embeddings; omit it")
    try:
        model.check_prior_guidance(scale)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return replaced(model, prior_guidance=scale)


def reranked(
    model: GenerativeModel, ranker: str | os.PathLike[str] | None, candidates: int, run: Run | None
) -> GenerativeModel:
    """Return a model that keeps the best of several samples by a contrastive network, see ``genzoo.reranking``.

    Args:
        model: draws the candidates.
        ranker: a run of the contrastive network, or the name of one included in genzoo, such as "clip_shapes".
        candidates: number of samples for each that is kept; 1 for the model itself.
        run: of the model, whose captions are translated to the tokens of the network; None for a model without a run.

    Raises:
        UsageError: without a network, or for one that does not fit the model.
    """
    included = [name for name in embedded() if name.startswith(CONTRASTIVE)]
    if candidates == 1 and ranker is None:
        return model
    if candidates == 1:
        raise UsageError(f"ranker={ranker}: ranks several samples: set candidates=8, too")
    if ranker is None:
        raise UsageError(f"candidates={candidates}: set ranker=DIR, a run of model=clip, or {', '.join(included)}")
    network: TrainableModel
    theirs: Tokenizer | None
    if str(ranker) in included:
        network, theirs = shipped_encoder(str(ranker)), EmbeddedContrastive(str(ranker)).tokenizer
    else:
        opened = Run(ranker)
        network = load_trained(opened, device="cpu")
        theirs = run_tokenizer(opened) if isinstance(network.condition, Tokens) else None
    if not isinstance(network, SharedEmbedding):
        raise UsageError(f"ranker={ranker}: {type(network).__name__} is no contrastive network: train model=clip")
    translate = None
    if isinstance(model.condition, Tokens) and theirs is not None and run is not None:
        own = run_tokenizer(run)
        if own.sha256 != theirs.sha256:
            translate = functools.partial(_translated, own=own, theirs=theirs)
    try:
        return Reranked(model, network, candidates, translate, str(ranker))
    except ValueError as error:
        raise UsageError(one_line(error)) from error


def _translated(y: torch.Tensor, own: Tokenizer, theirs: Tokenizer) -> torch.Tensor:
    """Encode captions by another tokenizer, (n, L) -> (n, L')."""
    return theirs.encode(own.decode(y.cpu()), truncate=True).to(y.device)


def check_sampler(model: GenerativeModel) -> None:
    """Run two steps of a denoiser's sampler, to fail before training.

    Raises:
        UsageError: with the message of the sampler.
    """
    for denoiser in path_models(model):
        _try_sampler(denoiser)


def _try_sampler(denoiser: Any) -> None:
    sampler = denoiser.sampler
    trial = copy.copy(sampler)
    trial.steps = sampler.steps and 2
    try:
        next(sampler.iterate(denoiser, torch.zeros(1, *denoiser.event.shape, device=denoiser.device), None, None))
        with torch.no_grad():
            trial(copy.deepcopy(denoiser).eval(), 1, None, torch.Generator(denoiser.device))
    except BUILD_ERRORS as error:
        raise misfit("sampler", error) from error
