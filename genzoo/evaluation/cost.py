"""Cost of sampling and training, and the estimated time of an evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from genzoo.console import log_stderr, status_line
from genzoo.devices import device_name
from genzoo.diffusion.denoiser import path_model
from genzoo.distributions.discretization import bin_center
from genzoo.evaluation.records import to_record
from genzoo.evaluation.settings import EvalSettings
from genzoo.evaluation.text import scores_held_out
from genzoo.model import Density, GenerativeModel, TrainableModel
from genzoo.numerics.random import SampleStreams
from genzoo.training.flops import COUNTED


class Estimate(NamedTuple):
    """Estimated seconds of an evaluation, without features and distances."""

    density: float
    samples: float
    drawn: int  # number of the samples
    shorter: str  # settings that reduce them


def estimate(model: GenerativeModel, data: Any, settings: EvalSettings) -> Estimate:
    """Extrapolate the time of an evaluation from a few examples and samples.

    Args:
        model: in evaluation mode, with the sampler of the evaluation.
        data: the data set.
        settings: of the evaluation.
    """

    def measured(work: Callable[[int], object], n: int) -> float:
        """Extrapolate the seconds for ``n`` items from batches of 2 and 8."""
        if n == 0:
            return 0.0
        seconds = []
        for size in (2, 8) if n >= 8 else (n,):
            start = time.perf_counter()
            work(size)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            return seconds[0]
        each = max((seconds[1] - seconds[0]) / 6, 0.0)
        batches = -(-n // settings.batch_size)
        return n * each + batches * max(seconds[1] - 8 * each, 0.0)

    def score_events(n: int) -> None:
        x = data.scored[1].x[:n].to(model.device)
        x = (x if model.levels is None else bin_center(x, model.levels)).to(model.dtype)
        y = data.scored[1].y[:n].to(model.device) if model.condition else None
        assert isinstance(model, Density)
        model.log_prob(x, y, num_samples=settings.num_samples, rng=torch.Generator(model.device).manual_seed(0))

    def draw_samples(n: int) -> None:
        rng = SampleStreams(0, range(n), device=model.device)
        model.sample(n, rng=rng)

    density, words = 0.0, []
    drawn = settings.n * (2 if scores_held_out(model, data) else 1) + settings.throughput
    with torch.no_grad():
        samples = measured(draw_samples, drawn)
        if isinstance(model, Density):
            events = len(data.scored[1].x)
            density = measured(score_events, min(settings.events or events, events))
            words.append("metrics.events=")
    words += ["metrics.n="] if settings.n else []
    words += ["sampler.steps="] if path_model(model) is not None else []
    return Estimate(density, samples, drawn, ", ".join(words))


def announce(expected: Estimate, train_seconds: Any) -> None:
    """Log the estimate if it exceeds a minute or the training time."""
    whole = expected.density + expected.samples
    trained = train_seconds if type(train_seconds) in (int, float) else 0.0
    if whole > min(60, max(trained, 10)):
        parts = [f"{expected.drawn:,} samples {expected.samples:.0f} s"]
        parts += [f"density {expected.density:.0f} s"] if expected.density else []
        log_stderr(
            f"scoring will take about {whole:.0f} s ({', '.join(parts)}), after {trained:.0f} s of training; "
            f"reduce it by {expected.shorter or 'metrics.throughput='}"
        )


def cost(
    model: GenerativeModel, settings: EvalSettings, setting: dict[str, Any], status: Mapping[str, Any]
) -> dict[str, Any]:
    """Measure the cost of sampling, and report the cost of training."""
    status_line("measuring the sampling speed")
    speed, nfe = throughput(model, settings.throughput)
    threads = None if model.device.type == "cuda" else torch.get_num_threads()
    machine = {"device": device_name(model.device), "threads": threads}
    protocol = {"batch": settings.throughput, **machine}
    measured = {
        "sampling/samples_per_second": (speed, protocol, {**setting, "nfe": nfe}),
        "sampling/nfe": (nfe, {}, setting),
    }
    records = {name: to_record(name, value, None, how, made) for name, (value, how, made) in measured.items()}
    return records | training_cost(model, status)


def training_cost(model: TrainableModel, status: Mapping[str, Any]) -> dict[str, Any]:
    """Report the size of a model and the cost of its training."""
    measured: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
        "model/parameters": (sum(p.numel() for p in model.parameters()), {}, {})
    }
    # Precomputation before the timed training, such as the pairs of a teacher.
    before = {name: status[name] for name in ("precompute_seconds",) if name in status}
    spent: dict[str, tuple[Any, dict[str, Any]]] = {
        "training/images": (status.get("images"), {}),
        "training/seconds": (status.get("train_seconds"), {"threads": status.get("threads"), **before}),
        "training/flops": (status.get("train_flops"), {"counted": COUNTED}),
    }
    for name, (value, how) in spent.items():
        if value and type(value) in (int, float):
            measured[name] = value, how, {}
    return {name: to_record(name, value, None, how, made) for name, (value, how, made) in measured.items()}


def throughput(model: GenerativeModel, n: int) -> tuple[float, int]:
    """Measure samples per second and NFE, after a warm-up if that takes less than a second."""

    def once() -> tuple[float, int]:
        rng = SampleStreams(0, range(n), device=model.device)
        start = time.perf_counter()
        nfe = model.sample(n, rng=rng).nfe
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, nfe

    seconds, nfe = once()
    if seconds < 1:
        seconds, nfe = min(once() for _ in range(3))
    return n / seconds, nfe
