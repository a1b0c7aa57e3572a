"""Metrics of a stream that two processes share are those of the whole stream."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

from genzoo.metrics.cat_metric import CatMetric
from genzoo.metrics.frechet import FeatureMoments, moments
from genzoo.metrics.inception_score import inception_score
from genzoo.metrics.kernel import kernel_distance
from genzoo.metrics.likelihood import mean_and_stderr
from genzoo.metrics.manifold import manifold


def stream(seed: int = 0) -> torch.Tensor:
    return torch.randn(300, 6, generator=torch.Generator().manual_seed(seed)) + 100


def measured(x: torch.Tensor) -> dict:
    """Every kind of metric over a stream, in updates of uneven sizes."""
    real = stream(1)
    metrics = {
        "moments": FeatureMoments(6),
        "kernel": CatMetric(lambda fake: kernel_distance(real, fake)),
        "manifold": CatMetric(lambda fake: manifold(real, fake)),
        "score": CatMetric(inception_score),
        "mean": CatMetric(lambda rows: mean_and_stderr(rows[:, 0]), torch.float64),
    }
    for part in x.split([1, len(x) // 3, len(x) - 1 - len(x) // 3]):
        for metric in metrics.values():
            metric.update(part)
    return {name: metric.compute() for name, metric in metrics.items()}


def plain(value):
    """Turn a tuple with names into a list, which travels without code."""
    return list(value) if isinstance(value, tuple) else value


def half(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = measured(stream()[:100] if rank == 0 else stream()[100:])
    law = found.pop("moments")
    found = {name: plain(value) for name, value in found.items()}
    torch.save({**found, "moments": [law.n, law.mean, law.cov]}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_measure_what_one_would(tmp_path: Path):
    multiprocessing.spawn(half, (str(tmp_path),), nprocs=2)
    alone = measured(stream())
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        n, mean, cov = found.pop("moments")
        assert n == 300
        torch.testing.assert_close(mean, alone["moments"].mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(cov, alone["moments"].cov, rtol=1e-10, atol=1e-12)
        for name, value in found.items():
            assert value == pytest.approx(plain(alone[name]), rel=1e-9), name


def test_moments_of_a_stream_are_those_of_all_its_features_far_from_the_origin_too():
    x = stream().double() + 1e6
    metric = FeatureMoments(6)
    for part in x.split([1, 2, 7, 290]):
        metric.update(part)
    expected = moments(x)
    torch.testing.assert_close(metric.compute().cov, expected.cov, rtol=1e-9, atol=1e-9)
