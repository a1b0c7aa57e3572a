"""``python -m genzoo sample``: draw samples of a run into a PNG, an .npz or a folder of PNGs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genzoo.cli.output import check_format, check_out, write_samples
from genzoo.cli.trained import captions_of, chosen_conditions, open_model
from genzoo.jobs.resources import resources

SAMPLES, PER_CLASS = 64, 8  # default numbers: in all, and of each of several classes or texts


def sample(config: dict[str, Any]) -> None:
    """Draw samples by a validated configuration; sample i is f(seed, i), independent of the batch size.

    Raises:
        ValueError: with a one-line message, for invalid input.
        ResourceError: if memory or disk are full.
    """
    with resources(Path(config["out"]), config["batch_size"], "batch_size"):
        _sample(config)


def _sample(config: dict[str, Any]) -> None:
    import torch

    from genzoo.loading import reranked
    from genzoo.numerics.precision import full_float32
    from genzoo.numerics.random import SampleStreams
    from genzoo.runs import Run
    from genzoo.training.compilation import compile_networks

    out = Path(config["out"])
    check_out(out)
    model = open_model(config)
    model = reranked(model, config["ranker"], config["candidates"], Run(config["run"]))
    check_format(out, model.event)
    chosen = chosen_conditions(config, model)
    several = chosen is not None and len(chosen.y) > 1
    each = config["n"] or (PER_CLASS if several else SAMPLES)
    n = each * (len(chosen.y) if chosen else 1)
    y = None if chosen is None else chosen.y.to(model.device).repeat_interleave(each, dim=0)

    if config["compile"]:
        compile_networks(model, dynamic=False)
    half = torch.autocast(model.device.type, torch.bfloat16, enabled=config["precision"] == "bf16-mixed")
    parts, labels, nfe = [], [], 0
    for start in range(0, n, config["batch_size"]):
        rows = range(start, min(start + config["batch_size"], n))
        rng = SampleStreams(config["seed"], rows, device=model.device)
        with half, full_float32():
            drawn = model.conditioner.draw(len(rows), None if y is None else y[rows.start : rows.stop], rng)
            x, evaluations, _ = model.sample(len(rows), drawn, rng=rng)
        nfe = max(nfe, evaluations)
        parts.append(x.cpu())
        labels += [] if drawn is None else [drawn.cpu()]
    conditions = torch.cat(labels) if labels else None
    captions = captions_of(Path(config["run"]), model, conditions)
    write_samples(out, torch.cat(parts), model.levels, conditions, each if several else None, captions)
    print(f"{n} samples, {nfe} evaluations each: {out}")
