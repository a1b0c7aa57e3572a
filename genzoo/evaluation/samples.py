"""One evaluation for the samples of every family, and of any other program.

Samples arrive as bytes, or as points of the plane, and leave as scores, each with its protocol: everything that has to be
alike for two numbers to be ranked together. ``genzoo.catalogue`` says what each score means.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genzoo.catalogue import BY_BASE
from genzoo.distributions.discretization import bin_center, to_bytes
from genzoo.metrics.features import FeatureNetwork, Features
from genzoo.metrics.finite import check_finite
from genzoo.metrics.frechet import (
    frechet_distance_of_features,
    frechet_infinity,
    frechet_stderr,
    moments,
)
from genzoo.metrics.inception_score import SPLITS, inception_score
from genzoo.metrics.kernel import (
    SUBSET_SIZE,
    SUBSETS,
    gaussian_mmd,
    kernel_distance,
    kernel_distance_stderr,
    median_distance,
)
from genzoo.metrics.likelihood import mean_and_stderr
from genzoo.metrics.manifold import manifold
from genzoo.metrics.memorisation import Neighbours, exact_copies, memorisation, neighbours, shifted_copies
from genzoo.metrics.reference import Reference, cached, tensor_sha256
from genzoo.metrics.sample_size import K_COVERAGE, MIN_SAMPLES, K, check_sample_size
from genzoo.metrics.sliced_wasserstein import DIRECTIONS, sliced_wasserstein
from genzoo.numerics.random import generator

NEIGHBOURS = 10_000  # features of each side that balls are made of
MEMORISED = 2_000  # samples whose nearest training event is looked for
SHIFTED = 500  # of which over all shifts by a pixel, nine times as much work


class MetricResult(NamedTuple):
    """A score and how it was made."""

    value: Any
    stderr: float | None
    protocol: dict[str, Any]
    detail: dict[str, Any] | None = None  # what belongs to the number beside its error


def stored(x: Tensor, levels: int | None) -> Tensor:
    """Events of a data set the way samples are compared with them: integers as bytes, points as they are."""
    return x if levels is None else to_bytes(bin_center(x, levels, torch.float64), levels)


def subset(size: int, n: int | None) -> Tensor:
    """Choose ``n`` of ``size`` events, the same ones for every model: all, or a fixed draw in the order of the data."""
    if n is None or n >= size:
        return torch.arange(size)
    return torch.randperm(size, generator=generator("subset", size))[:n].sort().values


def named(metric: str, network: FeatureNetwork) -> str:
    """Name a metric by its network: the names of the literature are Inception's alone."""
    return BY_BASE[metric].on(None if network.is_inception else network.name)


