"""What a training step of the DDPM U-Net costs a GPU, on paper: `python experiments/benchmarks/roofline.py`.

Counts, without computing anything, the operations and the bytes of one image through the network of ``experiment=ddpm_cifar10``
in bfloat16: every operator's inputs and outputs as they would be read and written, and of these what would be left if work on
single elements were fused into the convolutions, products and norms beside it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genzoo.commands.config import build, preflight
from genzoo.training.flops import count

BATCH = 128
PEAK, BANDWIDTH = 989e12, 3.35e12  # of an H100 SXM: dense bfloat16 FLOP/s, bytes/s (NVIDIA's data sheet)
HELD = ("convolution", "mm", "attention", "norm")  # operators whose inputs and outputs no compiler keeps in registers


class Bytes(TorchDispatchMode):
    """Counts the bytes that operators read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operators += 1
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.found[func.__name__.partition(".")[0]] += sum(tensor.nbytes for tensor in tensors)
        return result

    @property
    def all(self) -> int:
        """Bytes of every operator by itself."""
        return self.found.total()

    @property
    def fused(self) -> int:
        """Bytes of the operators that hold their ground."""
        return sum(n for name, n in self.found.items() if any(part in name for part in HELD))


def main() -> None:
    """Print the figures, and what they mean on one H100."""
    config = preflight("train", ["experiment=ddpm_cifar10"])[0]
    network = build(config["model"], "model").network.to(torch.bfloat16).to("meta")
    x, t = torch.zeros(BATCH, 3, 32, 32, dtype=torch.bfloat16, device="meta"), torch.zeros(BATCH, device="meta")

    def evaluate() -> None:
        with torch.no_grad():
            network(x, t)

    def train() -> None:
        network(x, t).float().square().mean().backward()

    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}M parameters, batches of {BATCH}, bfloat16")
    for name, work in (("evaluation", evaluate), ("training", train)):
        flops = count(work) / BATCH
        with Bytes() as moved:
            work()
        every, fused = moved.all / BATCH, moved.fused / BATCH
        print(f"{name}, {moved.operators:,} operators: {flops / 1e9:.1f} GFLOP,", end=" ")
        print(f"{every / 1e6:.0f} MB as it stands, {fused / 1e6:.0f} MB fused, an image")
        print(
            f"  compute alone {PEAK / flops:,.0f} images/s; memory alone {BANDWIDTH / every:,.0f} as it stands,",
            end=" ",
        )
        print(f"{BANDWIDTH / fused:,.0f} fused")
        for utilisation in (0.25, 0.4, 0.5):
            compute = utilisation * PEAK / flops
            print(f"  at {utilisation:.0%} of the peak: {min(compute, BANDWIDTH / fused):,.0f} images/s")


if __name__ == "__main__":
    main()
