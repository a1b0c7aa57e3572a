"""Sample-based metrics, shared by all families and samples of other programs.

Samples are bytes or vectors. Each score has a protocol: everything that must be equal for two scores to be comparable.
``genzoo.catalogue`` defines the metrics.
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

NEIGHBOURS = 10_000  # features of each set in k-nearest-neighbour metrics
MEMORISED = 2_000  # samples in memorization metrics
SHIFTED = 500  # samples searched over all one-pixel shifts, at nine times the cost


class MetricResult(NamedTuple):
    """A score with its standard error and protocol."""

    value: Any
    stderr: float | None
    protocol: dict[str, Any]
    detail: dict[str, Any] | None = None  # further values, such as per-class scores


def stored(x: Tensor, levels: int | None) -> Tensor:
    """Convert data to the form of samples: integer levels to bytes; vectors are unchanged."""
    return x if levels is None else to_bytes(bin_center(x, levels, torch.float64), levels)


def subset(size: int, n: int | None) -> Tensor:
    """Indices of a fixed random subset of ``n`` of ``size`` examples, equal for every model and sorted."""
    if n is None or n >= size:
        return torch.arange(size)
    return torch.randperm(size, generator=generator("subset", size))[:n].sort().values


def named(metric: str, network: FeatureNetwork) -> str:
    """Name of a metric on a feature network; FID, KID and IS are reserved for Inception."""
    return BY_BASE[metric].on(None if network.is_inception else network.name)


def feature_scores(
    fake: Features,
    reference: Reference,
    network: FeatureNetwork,
    force: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, MetricResult]:
    """Compute the feature-based metrics between samples and a split.

    Args:
        fake: features of the samples, in the order of drawing.
        reference: features of the split.
        network: the feature network.
        force: whether to compute a Frechet distance of fewer samples or real images than features.
        device: of the computation.

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
    real_moments = reference.moments.to(torch.device(device))
    found: dict[str, MetricResult] = {}
    if len(real) >= (2 if force else network.dim):  # a covariance needs two
        found["fd"] = MetricResult(
            frechet_distance_of_features(x, real_moments),
            frechet_stderr(x, real_moments),
            {**protocol, **marked},
        )
    infinite = frechet_infinity(x, real_moments) if len(real) >= network.dim else None
    if infinite is not None:
        found["fd_infinity"] = MetricResult(
            infinite,
            frechet_stderr(x, real_moments),
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
        # Binomial standard error of a fraction of independent samples, conditional on the balls.
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
    """Compute the class-based metrics: Inception score, conditional accuracy, Frechet distance and recall within classes.

    Args:
        fake: features and logits of the samples.
        y: class labels of the samples, (N,), for a conditional model.
        reference: features of the split.
        network: the feature network.
        names: class names.
        device: of the computation.
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
    recalls = _recall_per_class(x, y, reference, names, device)
    if recalls:
        found["recall_per_class"] = MetricResult(
            sum(recalls.values()) / len(recalls),
            None,
            {
                **protocol,
                "reference": reference.name,
                "reference_sha256": reference.sha256,
                "k": K,
                "classes": len(recalls),
            },
            {"per_class": recalls},
        )
    return {named(name, network): measured for name, measured in found.items()}


def _recall_per_class(
    x: Tensor, y: Tensor, reference: Reference, names: tuple[str, ...], device: torch.device | str
) -> dict[str, float]:
    """Compute the recall within each class that has enough samples and images, of equal numbers of both."""
    found = {}
    for i, name in enumerate(names):
        fake, real = x[y == i], reference.of_class(i).to(device)
        n = min(NEIGHBOURS, len(fake), len(real))
        if n >= MIN_SAMPLES:
            found[name] = manifold(real[subset(len(real), n)], fake[subset(len(fake), n)], K, K_COVERAGE).recall
    return found


def point_scores(fake: Tensor, real: Tensor, name: str) -> dict[str, MetricResult]:
    """Compute sliced Wasserstein distance and MMD between samples and a split, (N, D) and (M, D)."""
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
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, MetricResult], str | None]:
    """Compute the memorization metrics: near and exact copies of training examples among samples.

    Args:
        fake, train, test: bytes or vectors, (N, ...).
        flip: whether training used horizontal flips.
        name: of the data.
        cache: folder that caches the neighbours of the test split.
        device: of the computation.
        progress: callback for progress messages.

    Returns:
        The scores, and a warning if samples contain significantly more copies than the test split.
    """
    x, y = fake[subset(len(fake), MEMORISED)], test[subset(len(test), MEMORISED)]
    if len(train) < 3:
        return {}, None
    key = {"version": 2, "what": "neighbours", "train": tensor_sha256(train), "test": tensor_sha256(y), "flip": flip}
    place = train.to(device)
    # Vectors have no shifts, and the centres of tiny images coincide by chance.
    shiftable = train.dim() == 4 and min(train.shape[-2:]) >= 8

    def search(events: Tensor) -> dict[str, Tensor]:
        found = _on_cpu(neighbours(events.to(device), place, flip))
        moved = events[subset(len(events), SHIFTED)].to(device)
        return {**found, "shifted": shifted_copies(moved, place, flip).cpu() if shiftable else torch.zeros(0)}

    progress("nearest neighbours of the test split")
    of_test = cached(cache, key, lambda: search(y))
    progress("nearest neighbours of the samples")
    of_fake = search(x)
    test_shifted, fake_shifted = of_test.pop("shifted"), of_fake.pop("shifted")
    shifted = (fake_shifted, test_shifted) if shiftable else None
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
    fraction, fraction_of_test, how = found.alarms[0]
    return scores, (
        f"memorised: {fraction:.1%} of the samples are copies of training examples{how} "
        f"({fraction_of_test:.1%} for the test split)"
    )


def _on_cpu(found: Neighbours) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in found._asdict().items()}
