"""``python -m genzoo evaluate``: score a run on held-out data, and say how each number was made."""

from __future__ import annotations

import copy
import hashlib
import sys
import time
from typing import Any

from genzoo.commands.config import REFUSALS, UsageError, build, one_line, pick_device


def evaluate(config: dict[str, Any]) -> None:
    """Score a run as a validated configuration says, write the result into the run, and print it.

    Raises:
        ValueError: in one line, for what the user can mend.
    """
    from genzoo.commands.load import load
    from genzoo.runs import Run

    run = Run(config["run"])
    source = run.config.get("data", {}).get("source")
    if not isinstance(source, dict):
        raise UsageError(f"{run.path / 'config.yaml'}: names no data")
    model = load(
        run.path,
        ema=config["ema"],
        device=pick_device(config["device"]),
        sampler=config.get("sampler"),
        trust=config["trust"],
    )
    check_settings(model, config["metrics"])
    data = build(source, "data", trusted=False, trust=[*DATA, *config["trust"]])
    result = score(model, data, run, config["metrics"], seed=config["seed"], ema=config["ema"])
    show(result)
    print(f"run: {run.path}")


# Data that a run's own configuration may name without being trusted further: they read files and execute none.
DATA = [
    *(f"genzoo.data.images.{name}" for name in ("digits", "mnist", "fashion_mnist", "cifar10", "folder")),
    "genzoo.data.densities.plane_dataset",
    *(f"genzoo.data.densities.{name}" for name in ("GaussianMixture", "Moons", "Checkerboard", "SwissRoll")),
]


def score(model: Any, data: Any, run: Any, settings: dict[str, Any], *, seed: int, ema: bool) -> dict[str, Any]:
    """Measure what the model's abilities allow, and write it into the run.

    Every number carries a card: its protocol, rows of which are ranked together only where they agree, and its setting.
    """
    from genzoo.model import Density
    from genzoo.runs import now

    model.eval()
    status = run.status
    setting = {
        "weights": "ema" if ema else "trained",
        "step": status.get("step"),
        "images_seen": status.get("images"),
        "budget": run.config.get("budget"),
        "train_seed": run.config.get("seed"),
        "seed": seed,
    }
    metrics = likelihood(model, data, settings, setting) if isinstance(model, Density) else {}
    metrics |= cost(model, settings, setting, status)
    say("")
    result = {"scored": now(), "metrics": metrics}
    run.write_result(result)
    run.log(event="scores", step=status.get("step"), values={name: m["value"] for name, m in metrics.items()})
    return result


def check_settings(model: Any, settings: dict[str, Any]) -> None:
    """Score one made-up event, so that what a density does not accept is said before anything takes long.

    Raises:
        UsageError: in the model's own words.
    """
    import torch

    from genzoo.model import Density

    if not isinstance(model, Density):
        return
    x = torch.zeros(1, *model.shape, device=model.device, dtype=model.dtype)
    y = torch.zeros(1, device=model.device, dtype=torch.int64) if model.num_classes else None
    try:
        with torch.no_grad():
            rng = torch.Generator(model.device)
            copy.deepcopy(model).eval().log_prob(x, y, num_samples=settings["num_samples"], rng=rng)
    except REFUSALS as error:
        raise UsageError(f"metrics: {one_line(error)}") from error


def likelihood(model: Any, data: Any, settings: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
    """Score the log density of the test split, beside that of the law that made the data where it is known."""
    from genzoo.metrics.likelihood import mean_with_error, score_log_prob

    chosen = subset(len(data.test.x), settings["n"])
    x, y = data.test.x[chosen], None if data.test.y is None else data.test.y[chosen]
    name, result = score_log_prob(
        model,
        x,
        y,
        num_samples=settings["num_samples"],
        batch_size=settings["batch_size"],
        seed=setting["seed"],
        progress=lambda done: say(f"scoring {done}/{len(x)}"),
    )
    protocol = {
        "unit": "nats" if model.levels is None else "bits/dim",
        "bound": str(model.bound.name or model.bound),
        "split": "test",
        "split_sha256": hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest(),
        "n": result.n,
        "levels": model.levels,
        "dequantization": None if model.levels is None else "uniform, one draw",
    }
    draws = {"num_samples": settings["num_samples"]} if model.bound else {}
    metrics = {f"test/{name}": entry(result.value, result.stderr, "lower", protocol, {**setting, **draws})}
    if data.density is not None:
        truth = mean_with_error(-data.density.log_prob(x))
        protocol = {**protocol, "bound": "EXACT", "model": "the law that made the data"}
        metrics["test/nll_truth"] = entry(truth.value, truth.stderr, "lower", protocol, {})
    return metrics


def cost(model: Any, settings: dict[str, Any], setting: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
    """Measure what samples cost, and say what training did."""
    say("measuring the speed of sampling")
    speed, nfe = throughput(model, settings["throughput"])
    device = str(model.device)
    protocol = {"unit": "samples/s", "batch": settings["throughput"], "device": device, "nfe": nfe}
    metrics = {
        "sampling/samples_per_second": entry(speed, None, "higher", protocol, setting),
        "sampling/nfe": entry(nfe, None, "lower", {"unit": "evaluations"}, setting),
        "model/parameters": entry(sum(p.numel() for p in model.parameters()), None, "lower", {"unit": "weights"}, {}),
    }
    if status.get("train_seconds"):
        rate, protocol = status["images"] / status["train_seconds"], {"unit": "images/s", "device": device}
        metrics["train/images_per_second"] = entry(rate, None, "higher", protocol, setting)
    return metrics


def entry(value: float, stderr: float | None, better: str, protocol: dict[str, Any], setting: dict[str, Any]) -> dict:
    """Put a number together with how it was made."""
    return {
        "value": value,
        "stderr": stderr,
        "better": better,
        "card": {"protocol": protocol, "setting": setting},
    }


def subset(size: int, n: int | None) -> Any:
    """Choose ``n`` of ``size`` events, the same ones for every model: all, or a fixed draw in the order of the data."""
    import torch

    from genzoo.prob.random import generator

    if n is None or n >= size:
        return torch.arange(size)
    return torch.randperm(size, generator=generator("subset", size))[:n].sort().values


def throughput(model: Any, n: int) -> tuple[float, int]:
    """Return samples a second and evaluations a sample, after one warm-up where that costs less than a second."""
    import torch

    from genzoo.prob.random import SampleStreams

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


def say(text: str) -> None:
    """Show on the terminal what is being done; write nothing where there is no terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def show(result: dict[str, Any]) -> None:
    """Print the scores as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value", "± stderr", "unit", "how")
    for column in (1, 2):
        table.columns[column].justify = "right"
    for name, measured in result["metrics"].items():
        protocol, setting = measured["card"]["protocol"], measured["card"]["setting"]
        stderr = "" if measured["stderr"] is None else f"{measured['stderr']:.4f}"
        digits = f"{measured['value']:,.4f}" if isinstance(measured["value"], float) else f"{measured['value']:,}"
        how = {
            "bound": {"EXACT": "exact", "LOWER": "bound", "ESTIMATE": "estimate"}.get(protocol.get("bound")),
            "n": f"n={protocol['n']}" if "n" in protocol else None,
            "num_samples": f"k={setting['num_samples']}" if "num_samples" in setting else None,
            "nfe": f"nfe={protocol['nfe']}" if "nfe" in protocol else None,
            "device": protocol.get("device"),
            "weights": setting.get("weights"),
        }
        table.add_row(name, digits, stderr, protocol["unit"], ", ".join(v for v in how.values() if v))
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    console.print(table)
