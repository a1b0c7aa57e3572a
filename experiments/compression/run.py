"""Compress the digits test split by five families: sizes of files beside the bits/dim of the same models.

    python experiments/compression/run.py [--outputs outputs/compression] [--seconds 60]

Trains each family (finished runs in ``--outputs`` are used again), compresses the 360 test images of digits, decompresses the
file, compares every pixel, and writes results.json and the table of README.md beside this script.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch

import genzoo
from genzoo.compression.container import Container
from genzoo.data import digits
from genzoo.distributions.discretization import bin_center, bits_per_dim, quantize
from genzoo.model import Density
from genzoo.numerics.random import generator

HERE = Path(__file__).parent
# Family, overrides, code, draws of the bound, and draws per example of each: all terms of the bound of ddpm, twice.
FAMILIES: dict[str, tuple[list[str], str, int, int]] = {
    "autoregressive": ([], "arithmetic", 1, 1),
    "masked_diffusion": ([], "arithmetic, random order", 4, 20),
    "vae": ([], "bits back", 8, 1),
    "hvae": ([], "bits back", 8, 1),
    "ddpm": (["model.schedule.num_steps=100"], "bits back, a chain of 100 steps", 1, 200),
}


def trained(family: str, overrides: list[str], outputs: Path, seconds: float) -> Path:
    """Return the finished run of a family, trained if there is none."""
    for status in sorted((outputs / family).glob("*/*/status.json")):
        if json.loads(status.read_text())["state"] == "done":
            return status.parent
    own = [*overrides, "trainer.threads=1", "metrics.n=0"]
    return genzoo.train(family, "digits", budget={"seconds": seconds}, outputs=outputs / family, overrides=own).path


@torch.no_grad()
def bound(model: Density, x: torch.Tensor, draws: int, num_samples: int) -> float:
    """Return the mean bits/dim of the density or its bound, as on the card of the model."""
    rng = generator("bound")
    log_p = [model.log_prob(x, num_samples=num_samples, rng=rng).value.double() for _ in range(draws)]
    assert model.levels is not None
    return float(bits_per_dim(torch.stack(log_p), model.dim, model.levels).mean())


def measure(run: Path, draws: int, num_samples: int) -> dict[str, object]:
    """Compress the test split by a run, and restore it."""
    model = genzoo.load(run, device="cpu")
    assert isinstance(model, Density)
    k = digits().test.x.long()
    x = bin_center(k, 17)
    begun = time.perf_counter()
    made = genzoo.compress(model, x)
    compressed = time.perf_counter()
    found = genzoo.decompress(model, made.data)
    restored = time.perf_counter()
    words = 4 * len(Container.from_bytes(made.data, "data").words)
    return {
        "images": len(x),
        "bits_per_dim": bound(model, x, draws, num_samples),
        "bytes": len(made.data),
        "file_bits_per_dim": made.bits_per_dim,
        "header_bytes": len(made.data) - words,
        "initial_bytes": made.initial_bits // 8,
        "lossless": bool(torch.equal(quantize(found.x, 17), k)),
        "compress_seconds": compressed - begun,
        "decompress_seconds": restored - compressed,
        "trained_images": json.loads((run / "status.json").read_text())["images"],
    }


def table(results: dict[str, dict]) -> str:
    """Return the table of README.md."""
    lines = [
        "| `model=` | code | bits/dim of the model | file, bits/dim | file, bytes | over | header | first event |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family, r in results.items():
        over = r["file_bits_per_dim"] / r["bits_per_dim"] - 1
        lines.append(
            f"| `{family}` | {FAMILIES[family][1]} | {r['bits_per_dim']:.4f} | {r['file_bits_per_dim']:.4f} | {r['bytes']:,} | "
            f"{100 * over:+.2f} % | {r['header_bytes']} | {r['initial_bytes']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train, compress, restore, and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--outputs", type=Path, default=Path("outputs/compression"))
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = HERE / "results.json"
    results: dict[str, dict] = {}
    for family, (overrides, _, draws, num_samples) in FAMILIES.items():
        results[family] = measure(trained(family, overrides, options.outputs, options.seconds), draws, num_samples)
        print(family, results[family], flush=True)
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
        path.write_text(json.dumps({"seconds": options.seconds, **machine, "families": results}, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
