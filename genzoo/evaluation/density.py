"""Negative log-likelihood and reconstruction metrics on the split of the scores."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch

from genzoo.console import status_line
from genzoo.distributions.discretization import bin_center, to_bytes
from genzoo.errors import BUILD_ERRORS, misfit
from genzoo.evaluation.records import to_record
from genzoo.evaluation.samples import stored, subset
from genzoo.evaluation.settings import EvalSettings
from genzoo.metrics.likelihood import mean_and_stderr, score_log_prob
from genzoo.metrics.reconstruction import reconstruction_error
from genzoo.model import Bijective, Bound, Codec, Density, TrainableModel, reconstruct


def likelihood(model: Density, data: Any, settings: EvalSettings, setting: dict[str, Any]) -> dict[str, Any]:
    """Compute the negative log-likelihood of the split, and that of the data distribution if known."""
    split, of = data.scored
    chosen = subset(len(of.x), settings.events)
    x, y = of.x[chosen], None if of.y is None else of.y[chosen]
    name, result = score_log_prob(
        model,
        x,
        y,
        num_samples=settings.num_samples,
        batch_size=settings.batch_size,
        seed=setting["seed"],
        progress=lambda done: status_line(f"scoring {done}/{len(x)}"),
    )
    protocol = {
        "bound": str(model.bound.name or model.bound),
        "split": split,
        "split_sha256": split_sha256(x),
        "n": result.n,
        "levels": model.levels,
        "dequantization": None if model.levels is None else "uniform, one draw",
    }
    draws = {"num_samples": settings.num_samples} if model.bound else {}
    # A lower bound increases with the number of draws, an unbiased estimate does not.
    of_bound = draws if Bound.LOWER in model.bound else {}
    prefix = data.held_out  # "test" also for data without a test split
    name = f"{prefix}/{name}"
    metrics = {name: to_record(name, result.value, result.stderr, {**protocol, **of_bound}, {**setting, **draws})}
    return metrics | truth(data, x, protocol)


def truth(data: Any, x: Any, protocol: dict[str, Any]) -> dict[str, Any]:
    """Compute the negative log-likelihood of the data distribution, if it is known.

    Args:
        data: the data set.
        x: its examples.
        protocol: of the score of a model of them.
    """
    if data.density is None:
        return {}
    found = mean_and_stderr(-data.density.log_prob(x))
    protocol = {**protocol, "bound": "EXACT", "model": "the law that made the data"}
    name = f"{data.held_out}/nll_truth"  # "test" also for data without a test split
    return {name: to_record(name, found.value, found.stderr, protocol, {})}


def split_sha256(x: Any) -> str:
    """SHA-256 of the examples of a split."""
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()


def reconstruction(model: Codec, data: Any, settings: EvalSettings, setting: dict[str, Any]) -> dict[str, Any]:
    """Compute the reconstruction error of images; skipped for bijections, which are lossless."""
    if isinstance(model, Bijective) or model.levels is None:
        return {}
    split, of = data.scored
    chosen = subset(len(of.x), settings.events)
    x, y = of.x[chosen], of.y[chosen] if model.condition else None
    parts = []
    with torch.no_grad():
        for rows in torch.arange(len(x)).split(settings.batch_size):
            batch = bin_center(x[rows].to(model.device), model.levels).to(model.dtype)
            labels = None if y is None else y[rows].to(model.device)
            parts.append(to_bytes(reconstruct(model, batch, labels), model.levels).cpu())
    errors = reconstruction_error(stored(x, model.levels), torch.cat(parts))
    protocol = {"split": split, "split_sha256": split_sha256(x)}
    named = {f"reconstruction/{name}": error for name, error in errors.items()}
    return {
        name: to_record(name, error.value, error.stderr, {**protocol, "n": error.n}, setting)
        for name, error in named.items()
    }


def check_settings(model: TrainableModel, settings: EvalSettings) -> None:
    """Evaluate the density of one dummy example, to fail early on invalid settings.

    Raises:
        UsageError: with the message of the model.
    """
    if not isinstance(model, Density):
        return
    x = torch.zeros(1, *model.shape, device=model.device, dtype=model.dtype)
    y = None if model.condition is None else model.condition.empty(1, model.device, model.dtype).zero_()
    try:
        with torch.no_grad():
            rng = torch.Generator(model.device)
            copy.deepcopy(model).eval().log_prob(x, y, num_samples=settings.num_samples, rng=rng)
    except BUILD_ERRORS as error:
        raise misfit("metrics", error) from error
