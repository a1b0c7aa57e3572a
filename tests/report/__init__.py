"""Runs as training leaves them, made in a moment and without torch."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

from genzoo.runs import Run

# One white pixel.
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAG7buVgAAAABJRU5ErkJggg==")


def entry(
    value: float | None,
    stderr: float | None = None,
    better: str = "lower",
    protocol: dict[str, Any] | None = None,
    setting: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One score with its card."""
    card = {"protocol": protocol or {"unit": "squared distance", "n_fake": 1000}, "setting": setting or {}}
    return {"value": value, "stderr": stderr, "better": better, "card": card}


def scored(fd: float | None, seed: int = 0, **more: Any) -> dict[str, Any]:
    """The scores of one run: a distance, what it cost, and others by their names with "__" for "/"."""
    setting = {"weights": "ema", "train_seed": seed, "seed": 0, "step": 10 + seed, "images_seen": 640}
    metrics = {
        "test/fd_digits": entry(fd, 0.5, setting=setting),
        "sampling/nfe": entry(50, protocol={"unit": "evaluations"}, setting=setting),
        "sampling/samples_per_second": entry(
            100.0 + seed, better="higher", protocol={"unit": "samples/s", "device": "cpu"}, setting=setting
        ),
        "training/images": entry(640, protocol={"unit": "images"}),
        "training/seconds": entry(30.0, protocol={"unit": "s"}),
        "training/flops": entry(10**12, protocol={"unit": "FLOPs"}),
        "model/parameters": entry(1234, protocol={"unit": "weights"}),
    }
    return metrics | {name.replace("__", "/"): value for name, value in more.items()}


def run(
    root: Path,
    model: str = "vae",
    seed: int = 0,
    metrics: dict[str, Any] | None = None,
    data: str = "digits",
    state: str = "done",
    why: str | None = None,
    name: str | None = None,
    config: dict[str, Any] | None = None,
    events: int = 5,
    **status: Any,
) -> Run:
    """Make a run directory."""
    whole = {
        "model": {"_target_": f"genzoo.families.{model}", "shape": [1, 8, 8]},
        "data": {"name": data},
        "budget": {"images": None, "seconds": 30.0, "flops": None, "samples": 1000},
        "trainer": {"batch_size": 64, "grids": 4},
        "seed": seed,
        "outputs": str(root),
        **(config or {}),
    }
    made = Run.create(root, name or f"{model}-{data}", whole, job=f"{model}-{seed}")
    diagnostics = {"train/perplexity": {"label": "code perplexity", "unit": "codes", "better": "higher"}}
    made.update_status(state=state, why=why, model=model, threads=1, diagnostics=diagnostics, **status)
    for i in range(events):
        at = {"step": i, "images": 64 * (i + 1), "seconds": float(i), "flops": 10.0**9 * i}
        values = {"train/loss": math.exp(-i) + seed, "train/perplexity": 10.0 + i}
        made.log(event="train", stage="train", **at, values=values)
    made.log(event="interim", step=3, images=200, seconds=3.0, flops=1.0, values={"test/fd_digits": 30.0})
    (made.path / "samples.png").write_bytes(PNG)
    if metrics:
        made.write_result({"scored": f"2026-01-01T00:00:0{seed % 10}", "metrics": metrics, "warnings": []})
    return made
