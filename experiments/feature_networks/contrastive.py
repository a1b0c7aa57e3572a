"""Train the packaged contrastive networks: `python experiments/feature_networks/contrastive.py [shapes] [emoji]`.

Each is trained on the training split alone; the accuracies of retrieval are those on the test split, whose captions describe
combinations that do not occur in training. The tokenizer is that of the data set as it is by default, so that the network is
also the encoder of ``model=unclip encoder=shipped``. Weights are kept in half precision.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from genzoo.data import DataSet
from genzoo.data.emoji import emoji
from genzoo.data.shapes import pictures, shapes
from genzoo.evaluation.contrastive import retrieval
from genzoo.evaluation.settings import EvalSettings
from genzoo.event import EventSpec
from genzoo.families.clip import Contrastive
from genzoo.metrics.clip_score import clip_score
from genzoo.metrics.features import CONTRASTIVE, EMBEDDED, EmbeddedContrastive
from genzoo.nn.resnet import ConvEncoder

SETTINGS = {
    "shapes": {
        "side": 32,
        "dim": 64,
        "text_width": 64,
        "image": {"width": 24, "max_width": 64, "blocks": 1, "norm": True, "hidden": 0},
        "pictures": 100_000,
        "batch": 1024,
        "steps": 500,
        "lr": 4e-3,
        "shift": 0,
    },
    "emoji": {
        "side": 32,
        "dim": 64,
        "text_width": 64,
        "image": {"width": 24, "max_width": 64, "blocks": 1, "norm": True, "hidden": 0},
        "batch": 512,
        "steps": 600,
        "lr": 4e-3,
        "shift": 3,
    },
}


def load(name: str, settings: dict) -> tuple[DataSet, Tensor, Tensor]:
    """Return the data set, and training pictures with their tokens: of shapes more than there are by default."""
    if name == "emoji":
        data = emoji(size=settings["side"])
        assert data.train.y is not None
        return data, data.train.x, data.train.y
    data = shapes(settings["side"])
    assert data.tokenizer is not None
    more = pictures(settings["pictures"], settings["side"])
    return data, more.x, data.tokenizer.encode(more.captions, truncate=True)


def shifted(x: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Move each picture by up to a number of pixels in each direction; its border is repeated."""
    padded, side = F.pad(x, [pixels] * 4, mode="replicate"), x.shape[-1]
    rows, columns = torch.randint(2 * pixels + 1, (2, len(x), 1), generator=generator) + torch.arange(side)
    images, channels = torch.arange(len(x))[:, None, None, None], torch.arange(x.shape[1])[None, :, None, None]
    return padded[images, channels, rows[:, None, :, None], columns[:, None, None, :]]


def train(data: DataSet, x: Tensor, y: Tensor, settings: dict) -> Contrastive:
    """Train a network for a number of steps of AdamW, with a cosine schedule."""
    torch.manual_seed(0)
    model = Contrastive(
        EventSpec(data.shape, 256),
        data.condition,
        network=functools.partial(ConvEncoder, **settings["image"]),
        dim=settings["dim"],
        text_width=settings["text_width"],
    )
    steps, batch, start = settings["steps"], settings["batch"], time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randperm(len(x)) for _ in range(-(-steps * batch // len(x)))])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        some = rows[step * batch : (step + 1) * batch]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(shifted((x[some].float() + 0.5) / 128 - 1, settings["shift"], generator), y[some])
        optimizer.zero_grad()
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.after_step({}, batch)
        if step % 50 == 49:
            print(f"step {step + 1}, loss {loss.total.item():.4f}, {time.process_time() - start:.0f} s", flush=True)
    return model.eval()


def main() -> None:
    """Train the networks named on the command line, or all."""
    card = EMBEDDED / "networks.json"
    for data_name in sys.argv[1:] or SETTINGS:
        settings, name = SETTINGS[data_name], f"{CONTRASTIVE}{data_name}"
        data, x, y = load(data_name, settings)
        tokenizer = data.tokenizer
        assert tokenizer is not None
        start = time.process_time()
        model = train(data, x, y, settings)
        seconds = time.process_time() - start
        weights = {key: value.half().contiguous() for key, value in model.encoders.state_dict().items()}
        save_file(weights, EMBEDDED / f"{name}.safetensors")
        (EMBEDDED / f"{name}.tokenizer.json").write_text(tokenizer.to_json())
        content = (EMBEDDED / f"{name}.safetensors").read_bytes()
        known = json.loads(card.read_text())
        known[name] = {
            **{key: settings[key] for key in ("side", "dim", "text_width", "image")},
            "length": tokenizer.length,
            "vocabulary": tokenizer.vocabulary,
            "sha256": hashlib.sha256(content).hexdigest(),
            "tokenizer_sha256": tokenizer.sha256,
            "bytes": len(content),
            "weights": sum(value.numel() for value in weights.values()),
        }
        card.write_text(json.dumps(known, indent=1) + "\n")

        packaged = EmbeddedContrastive(name)
        model.encoders.load_state_dict(packaged.network.state_dict())
        found = retrieval(model, data, EvalSettings(events=None), {"seed": 0})
        of_test = clip_score(data.test.x, tokenizer.decode(data.test.y), packaged)
        protocol = found["retrieval/image_to_text"]["card"]["protocol"]
        known[name] |= {
            "test_image_to_text": round(found["retrieval/image_to_text"]["value"], 4),
            "test_text_to_image": round(found["retrieval/text_to_image"]["value"], 4),
            "candidates": protocol["candidates"],
            "test_pairs": protocol["n"],
            "test_clip_score": round(float(of_test.mean()), 4),
            "cpu_seconds": round(seconds),
            "pictures": len(x),
            **{key: settings[key] for key in ("batch", "steps", "lr", "shift")},
        }
        card.write_text(json.dumps(known, indent=1) + "\n")
        print(name, known[name])


if __name__ == "__main__":
    main()
