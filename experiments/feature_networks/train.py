"""Train the feature networks that travel with genzoo: `python experiments/feature_networks/train.py [name ...]`.

Each is a classifier trained on the training split alone; its accuracy is that on the test split. What it sees are the bytes of
a picture file, so digits with their 17 levels are stretched first. Half of the images are mirrored where the generative models
see mirror images too, and all are moved by a few pixels.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from genzoo.data import digits, fashion_mnist
from genzoo.distributions.discretization import bin_center, to_bytes
from genzoo.metrics.features import EMBEDDED, Embedded, SmallConvNet

SETTINGS = {
    "digits": {"side": 8, "width": 48, "dim": 64, "epochs": 60, "batch": 64, "flip": False, "shift": 1, "lr": 5e-3},
    "fashion_mnist": {
        "side": 28,
        "width": 32,
        "dim": 64,
        "epochs": 6,
        "batch": 128,
        "flip": True,
        "shift": 2,
        "lr": 5e-3,
    },
}


def as_bytes(x: Tensor, levels: int) -> Tensor:
    """Turn the integers of a data set into bytes of a picture file."""
    return to_bytes(bin_center(x, levels, torch.float64), levels)


def augmented(x: Tensor, shift: int, flip: bool) -> Tensor:
    """Move a batch of bytes by up to ``shift`` pixels, and mirror half of it."""
    side = x.shape[-1]
    x = F.pad(x.float() / 127.5 - 1, [shift] * 4, value=-1.0)
    rows, columns = torch.randint(0, 2 * shift + 1, (2,)).tolist()
    x = x[..., rows : rows + side, columns : columns + side]
    mirrored = (torch.rand(len(x), 1, 1, 1) < 0.5) & torch.tensor(flip)
    return torch.where(mirrored, x.flip(-1), x)


def main() -> None:
    """Train the networks named on the command line, or all."""
    card = EMBEDDED / "networks.json"
    known = json.loads(card.read_text()) if card.is_file() else {}
    for name in sys.argv[1:] or SETTINGS:
        settings = SETTINGS[name]
        data = digits() if name == "digits" else fashion_mnist("data", download=False)
        x, y = as_bytes(data.train.x, data.levels), data.train.y
        torch.manual_seed(0)
        shape = {
            "side": settings["side"],
            "num_classes": data.num_classes,
            "width": settings["width"],
            "dim": settings["dim"],
        }
        net = SmallConvNet(**shape)
        start, batch = time.process_time(), settings["batch"]
        steps = settings["epochs"] * (len(x) // batch)
        optimizer = torch.optim.AdamW(net.parameters(), lr=settings["lr"], weight_decay=0.05, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings["lr"], total_steps=steps)
        for epoch in range(settings["epochs"]):
            for rows in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=name != "digits"):
                    logits = net(augmented(x[rows], settings["shift"], settings["flip"]))[1]
                loss = F.cross_entropy(logits.float(), y[rows], label_smoothing=0.1)
                loss.backward()
                optimizer.step()
                schedule.step()
            print(f"{name}: epoch {epoch + 1}, loss {loss.item():.3f}, {time.process_time() - start:.0f} s", flush=True)
        net.eval()
        EMBEDDED.mkdir(exist_ok=True)
        path = EMBEDDED / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)
        known[name] = {**shape, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        card.write_text(json.dumps(known, indent=1) + "\n")
        logits = Embedded(name).extract(as_bytes(data.test.x, data.levels)).logits
        known[name] |= {
            "test_accuracy": round(float((logits.argmax(1) == data.test.y).double().mean()), 4),
            "bytes": path.stat().st_size,
            "weights": sum(p.numel() for p in net.parameters()),
            "cpu_seconds": round(time.process_time() - start),
            **settings,
        }
        card.write_text(json.dumps(known, indent=1) + "\n")
        print(name, known[name])


if __name__ == "__main__":
    main()
