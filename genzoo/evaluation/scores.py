"""What is measured of a model: density, samples, reconstructions and cost, each number with how it was made.

A number carries a card of two parts. The protocol says what must be alike for two numbers to be ranked together; the setting
says what made this one: weights, step, sampler, evaluations, budget, seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from genzoo.console import log_stderr, status_line
from genzoo.distributions.discretization import to_bytes
from genzoo.errors import UsageError
from genzoo.evaluation import samples
from genzoo.evaluation.cost import announce, cost, estimate
from genzoo.evaluation.density import likelihood, reconstruction
from genzoo.evaluation.records import kept, to_record
from genzoo.evaluation.samplers import brief, sampler_card, within_evaluations
from genzoo.evaluation.settings import EvalData, EvalSettings
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
from genzoo.model import Codec, Density, GenerativeModel
from genzoo.numerics.precision import full_float32
from genzoo.numerics.random import SampleStreams
from genzoo.runs import Run, now


class Trained(NamedTuple):
    """How the model came about, for the cards of its scores."""

    weights: str = "trained"  # or "ema", the averaged ones
    step: int | None = None
    images: int | None = None
    budget: Mapping[str, Any] | None = None
    ended_by: str | None = None
    seed: int | None = None
    costs: Mapping[str, Any] = {}  # images, train_seconds, train_flops, threads, precompute_seconds

    @classmethod
    def of_run(cls, run: Run, *, ema: bool) -> Trained:
        """Read it from a run."""
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
        """The part of each card that describes it."""
        known = {"weights": self.weights, "step": self.step, "images_seen": self.images, "budget": self.budget}
        return {**known, **({"ended_by": self.ended_by} if self.ended_by else {}), "train_seed": self.seed}


def evaluate_model(
    model: GenerativeModel,
    subject: EvalData,
    settings: EvalSettings,
    network: FeatureNetwork | None = None,
    *,
    seed: int = 0,
    trained: Trained | None = None,
    chosen: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Compute every score that the abilities of a model allow.

    Args:
        model: it is put into evaluation mode.
        subject: the data.
        settings: what is computed.
        network: for features of images, see ``pick_network``; None for no distances.
        seed: of all noise.
        trained: how the model came about.
        chosen: whether its sampler is used whatever its number of evaluations.
        note: called with a line where another sampler is used than the model's own.

    Returns:
        ``{"scored": time, "metrics": {name: {value, stderr, better, card}}, "warnings": [...]}``.
    """
    trained = trained or Trained()
    model.eval()
    setting = {**trained.setting, "seed": seed}
    with full_float32():
        limit = None if chosen else settings.max_nfe
        with within_evaluations(model, limit):
            seconds = trained.costs.get("train_seconds")
            announce(estimate(model, subject.data, settings), settings, seconds)
        metrics = likelihood(model, subject.data, settings, setting) if isinstance(model, Density) else {}
        if isinstance(model, Codec):
            metrics |= reconstruction(model, subject.data, settings, setting)
        with within_evaluations(model, limit) as replaced:
            sampler, warnings = sampler_card(model), list[str]()
            if sampler and replaced:
                sampler["instead_of"] = replaced
                warnings.append(
                    f"samples are scored with {brief(sampler)} in the place of {brief(replaced)}, which takes more than "
                    f"metrics.max_nfe={settings.max_nfe} evaluations"
                )
                note(warnings[0])
            setting |= {"sampler": sampler}
            costs = cost(model, settings, setting, trained.costs)
            metrics |= costs
            if settings.n:
                setting |= {"nfe": costs["sampling/nfe"]["value"]}
                found, of_samples = quality(model, subject, settings, setting, network)
                metrics |= found
                warnings += of_samples
    status_line("")
    return {"scored": now(), "metrics": metrics, "warnings": warnings}


