"""Kernel distance, and precision and recall, of 5,000 features of 2,048 numbers, as of Inception."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator

import torch
from frechet import features
from run import Go, Pair

from genzoo.metrics import kernel
from genzoo.metrics.manifold import manifold

N, SUBSETS, NEAREST = 5_000, 20, 5
Score = Callable[[], float | tuple[float, ...]]


@functools.cache
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets in single precision, as networks give them, the second of which lacks a part of the first's spread."""
    return features(N, 1).float(), (0.9 * features(N, 2)).float()


def kid_by_genzoo() -> float:
    real, fake = sets()
    return kernel.kernel_distance(real, fake)


def kid_by_fidelity() -> float:
    from torch_fidelity.metric_kid import kid_features_to_metric

    real, fake = sets()
    scores = kid_features_to_metric(fake, real, kid_subsets=SUBSETS, kid_subset_size=1000, verbose=False)
    return scores["kernel_inception_distance_mean"]


def manifold_by_genzoo() -> tuple[float, ...]:
    return manifold(*sets(), k=NEAREST, k_coverage=NEAREST)


def manifold_by_prdc() -> tuple[float, ...]:
    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()):  # it prints the sizes
        scores = compute_prdc(*(x.numpy() for x in sets()), nearest_k=NEAREST)
    return tuple(scores[name] for name in ("precision", "recall", "density", "coverage"))


def agreeing(way: Score, other: Score, tolerance: float) -> Callable[[], Go]:
    """Set up a way to compute scores, which must be what another way gives."""

    def build() -> Go:
        kernel.SUBSETS = SUBSETS
        mine, its = (torch.as_tensor(score(), dtype=torch.float64) for score in (way, other))
        torch.testing.assert_close(mine, its, rtol=tolerance, atol=0)
        return way

    return build


def pairs() -> Iterator[Pair]:
    """KID of the same subsets, which torch-fidelity sums up in single precision, and scores of the same balls.

    prdc rounds distances to single precision, so that a few in a million balls may hold another feature: density differs in
    its sixth digit, the other scores, whose steps are a thousand times as large, not at all.
    """
    ways = kid_by_genzoo, kid_by_fidelity
    ours, theirs = (agreeing(way, other, 2e-4) for way, other in (ways, ways[::-1]))
    yield Pair(f"KID, {SUBSETS} subsets x 1,000, d=2048", "torch-fidelity", ours, theirs, 1.0)
    ways = manifold_by_genzoo, manifold_by_prdc
    ours, theirs = (agreeing(way, other, 1e-5) for way, other in (ways, ways[::-1]))
    yield Pair("precision and recall, 5,000 x 2048", "prdc", ours, theirs, 2.0)
