"""Evaluation of a model: density, samples, reconstructions and cost.

Each score has a card of two parts: the protocol, which must be equal for two scores to be comparable, and the setting of this
one: weights, step, sampler, NFE, budget, seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from genzoo.catalogue import is_cost
from genzoo.console import log_stderr, status_line
from genzoo.data import DataSet
from genzoo.distributions.discretization import to_bytes
from genzoo.errors import UsageError
from genzoo.evaluation import samples
from genzoo.evaluation.classification import classification
from genzoo.evaluation.contrastive import retrieval
from genzoo.evaluation.cost import announce, cost, estimate, training_cost
from genzoo.evaluation.density import likelihood, reconstruction, split_sha256
from genzoo.evaluation.partition import partition_scores
from genzoo.evaluation.records import saving, to_record
from genzoo.evaluation.samplers import (
    augmentation_of,
    guidance_card,
    prior_guidance_of,
    reranking_card,
    sampler_card,
    sampler_label,
    within_evaluations,
)
from genzoo.evaluation.settings import EvalData, EvalSettings
from genzoo.evaluation.text import (
    attribute_scores,
    clip_scores,
    contrastive_network,
    held_out_captions,
    scores_held_out,
)
from genzoo.event import EventSpec
from genzoo.metrics.features import (
    FeatureError,
    FeatureNetwork,
    cache_folder,
    check_cache,
    default_feature_network,
    feature_network,
)
from genzoo.metrics.finite import NonFiniteError
from genzoo.metrics.reference import reference
from genzoo.metrics.sample_size import check_sample_size, small_splits
from genzoo.model import Classifier, Codec, Density, GenerativeModel, SharedEmbedding, TrainableModel, Unnormalised
from genzoo.numerics.precision import full_float32
from genzoo.numerics.random import SampleStreams
from genzoo.runs import Run, now


class Trained(NamedTuple):
    """Facts about the training of a model, for the cards of its scores."""

    weights: str = "trained"  # or "ema"
    step: int | None = None
    images: int | None = None
    budget: Mapping[str, Any] | None = None
    ended_by: str | None = None
    seed: int | None = None
    costs: Mapping[str, Any] = {}  # images, train_seconds, train_flops, threads, precompute_seconds

    @classmethod
    def of_run(cls, run: Run, *, ema: bool) -> Trained:
        """Read the facts from a run."""
        config, status = run.config, run.status
        return cls(
            "ema" if ema else "trained",
            status.get("step"),
            status.get("images"),
            config.get("budget"),
            status.get("ended_by"),
            config.get("seed"),
            status,
        )

    @property
    def setting(self) -> dict[str, Any]:
        """The part of each card that describes the training."""
        facts = {"weights": self.weights, "step": self.step, "images_seen": self.images, "budget": self.budget}
        return {**facts, **({"ended_by": self.ended_by} if self.ended_by else {}), "train_seed": self.seed}


def evaluate_model(
    model: TrainableModel,
    eval_data: EvalData,
    settings: EvalSettings,
    network: FeatureNetwork | None = None,
    *,
    seed: int = 0,
    trained: Trained | None = None,
    chosen: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Compute all metrics that the model supports.

    Args:
        model: set to evaluation mode.
        eval_data: the data.
        settings: of the evaluation.
        network: feature network, see ``pick_network``; None for no feature-based metrics.
        seed: of all noise.
        trained: facts about the training.
        chosen: whether to ignore ``settings.max_nfe`` for the model's sampler.
        note: called with a message if the sampler is replaced.

    Returns:
        ``{"scored": time, "metrics": {name: {value, stderr, better, card}}, "warnings": [...]}``.
    """
    trained = trained or Trained()
    model.eval()
    setting = {**trained.setting, "seed": seed}
    if not isinstance(model, GenerativeModel):
        with full_float32():
            if isinstance(model, SharedEmbedding):
                metrics = retrieval(model, eval_data.data, settings, setting)
            else:
                metrics = classification(model, eval_data.data, settings, setting)
            metrics |= training_cost(model, trained.costs)
        status_line("")
        return {"scored": now(), "metrics": metrics, "warnings": []}
    with full_float32():
        limit = None if chosen else settings.max_nfe
        with within_evaluations(model, limit):
            seconds = trained.costs.get("train_seconds")
            announce(estimate(model, eval_data.data, settings), seconds)
        metrics = likelihood(model, eval_data.data, settings, setting) if isinstance(model, Density) else {}
        if isinstance(model, Unnormalised):
            metrics |= partition_scores(model, eval_data.data, settings, setting)
        if isinstance(model, Classifier):
            metrics |= classification(model, eval_data.data, settings, setting)
        if isinstance(model, Codec):
            metrics |= reconstruction(model, eval_data.data, settings, setting)
        with within_evaluations(model, limit) as replaced:
            sampler, warnings = sampler_card(model), list[str]()
            if sampler and replaced:
                sampler["instead_of"] = replaced
                warnings.append(
                    f"samples are scored with {sampler_label(sampler)} in place of {sampler_label(replaced)}, which takes "
                    f"more than metrics.max_nfe={settings.max_nfe} evaluations"
                )
                note(warnings[0])
            setting |= {"sampler": sampler}
            if guidance := guidance_card(model):
                setting |= {"guidance": guidance}
            if reranking := reranking_card(model):
                setting |= {"reranked": reranking}
            if (augmentation := augmentation_of(model)) is not None:
                setting |= {"augmentation": augmentation}
            if (scale := prior_guidance_of(model)) is not None:
                setting |= {"prior_guidance": scale}
            costs = cost(model, settings, setting, trained.costs)
            metrics |= costs
            if settings.n:
                setting |= {"nfe": costs["sampling/nfe"]["value"]}
                found, of_samples = quality(model, eval_data, settings, setting, network)
                metrics |= found
                warnings += of_samples
    status_line("")
    return {"scored": now(), "metrics": metrics, "warnings": warnings}


