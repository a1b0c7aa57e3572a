"""``python -m genzoo sample``: draw samples of a run into a PNG, an .npz or a folder of PNGs."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from genzoo.devices import pick_device
from genzoo.environment import usable_cores
from genzoo.errors import UsageError
from genzoo.jobs.resources import resources

SAMPLE_NAME = re.compile(r"\d{6,}\.png")  # in a folder of samples


def sample(config: dict[str, Any]) -> None:
    """Draw samples by a validated configuration; sample i is f(seed, i), independent of the batch size.

    Raises:
        ValueError: with a one-line message, for invalid input.
        ResourceError: if memory or disk are full.
    """
    with resources(Path(config["out"]), config["batch_size"], "batch_size"):
        _sample(config)


def _sample(config: dict[str, Any]) -> None:
    import numpy as np
    import torch

    from genzoo.conditions import ClassLabels
    from genzoo.data.pictures import CHANNELS, as_bytes, grid, save_png, save_scatter
    from genzoo.labels import class_names, class_number
    from genzoo.loading import load
    from genzoo.numerics.precision import full_float32
    from genzoo.numerics.random import SampleStreams
    from genzoo.runs import write_atomically
    from genzoo.training.compilation import compile_networks

    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))  # OpenMP ignores CPU quotas of containers
    out = Path(config["out"])
    check_out(out)
    model = load(
        config["run"],
        ema=config["ema"],
        device=pick_device(config["device"]),
        sampler=config.get("sampler"),
        trust=config["trust"],
    )
    label = None
    if config["label"] is not None:
        classes = model.condition.n if isinstance(model.condition, ClassLabels) else 0
        label = class_number(config["label"], classes, class_names(config["run"]))
        if model.conditioner.probs[label] == 0:
            raise UsageError(f"label={config['label']}: no training image has this class")
    if model.levels is not None and out.suffix != ".npz" and model.shape[0] not in CHANNELS:
        raise UsageError(f"out={out}: images of {model.shape[0]} channels need an .npz; a PNG has 1 or 3")
    if model.levels is None and not out.suffix:
        raise UsageError(f"out={out}: vectors need a .png or an .npz")

    if config["compile"]:
        compile_networks(model, dynamic=False)
    half = torch.autocast(model.device.type, torch.bfloat16, enabled=config["precision"] == "bf16-mixed")
    parts, nfe = [], 0
    for start in range(0, config["n"], config["batch_size"]):
        rows = range(start, min(start + config["batch_size"], config["n"]))
        y = None if label is None else torch.full((len(rows),), label, device=model.device)
        with half, full_float32():
            x, nfe, _ = model.sample(len(rows), y, rng=SampleStreams(config["seed"], rows, device=model.device))
        parts.append(x.cpu())
    x = torch.cat(parts)

    file = io.BytesIO()
    images = as_bytes(x.float(), model.levels) if model.levels is not None else None
    if out.suffix == ".npz":
        np.savez(file, samples=x.numpy() if images is None else images)  # images (n, H, W, C) uint8
    elif images is None:
        save_scatter(file, x)
    elif out.suffix == ".png":
        save_png(file, grid(images))
    else:
        out.mkdir(exist_ok=True)
        for path in older_samples(out):
            path.unlink()
        for i, image in enumerate(images):
            file = io.BytesIO()
            save_png(file, image, marked=True)
            write_atomically(out / f"{i:06d}.png", file.getvalue(), durable=False)
    if out.suffix:
        write_atomically(out, file.getvalue())
    print(f"{config['n']} samples, {nfe} evaluations each: {out}")


def check_out(out: Path) -> None:
    """Check that the output can be written.

    Raises:
        ValueError: naming the cause.
    """
    from genzoo.runs import check_writable

    if out.suffix not in (".png", ".npz", ""):
        raise UsageError(f"out={out}: must be a .png, an .npz, or a folder without a suffix")
    if not out.parent.is_dir():
        raise UsageError(f"out={out}: there is no directory {out.parent}")
    if out.exists() and out.is_dir() == bool(out.suffix):
        raise UsageError(f"out={out}: is an existing {'folder' if out.is_dir() else 'file'}")
    if out.is_dir():
        older_samples(out)
    check_writable(out if out.is_dir() else out.parent, f"out={out}")


def older_samples(out: Path) -> list[Path]:
    """List the samples of an earlier call in a folder, which will be replaced; hidden files are ignored.

    Raises:
        UsageError: if the folder contains any other file.
    """
    from genzoo.data.pictures import is_marked

    found = sorted(path for path in out.iterdir() if not path.name.startswith("."))
    others = [path.name for path in found if not (SAMPLE_NAME.fullmatch(path.name) and is_marked(path))]
    if others:
        raise UsageError(
            f"out={out}: contains files not written by genzoo sample, such as {others[0]} ({len(others)} in total): "
            "choose a new or an empty folder"
        )
    return found