def feature_scores(
    fake: Features,
    reference: Reference,
    network: FeatureNetwork,
    force: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, MetricResult]:
    """Compare features of samples with those of a split.

    Args:
        fake: of the samples, in the order in which they were drawn.
        reference: the split.
        network: what made both.
        force: whether to give a Frechet distance of fewer samples or real events than features; without it there is none
            from a split that has fewer.
        device: where to compute.

    Raises:
        TooFewSamplesError: where the samples are fewer than the features.
    """
    x, real = fake.features.to(device), reference.features.to(device)
    check_sample_size(len(x), network, force)
    protocol = {
        **network.metadata,
        "reference": reference.name,
        "reference_sha256": reference.sha256,
        "levels": reference.levels,
        "n_real": len(real),
        "n_fake": len(x),
    }
    few = [f"{len(side)} {name}" for name, side in (("samples", x), ("real", real)) if len(side) < network.dim]
    marked = {"forced": f"{' and '.join(few)} of {network.dim} features"} if few else {}
    law = reference.moments.to(torch.device(device))
    found: dict[str, MetricResult] = {}
    if len(real) >= (2 if force else network.dim):  # with less than two there is no covariance
        found["fd"] = MetricResult(
            frechet_distance_of_features(x, law),
            frechet_stderr(x, law),
            {**protocol, **marked},
        )
    infinite = frechet_infinity(x, law) if len(real) >= network.dim else None
    if infinite is not None:
        found["fd_infinity"] = MetricResult(
            infinite,
            frechet_stderr(x, law),
            {**protocol, "extrapolation": "1/n, k=1..4"},
        )
    if network.resize is not None and len(real) >= MIN_SAMPLES:
        size = min(SUBSET_SIZE, len(real), len(x))
        chosen = [side[subset(len(side), NEIGHBOURS)] for side in (real, x)]
        found["kd"] = MetricResult(
            kernel_distance(real, x),
            kernel_distance_stderr(*chosen),
            {**protocol, "kernel": "(x'y/D + 1)^3", "subsets": SUBSETS, "subset_size": size},
        )
    n = min(NEIGHBOURS, len(real), len(x))
    enough = n >= MIN_SAMPLES
    shape = manifold(real[subset(len(real), n)], x[subset(len(x), n)], K, K_COVERAGE)._asdict() if enough else {}
    for name, value in shape.items():
        k = K if name in ("precision", "recall") else K_COVERAGE
        # Of shares of independent samples the error is that of a coin; the balls themselves are taken as given.
        stderr = (value * (1 - value) / n) ** 0.5 if name == "precision" else None
        found[name] = MetricResult(value, stderr, {**protocol, "n_real": n, "n_fake": n, "k": k})
    return {named(name, network): measured for name, measured in found.items()}


def class_scores(
    fake: Features,
    y: Tensor | None,
    reference: Reference,
    network: FeatureNetwork,
    names: tuple[str, ...],
    device: torch.device | str = "cpu",
) -> dict[str, MetricResult]:
    """Score what a classifier sees: how sure it is, and, where classes were asked for, whether it finds them.

    Args:
        fake: of the samples.
        y: the classes that were asked for, (N,), of a conditional model.
        reference: the split whose classes are compared one by one.
        network: what made both.
        names: of the classes.
        device: where to compute.
    """
    if fake.logits is None:
        return {}
    check_finite(logits=fake.logits)
    x, logits = fake.features.to(device), fake.logits.to(device)
    protocol = {**network.metadata, "n_fake": len(x)}
    found: dict[str, MetricResult] = {}
    if len(logits) >= SPLITS:
        score = inception_score(logits)
        found["class_score"] = MetricResult(score.value, score.stderr, {**protocol, "splits": SPLITS})
    if (
        y is None
        or network.classes is None
        or reference.y is None
        or not reference.name.startswith(f"{network.classes}/")
    ):
        return {named(name, network): measured for name, measured in found.items()}
    y = y.to(device)
    right = (logits.argmax(1) == y).double()
    each = {name: float(right[y == i].mean()) if (y == i).any() else None for i, name in enumerate(names)}
    accuracy = mean_and_stderr(right)
    found["class_accuracy"] = MetricResult(accuracy.value, accuracy.stderr, protocol, {"per_class": each})
    distances = {
        name: frechet_distance_of_features(x[y == i], moments(reference.of_class(i).to(device)))
        for i, name in enumerate(names)
        if (y == i).sum() >= network.dim and (reference.y == i).sum() >= network.dim
    }
    if distances:
        found["fd_per_class"] = MetricResult(
            sum(distances.values()) / len(distances),
            None,
            {
                **protocol,
                "reference": reference.name,
                "reference_sha256": reference.sha256,
                "classes": len(distances),
            },
            {"per_class": distances},
        )
    return {named(name, network): measured for name, measured in found.items()}


