"""What a training step of the DDPM U-Net costs a GPU, on paper: `python experiments/benchmarks/roofline.py`.

Counts, without computing anything, the operations and the bytes of one image through the network of ``experiment=ddpm_cifar10``
under bfloat16 autocast: every operator's inputs and outputs as they would be read and written, and of these what would be left
if element-wise work were fused into the convolutions, matrix products and normalisations beside it.

Autocast on CUDA runs convolutions and products in bfloat16 and group norm in float32, whose float32 output the element-wise
operators that follow inherit; each weight is cast once a step. The count runs on fake CPU tensors, where autocast has no
float32 policy for group norm: ``CUDAPolicy`` adds it.

References:
    PyTorch, "Automatic Mixed Precision package", https://docs.pytorch.org/docs/stable/amp.html ("CUDA Op-Specific Behavior").
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genzoo.config.compose import preflight
from genzoo.config.instantiate import build
from genzoo.jobs.building import describe_model
from genzoo.training.flops import count

BATCH = 128
PEAK, BANDWIDTH = 989e12, 3.35e12  # of an H100 SXM: dense bfloat16 FLOP/s, bytes/s (NVIDIA's data sheet)
HELD = ("convolution", "mm", "attention", "norm")  # operators whose inputs and outputs no compiler keeps in registers


class CUDAPolicy(TorchFunctionMode):
    """Gives group norm the float32 that CUDA's autocast gives it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.group_norm:
            return func(*args, **(kwargs or {}))
        x, groups, *weights = args
        with torch.autocast("cpu", enabled=False):
            return func(x.float(), groups, *weights, **(kwargs or {}))


def autocast() -> torch.autocast:
    """The trainer's autocast: casts of weights are not cached between steps."""
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


class Bytes(TorchDispatchMode):
    """Counts the bytes that operators read and write; views, allocations and queries of metadata move none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and "empty" not in func.__name__:
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
        """Bytes of the operators that no compiler fuses away."""
        return sum(n for name, n in self.found.items() if any(part in name for part in HELD))


def main() -> None:
    """Print the figures, and what they mean on one H100."""
    config = preflight("train", ["experiment=ddpm_cifar10"])[0]
    describe_model(config, build)
    network = build(config["model"], "model").network
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for module in network.modules():
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(fake.from_tensor(weight.detach())))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, fake.from_tensor(buffer))
        report(network)


def report(network: torch.nn.Module) -> None:
    """Count an evaluation and a training step of fake weights, and print what follows on one H100."""
    x, t = torch.zeros(BATCH, 3, 32, 32), torch.zeros(BATCH)

    def evaluate() -> None:
        network.eval()
        with torch.no_grad(), autocast(), CUDAPolicy():
            network(x, t)

    def train() -> None:
        network.train()
        with autocast(), CUDAPolicy():
            loss = network(x, t).float().square().mean()
        loss.backward()

    print(
        f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}M parameters, batches of {BATCH}, bfloat16 autocast"
    )
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
