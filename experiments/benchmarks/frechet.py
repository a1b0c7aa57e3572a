"""Frechet distance of statistics of 2,048 features, as of Inception."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import scipy.linalg
import torch
from run import Pair
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torchmetrics.image.fid import _compute_fid

from genzoo.metrics.frechet import Moments, frechet_distance, frechet_distance_of_features, moments

D = 2048


def features(n: int, seed: int) -> torch.Tensor:
    """Features whose spectrum falls as that of Inception's does, roughly as 1/k."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, D + 1, dtype=torch.float64).pow(-0.5)
    mix = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    return torch.randn(n, D, generator=generator, dtype=torch.float64) * scale @ mix + 0.01 * seed


def by_scipy(p: Moments, q: Moments) -> float:
    root = scipy.linalg.sqrtm(p.cov.numpy() @ q.cov.numpy())
    difference = (p.mean - q.mean).numpy()
    return float(difference @ difference + np.trace(p.cov) + np.trace(q.cov) - 2 * np.trace(root.real))


def by_torchmetrics(p: Moments, q: Moments) -> float:
    return float(_compute_fid(p.mean, p.cov, q.mean, q.cov))


def by_fidelity(p: Moments, q: Moments) -> float:
    stats = [{"mu": m.mean.numpy(), "sigma": m.cov.numpy()} for m in (p, q)]
    return fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]


def by_genzoo(p: Moments, q: Moments) -> float:
    return frechet_distance(p, Moments(q.n, q.mean, q.cov))  # the factor is found anew


def by_eigenproblems(few: torch.Tensor, q: Moments) -> float:
    own = moments(few)
    root = torch.linalg.eigh(own.cov)
    factor = root.eigenvectors * root.eigenvalues.clamp(min=0).sqrt()
    values = torch.linalg.eigvalsh(factor.T @ q.cov @ factor).clamp(min=0)
    return float((own.mean - q.mean).square().sum() + (own.cov + q.cov).trace() - 2 * values.sqrt().sum())


@functools.cache
def statistics() -> tuple[Moments, Moments]:
    warnings.filterwarnings("ignore")
    return moments(features(10_000, 1)), moments(features(10_000, 2))


@functools.cache
def truth() -> float:
    return by_genzoo(*statistics())


def full(way: Callable[[Moments, Moments], float]) -> Callable[[], Callable[[], float]]:
    """Set up a way to compute the distance of full-rank statistics; it must give what the others give."""

    def build() -> Callable[[], float]:
        p, q = statistics()
        assert abs(way(p, q) / truth() - 1) < 1e-6, way
        return lambda: way(p, q)

    return build


def few(way: Callable[[torch.Tensor, Moments], float]) -> Callable[[], Callable[[], float]]:
    """Set up a way to compute the distance of 500 samples from statistics that are kept."""

    def build() -> Callable[[], float]:
        samples, (_, q) = features(500, 3), statistics()
        _ = q.factor  # which a reference keeps
        assert abs(way(samples, q) / by_eigenproblems(samples, q) - 1) < 1e-5, way
        return lambda: way(samples, q)

    return build


def pairs() -> Iterator[Pair]:
    """Full-rank statistics three ways; some samples against statistics that are kept."""
    name = "Frechet distance of statistics, d=2048"
    yield Pair(name, "scipy sqrtm", full(by_genzoo), full(by_scipy), 15.0)
    yield Pair(name, "torchmetrics", full(by_genzoo), full(by_torchmetrics), 10.0)
    yield Pair(name, "torch-fidelity", full(by_genzoo), full(by_fidelity), 10.0)
    ours, theirs = few(frechet_distance_of_features), few(by_eigenproblems)
    yield Pair("Frechet distance of 500 samples, reference kept", "two eigenproblems", ours, theirs, 10.0)
