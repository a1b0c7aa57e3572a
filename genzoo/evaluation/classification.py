"""Accuracy and cross-entropy of classifiers on the split of the scores, also on noisy data where they are of noisy data."""

from __future__ import annotations

from typing import Any

import torch

from genzoo.console import status_line
from genzoo.diffusion.noisy import with_noise
from genzoo.distributions.discretization import bin_center
from genzoo.evaluation.density import split_sha256
from genzoo.evaluation.records import to_record
from genzoo.evaluation.samples import subset
from genzoo.evaluation.settings import EvalSettings
from genzoo.metrics.likelihood import mean_and_stderr
from genzoo.model import Classifier
from genzoo.numerics.random import SampleStreams

DRAWS = 8  # of noise levels and noise for each example


@torch.no_grad()
def classification(model: Any, data: Any, settings: EvalSettings, setting: dict[str, Any]) -> dict[str, Any]:
    """Compute accuracy and cross-entropy on test examples.

    Those of a ``NoisyClassifier`` are the accuracy on clean examples, and both on noisy ones at uniform angles of signal and
    noise.

    The noise of example i is f(seed, i), independent of the batch size.

    Args:
        model: a ``Classifier``, or a ``TrainableModel`` that is a ``genzoo.diffusion.guidance.NoisyClassifier``, in evaluation
            mode.
        data: with classes.
        settings: of the evaluation.
        setting: of the model, for the cards.
    """
    split, of = data.scored
    chosen = subset(len(of.x), settings.events)
    right: dict[str, list[torch.Tensor]] = {"clean": [], "noisy": []}
    losses: dict[str, list[torch.Tensor]] = {"clean": [], "noisy": []}
    for start in range(0, len(chosen), settings.batch_size):
        rows = chosen[start : start + settings.batch_size]
        x, y = of.x[rows].to(model.device), of.y[rows].to(model.device)
        x = (x if data.levels is None else bin_center(x, data.levels)).to(model.dtype)
        if isinstance(model, Classifier):
            found = {"clean": model.class_log_probs(x)[None]}
        else:
            rng = SampleStreams(setting["seed"], rows.tolist(), device=model.device)
            one = torch.ones(len(x), dtype=torch.float64, device=model.device)
            levels = {"clean": [(x, one, 0 * one)], "noisy": [with_noise(x, rng) for _ in range(DRAWS)]}
            found = {kind: torch.stack([model.log_probs(*draw) for draw in draws]) for kind, draws in levels.items()}
        for kind, log_probs in found.items():
            losses[kind].append(-log_probs.gather(2, y[None, :, None].expand(len(log_probs), -1, 1)).mean((0, 2)).cpu())
            right[kind].append((log_probs.argmax(2) == y).double().mean(0).cpu())
        status_line(f"classifying {start + len(rows)}/{len(chosen)}")
    test = {"split": split, "split_sha256": split_sha256(of.x[chosen]), "n": len(chosen)}
    noise = {**test, "noise": "cos(a) x + sin(a) eps, a uniform in [0, pi/2]", "draws": DRAWS}
    scores = [("classifier/accuracy", right["clean"], test)]
    if isinstance(model, Classifier):
        scores += [("classifier/cross_entropy", losses["clean"], test)]
    else:
        scores += [("classifier/accuracy_noisy", right["noisy"], noise)]
        scores += [("classifier/cross_entropy_noisy", losses["noisy"], noise)]
    metrics = {}
    for name, values, protocol in scores:
        score = mean_and_stderr(torch.cat(values))
        metrics[name] = to_record(name, score.value, score.stderr, protocol, setting)
    return metrics
