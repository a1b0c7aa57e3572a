"""``python -m genzoo sample``: draw from a trained model into a picture, an array or a folder of pictures."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

from genzoo.commands.config import UsageError, pick_device


def sample(config: dict[str, Any]) -> None:
    """Draw samples as a validated configuration says; sample i is f(seed, i), whatever the batch size.

    Raises:
        ValueError: in one line, for what the user can mend.
    """
    import numpy as np
    import torch

    from genzoo.commands.load import load
    from genzoo.data.pictures import as_bytes, grid, save_png, save_scatter
    from genzoo.prob.random import SampleStreams
    from genzoo.runs import write_atomically

    out = Path(config["out"])
    check_out(out)
    model = load(
        config["run"],
        ema=config["ema"],
        device=pick_device(config["device"]),
        sampler=config.get("sampler"),
        trust=config["trust"],
    )
    if config["y"] is not None and not config["y"] < model.num_classes:
        have = f"classes 0..{model.num_classes - 1}" if model.num_classes else "no classes"
        raise UsageError(f"y={config['y']}: this model has {have}")
    if model.levels is None and not out.suffix:
        raise UsageError(f"out={out}: vectors go into a .png or an .npz")

    half = torch.autocast(model.device.type, torch.bfloat16, enabled=config["precision"] == "bf16-mixed")
    parts, nfe = [], 0
    for start in range(0, config["n"], config["batch_size"]):
        rows = range(start, min(start + config["batch_size"], config["n"]))
        y = None if config["y"] is None else torch.full((len(rows),), config["y"], device=model.device)
        with half:
            x, nfe, _ = model.sample(len(rows), y, rng=SampleStreams(config["seed"], rows, device=model.device))
        parts.append(x.cpu())
    x = torch.cat(parts)

    file = io.BytesIO()
    images = as_bytes(x.float(), model.levels) if model.levels is not None else None
    if out.suffix == ".npz":
        np.savez(file, samples=x.numpy() if images is None else images)  # (n, H, W, C) uint8, as evaluators take it
    elif images is None:
        save_scatter(file, x)
    elif out.suffix == ".png":
        save_png(file, grid(images))
    else:
        out.mkdir(exist_ok=True)
        for i, image in enumerate(images):
            save_png(out / f"{i:06d}.png", image)
    if out.suffix:
        write_atomically(out, file.getvalue())
    print(f"{config['n']} samples, {nfe} evaluations each: {out}")


def check_out(out: Path) -> None:
    """Refuse a place that cannot be written to, before anything is drawn.

    Raises:
        UsageError: saying what is wrong with it.
    """
    if out.suffix not in (".png", ".npz", ""):
        raise UsageError(f"out={out}: write a .png, an .npz, or a folder without a suffix")
    if not out.parent.is_dir():
        raise UsageError(f"out={out}: there is no directory {out.parent}")
    if out.exists() and out.is_dir() == bool(out.suffix):
        raise UsageError(f"out={out}: is a {'folder' if out.is_dir() else 'file'} already")
    try:
        tempfile.TemporaryFile(dir=out if out.is_dir() else out.parent).close()
    except OSError as error:
        raise UsageError(f"out={out}: cannot be written to: {error.strerror}") from error