def point_scores(fake: Tensor, real: Tensor, name: str) -> dict[str, MetricResult]:
    """Compare vectors with those of a split, (N, D) and (M, D)."""
    bandwidth = median_distance(real)
    protocol = {
        "reference": name,
        "reference_sha256": tensor_sha256(real),
        "n_real": len(real),
        "n_fake": len(fake),
    }
    directions = DIRECTIONS if real.shape[1] > 1 else 1
    near = real[subset(len(real), NEIGHBOURS)]
    kernel = {"kernel": "gaussian", "bandwidth": bandwidth, "n_real": len(near)}
    return {
        "sliced_wasserstein": MetricResult(
            sliced_wasserstein(real, fake), None, {**protocol, "directions": directions}
        ),
        "mmd": MetricResult(gaussian_mmd(near, fake, bandwidth), None, {**protocol, **kernel}),
    }


def memorization_scores(
    fake: Tensor,
    train: Tensor,
    test: Tensor,
    flip: bool,
    name: str,
    cache: Path | None,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, MetricResult], str | None]:
    """Look for copies of the training split among samples.

    Args:
        fake, train, test: bytes or points, (N, ...).
        flip: whether training saw mirror images too.
        name: of the data.
        cache: where the neighbours of the test split are kept.
        device: where to compute.
        say: shows what is being done.

    Returns:
        The scores, and a warning where there are more copies than chance and the test split explain.
    """
    x, y = fake[subset(len(fake), MEMORISED)], test[subset(len(test), MEMORISED)]
    if len(train) < 3:
        return {}, None
    key = {"version": 2, "what": "neighbours", "train": tensor_sha256(train), "test": tensor_sha256(y), "flip": flip}
    place = train.to(device)
    # Points have no shifts, and the insides of tiny images are alike by chance.
    moves = train.dim() == 4 and min(train.shape[-2:]) >= 8

    def look(events: Tensor) -> dict[str, Tensor]:
        found = _on_cpu(neighbours(events.to(device), place, flip))
        moved = events[subset(len(events), SHIFTED)].to(device)
        return {**found, "shifted": shifted_copies(moved, place, flip).cpu() if moves else torch.zeros(0)}

    say("looking for copies among the test split")
    of_test = cached(cache, key, lambda: look(y))
    say("looking for copies among the samples")
    of_fake = look(x)
    test_shifted, fake_shifted = of_test.pop("shifted"), of_fake.pop("shifted")
    shifted = (fake_shifted, test_shifted) if moves else None
    found = memorisation(Neighbours(**of_fake), Neighbours(**of_test), shifted)
    same, same_of_test = (exact_copies(side.to(train.dtype), train, flip) for side in (fake, test))
    protocol = {
        "reference": f"{name}/train",
        "reference_sha256": key["train"],
        "space": "pixels, nearer of both mirror images" if flip else "pixels" if train.dim() > 2 else "coordinates",
        "n_real": len(train),
        "n_fake": len(x),
        "n_test": len(y),
    }
    scores = {
        "nearest_ratio": MetricResult(found.nearest_ratio, None, protocol),
        "authentic": MetricResult(*found.authentic[:2], protocol, {"of_test": found.authentic_of_test}),
        "copied": MetricResult(*found.copied[:2], protocol, {"of_test": found.copied_of_test}),
        "exact_copies": MetricResult(
            same, None, {**protocol, "n_fake": len(fake), "n_test": len(test)}, {"of_test": same_of_test}
        ),
    }
    if found.shifted is not None:
        sizes = {"n_fake": len(fake_shifted), "n_test": len(test_shifted), "shift": "up to a pixel each way"}
        detail = {"of_test": found.shifted_of_test}
        scores["shifted"] = MetricResult(*found.shifted[:2], {**protocol, **sizes}, detail)
    if not found.flagged:
        return scores, None
    share, share_of_test, how = found.alarms[0]
    return scores, (
        f"memorised: {share:.1%} of the samples are copies of training events{how} "
        f"({share_of_test:.1%} of the test split would pass for such)"
    )


def _on_cpu(found: Neighbours) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in found._asdict().items()}