def evaluate_run(
    model: TrainableModel,
    eval_data: EvalData,
    run: Run,
    settings: EvalSettings,
    network: FeatureNetwork | None,
    *,
    seed: int,
    ema: bool,
    chosen: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Evaluate the model of a run and save the result in it; arguments as in ``evaluate_model``.

    Raises:
        ScoresNotSavedError: if the result cannot be written; the error contains the scores.
    """
    trained = Trained.of_run(run, ema=ema)
    result = evaluate_model(model, eval_data, settings, network, seed=seed, trained=trained, chosen=chosen, note=note)
    name_training_split(result["metrics"], eval_data.data)
    with saving(result, run.path):
        run.write_result(result)
        values = {name: measured["value"] for name, measured in result["metrics"].items()}
        run.log(event="scores", step=trained.step, values=values)
    return result


def name_training_split(metrics: dict[str, Any], data: DataSet) -> None:
    """Write the training split into the protocols of scores, which after training on other examples are not comparable."""
    if data.density is None:  # else it is drawn anew each time
        train_sha256 = split_sha256(data.train.x)
        for name, record in metrics.items():
            if not is_cost(name):
                record["card"]["protocol"]["train_sha256"] = train_sha256


def interim(
    model: GenerativeModel,
    eval_data: EvalData,
    settings: EvalSettings,
    n: int,
    network: FeatureNetwork | None,
    seed: int,
) -> dict[str, float | None]:
    """Compute sample-based metrics during training on few samples; values without errors or protocols.

    They never refer to the test split, since steps and settings are chosen by them.
    """
    model.eval()
    settings = replace(settings, n=n, force=True)
    eval_data = eval_data._replace(data=eval_data.data.for_choices())
    with full_float32(), within_evaluations(model, settings.max_nfe):
        found, _ = quality(model, eval_data, settings, {"seed": seed}, network and network.to(model.device))
    status_line("")
    return {name: measured["value"] for name, measured in found.items()}


def quality(
    model: GenerativeModel,
    eval_data: EvalData,
    settings: EvalSettings,
    setting: dict[str, Any],
    network: FeatureNetwork | None,
) -> tuple[dict[str, Any], list[str]]:
    """Draw samples and compute the sample-based metrics on all splits."""
    x, y, broken = draw(model, settings.n, settings.batch_size, setting["seed"])
    if broken:
        return {}, [f"{broken} of {len(x)} samples are not finite: sample-based metrics are skipped"]
    try:
        found, warnings = compare(x, y, eval_data, settings, setting, network, model.device)
    except NonFiniteError as error:  # features of samples that are finite
        return {}, [str(error)]
    of_text, of_captions = faithfulness(model, x, y, eval_data, settings, setting, network)
    return found | of_text, warnings + of_captions


def faithfulness(
    model: GenerativeModel,
    x: Any,
    y: Any,
    eval_data: EvalData,
    settings: EvalSettings,
    setting: dict[str, Any],
    network: FeatureNetwork | None,
) -> tuple[dict[str, Any], list[str]]:
    """Compare samples with their captions, and where the test split is scored others with its captions.

    A program reads the captions where there is one, and a contrastive network.
    """
    data = eval_data.data
    if y is None or data.tokenizer is None:
        return {}, []
    captions, reference = data.tokenizer.decode(y), f"{eval_data.name}/train"
    scorer = contrastive_network(eval_data.name, network)
    scores = {} if scorer is None else clip_scores(x, captions, scorer, model, reference)
    if data.checker is None:
        return _records(scores, setting), []
    scores |= attribute_scores(x, captions, data.checker, "text/attributes", reference)
    if not scores_held_out(model, data):
        return _records(scores, setting), []
    warnings = []
    held_out = held_out_captions(data, settings.n, setting["seed"])
    x, y, broken = draw(model, settings.n, settings.batch_size, setting["seed"], held_out)
    if broken:
        warnings = [f"{broken} of {len(x)} samples of held-out captions are not finite: text/held_out is skipped"]
    else:
        captions = data.tokenizer.decode(y)
        scores |= attribute_scores(x, captions, data.checker, "text/held_out", f"{eval_data.name}/test")
    return _records(scores, setting), warnings


def _records(scores: dict[str, samples.MetricResult], setting: dict[str, Any]) -> dict[str, Any]:
    return {name: to_record(name, m.value, m.stderr, m.protocol, setting, m.detail) for name, m in scores.items()}


def compare(
    x: Any,
    y: Any,
    eval_data: EvalData,
    settings: EvalSettings,
    setting: dict[str, Any],
    network: FeatureNetwork | None,
    device: Any = "cpu",
) -> tuple[dict[str, Any], list[str]]:
    """Compute the sample-based metrics of bytes or vectors on all splits.

    Args:
        x: samples, (N, *shape).
        y: class labels of the samples, (N,), or None.
        eval_data: the data.
        settings: of the evaluation.
        setting: of the samples, for their cards.
        network: feature network; None for no feature-based metrics.
        device: of the computation.

    Returns:
        The scores, and warnings.
    """
    data, cache = eval_data.data, cache_folder() / "references"
    splits = {name: samples.stored(split.x, data.levels) for name, split in data.splits.items()}
    warnings: list[str] = []
    found: dict[str, Any] = {}
    if network is not None:
        status_line(f"features of {len(x)} samples")
        small = small_splits({name: len(images) for name, images in splits.items()}, network)
        if small and not settings.force:
            warnings.append(f"{small}: this distance was skipped; metrics.force=true computes it, marked")
        fake = network.extract(x, settings.batch_size)
        for split, images in splits.items():
            real = reference(
                f"{eval_data.name}/{split}",
                images,
                data.splits[split].y,
                network,
                cache,
                settings.batch_size,
                functools.partial(_progress, split, len(images)),
                data.levels,
            )
            scores = samples.feature_scores(fake, real, network, settings.force, device)
            if split in ("train", "all"):
                scores |= samples.class_scores(fake, y, real, network, data.classes, device)
            found |= {f"{split}/{name}": measured for name, measured in scores.items()}
    if data.levels is None:
        for split, points in splits.items():
            scores = samples.point_scores(x, points, f"{eval_data.name}/{split}")
            found |= {f"{split}/{name}": measured for name, measured in scores.items()}
    if data.held_out in splits:  # the baseline of memorization metrics
        copies, warning = samples.memorization_scores(
            x, splits["train"], splits[data.held_out], eval_data.flip, eval_data.name, cache, device, status_line
        )
        found |= {f"memorisation/{name}": measured for name, measured in copies.items()}
        warnings += [warning] if warning else []
    return _records(found, setting), warnings


def _progress(split: str, n: int, done: int) -> None:
    status_line(f"features of {split}: {done}/{n}")


def draw(model: GenerativeModel, n: int, batch_size: int, seed: int, given: Any = None) -> tuple[Any, Any, int]:
    """Draw samples as bytes or vectors; sample i is f(seed, i).

    Args:
        model: in evaluation mode.
        n: number of samples.
        batch_size: samples drawn at once.
        seed: of all noise.
        given: conditions, (n, *condition.shape); None to draw them from the training distribution.

    Returns:
        The samples, the conditions of a conditional model, and the number of non-finite samples.
    """
    parts, labels, broken = [], list[Any](), 0
    for start in range(0, n, batch_size):
        rows = range(start, min(start + batch_size, n))
        rng = SampleStreams(seed, rows, device=model.device)
        own = None if given is None else given[rows.start : rows.stop].to(model.device)
        y = model.conditioner.draw(len(rows), own, rng)
        x = model.sample(len(rows), y, rng=rng).x.float().cpu()
        broken += int((~x.isfinite().flatten(1).all(1)).sum())
        parts.append(x if model.levels is None else to_bytes(x, model.levels))
        labels.append(None if y is None else y.cpu())
        status_line(f"sampling {rows.stop}/{n}")
    return torch.cat(parts), None if labels[0] is None else torch.cat(labels), broken


def pick_network(settings: EvalSettings, name: str, event: EventSpec, *, needed: bool) -> FeatureNetwork | None:
    """Build the feature network of an evaluation.

    Args:
        settings: of the evaluation.
        name: of the data.
        event: of the data.
        needed: whether to raise if the default network is unavailable, instead of returning None.

    Raises:
        FeatureError: for a network that cannot be had.
        TooFewSamplesError: for fewer samples than it has features.
    """
    features, n = settings.features, settings.n
    if n == 0:
        return None
    check_sample_size(n, None, settings.force)
    check_cache()
    if features is None:
        return None
    automatic = features == "auto"
    if automatic:
        features = default_feature_network(name, event.shape, event.levels)
    if (features == "identity") != (event.levels is None):
        kind = "points" if features == "identity" else "images"
        raise UsageError(f"metrics.features={features}: is for {kind}")
    try:
        network = feature_network(features, settings.inception_weights, settings.dinov2_weights, event.shape[0])
    except FeatureError as error:
        if needed or not automatic:
            raise
        log_stderr(f"no FID at the end of this run: {error}")
        return None
    check_sample_size(n, network, settings.force)
    return network
