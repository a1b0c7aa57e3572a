"""Frechet distance of statistics of 2,048 features, as of Inception."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

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


def pairs() -> Iterator[Pair]:
    """Full-rank statistics three ways; a thousand samples against statistics that are kept."""
    p, q = moments(features(10_000, 1)), moments(features(10_000, 2))

    def ours() -> float:
        return frechet_distance(p, Moments(q.n, q.mean, q.cov))  # the factor is found anew

    def by_scipy() -> float:
        root = scipy.linalg.sqrtm(p.cov.numpy() @ q.cov.numpy())
        difference = (p.mean - q.mean).numpy()
        return float(difference @ difference + np.trace(p.cov) + np.trace(q.cov) - 2 * np.trace(root.real))

    def by_torchmetrics() -> float:
        return float(_compute_fid(p.mean, p.cov, q.mean, q.cov))

    def by_fidelity() -> float:
        stats = [{"mu": m.mean.numpy(), "sigma": m.cov.numpy()} for m in (p, q)]
        return fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]

    warnings.filterwarnings("ignore")
    truth = by_scipy()
    for other in (ours, by_torchmetrics, by_fidelity):
        assert abs(other() / truth - 1) < 1e-6, other
    yield Pair("FD from statistics, d=2048", "scipy sqrtm", ours, by_scipy, 15.0)
    yield Pair("FD from statistics, d=2048", "torchmetrics", ours, by_torchmetrics, 10.0)
    yield Pair("FD from statistics, d=2048", "torch-fidelity", ours, by_fidelity, 10.0)

    few = features(500, 3)
    _ = q.factor  # which a reference keeps

    def of_few() -> float:
        return frechet_distance_of_features(few, q)

    def by_eigenproblems() -> float:
        own = moments(few)
        root = torch.linalg.eigh(own.cov)
        factor = root.eigenvectors * root.eigenvalues.clamp(min=0).sqrt()
        values = torch.linalg.eigvalsh(factor.T @ q.cov @ factor).clamp(min=0)
        return float((own.mean - q.mean).square().sum() + (own.cov + q.cov).trace() - 2 * values.sqrt().sum())

    assert abs(of_few() / by_eigenproblems() - 1) < 1e-5
    yield Pair("FD of 500 samples, reference kept", "two eigenproblems", of_few, by_eigenproblems, 10.0)