def evaluate_run(
    model: GenerativeModel,
    subject: EvalData,
    run: Run,
    settings: EvalSettings,
    network: FeatureNetwork | None,
    *,
    seed: int,
    ema: bool,
    chosen: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Evaluate the model of a run and write the result into it; arguments as in ``evaluate_model``.

    Raises:
        NotKept: where it cannot be written; the scores are in the error.
    """
    trained = Trained.of_run(run, ema=ema)
    result = evaluate_model(model, subject, settings, network, seed=seed, trained=trained, chosen=chosen, note=note)
    with kept(result, run.path):
        run.write_result(result)
        values = {name: measured["value"] for name, measured in result["metrics"].items()}
        run.log(event="scores", step=trained.step, values=values)
    return result


def interim(
    model: GenerativeModel, subject: EvalData, settings: EvalSettings, n: int, network: FeatureNetwork | None, seed: int
) -> dict[str, float | None]:
    """Score a few samples in the middle of training: values alone, since few samples make no number to be quoted."""
    model.eval()
    settings = replace(settings, n=n, force=True)
    with full_float32(), within_evaluations(model, settings.max_nfe):
        found, _ = quality(model, subject, settings, {"seed": seed}, network and network.to(model.device))
    status_line("")
    return {name: measured["value"] for name, measured in found.items()}


def quality(
    model: GenerativeModel,
    subject: EvalData,
    settings: EvalSettings,
    setting: dict[str, Any],
    network: FeatureNetwork | None,
) -> tuple[dict[str, Any], list[str]]:
    """Draw samples and compare them with both splits."""
    x, y, broken = draw(model, settings.n, settings.batch_size, setting["seed"])
    if broken:
        return {}, [f"{broken} of {len(x)} samples are not finite: they are compared with nothing"]
    try:
        return compare(x, y, subject, settings, setting, network, model.device)
    except NonFiniteError as error:  # features of samples that are finite
        return {}, [str(error)]


def compare(
    x: Any,
    y: Any,
    subject: EvalData,
    settings: EvalSettings,
    setting: dict[str, Any],
    network: FeatureNetwork | None,
    device: Any = "cpu",
) -> tuple[dict[str, Any], list[str]]:
    """Compare samples, bytes or points, with the splits of some data.

    Args:
        x: (N, *shape).
        y: the classes that were asked for, (N,), or None.
        subject: the data.
        settings: what is computed.
        setting: what made the samples.
        network: what features are made of; None for none.
        device: where to compute.

    Returns:
        The scores, and warnings.
    """
    data, cache = subject.data, cache_folder() / "references"
    splits = {name: samples.stored(split.x, data.levels) for name, split in data.splits.items()}
    warnings: list[str] = []
    found: dict[str, Any] = {}
    if network is not None:
        status_line(f"features of {len(x)} samples")
        small = small_splits({name: len(images) for name, images in splits.items()}, network)
        if small and not settings.force:
            warnings.append(f"{small}: no such distance was computed; metrics.force=true gives it, marked")
        fake = network.extract(x, settings.batch_size)
        for split, images in splits.items():
            real = reference(
                f"{subject.name}/{split}",
                images,
                data.splits[split].y,
                network,
                cache,
                settings.batch_size,
                functools.partial(_progress, split, len(images)),
                data.levels,
            )
            scores = samples.feature_scores(fake, real, network, settings.force, device)
            if split != "test":
                scores |= samples.class_scores(fake, y, real, network, data.classes, device)
            found |= {f"{split}/{name}": measured for name, measured in scores.items()}
    if data.levels is None:
        for split, points in splits.items():
            scores = samples.point_scores(x, points, f"{subject.name}/{split}")
            found |= {f"{split}/{name}": measured for name, measured in scores.items()}
    if "test" in splits:  # whose images nobody can have copied
        copies, warning = samples.memorization_scores(
            x, splits["train"], splits["test"], subject.flip, subject.name, cache, device, status_line
        )
        found |= {f"memorisation/{name}": measured for name, measured in copies.items()}
        warnings += [warning] if warning else []
    return (
        {name: to_record(name, m.value, m.stderr, m.protocol, setting, m.detail) for name, m in found.items()},
        warnings,
    )


def _progress(split: str, n: int, done: int) -> None:
    status_line(f"features of {split}: {done}/{n}")


def draw(model: GenerativeModel, n: int, batch_size: int, seed: int) -> tuple[Any, Any, int]:
    """Draw samples as they are stored, bytes or points; sample i is f(seed, i).

    Returns:
        The samples, the classes of a conditional model, and how many samples are not finite.
    """
    parts, labels, broken = [], list[Any](), 0
    for start in range(0, n, batch_size):
        rows = range(start, min(start + batch_size, n))
        rng = SampleStreams(seed, rows, device=model.device)
        y = model.conditioner.draw(len(rows), None, rng)
        x = model.sample(len(rows), y, rng=rng).x.float().cpu()
        broken += int((~x.isfinite().flatten(1).all(1)).sum())
        parts.append(x if model.levels is None else to_bytes(x, model.levels))
        labels.append(None if y is None else y.cpu())
        status_line(f"sampling {rows.stop}/{n}")
    return torch.cat(parts), None if labels[0] is None else torch.cat(labels), broken


def pick_network(settings: EvalSettings, name: str, event: EventSpec, *, needed: bool) -> FeatureNetwork | None:
    """Make the network that features are made of, before anything takes long.

    Args:
        settings: what is computed.
        name: of the data.
        event: of the data.
        needed: whether to go on without, where the network was not asked for by name and cannot be had.

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
