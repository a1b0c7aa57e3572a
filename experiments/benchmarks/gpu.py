"""The DDPM U-Net of 35.7M weights on a GPU: `python experiments/benchmarks/run.py gpu`; see gpu.md for what to expect.

The step is that of the trainer with ``experiment=ddpm_cifar10 trainer=gpu``, on random bytes of CIFAR-10's shape: bfloat16,
networks compiled into graphs, images pixel by pixel, data on the device. Before it is timed one step is done in which any
wait for the device is an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from run import Pair

from genzoo.config.compose import preflight
from genzoo.config.instantiate import build
from genzoo.data.dataset import Split
from genzoo.data.loader import Batches
from genzoo.jobs.building import describe_model
from genzoo.training.budget import Budget
from genzoo.training.compilation import compile_networks
from genzoo.training.module import GenerativeModule

BATCH, STEPS = 512, 30
ACCEPTED, AIM, EVALUATIONS = 4_000, 7_500, 16_000  # images a second on one H100


def module(words: list[str]) -> GenerativeModule:
    """Put the trainer's module on the GPU."""
    config = preflight("train", ["experiment=ddpm_cifar10", *words])[0]
    describe_model(config, build)
    settings = config["trainer"]
    model = build(config["model"], "model").cuda()
    if settings["channels_last"]:
        model.to(memory_format=torch.channels_last)
    images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8)
    batches = Batches(Split(images, None), BATCH, seed=0, flip=True, device="cuda")
    optimizer, budget = build(config["optimizer"], "optimizer"), Budget(images=10**9)
    made = GenerativeModule(
        model,
        optimizer,
        batches,
        budget,
        ema_half_life=settings["ema_half_life"],
        clip=settings["clip"],
        compiled=settings["compile"],
        channels_last=settings["channels_last"],
    )
    if made.compiled:
        compile_networks(model, mode="reduce-overhead", dynamic=False)
    made.make_plan()
    return made


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    """Return what does some work often and says how many seconds an image took."""

    def go() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / (STEPS * BATCH)

    return go


def half() -> torch.autocast:
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)


def training() -> Callable[[], float]:
    """Train as ``trainer=gpu`` does."""
    made = module(["trainer=gpu"])

    def step() -> None:
        with half():
            made.step()

    for _ in range(5):  # which compile, and fill graphs
        step()
    torch.cuda.set_sync_debug_mode("error")
    step()
    torch.cuda.set_sync_debug_mode("default")
    return timed(step)


def eager() -> Callable[[], float]:
    """Train in float32 without any of it."""
    return timed(module(["trainer.precision=32-true"]).step)


def evaluating() -> Callable[[], float]:
    """Evaluate the network as ``sample compile=true precision=bf16-mixed`` does."""
    network = module(["trainer=gpu"]).model.network.eval()
    x = torch.randn(BATCH, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    t = torch.full((BATCH,), 0.5, device="cuda")

    def work() -> None:
        with torch.no_grad(), half():
            network(x, t)

    work()
    return timed(work)


def rate(images: float) -> Callable[[], Callable[[], float]]:
    """Stand for a speed that is written down, in images a second."""
    return lambda: lambda: 1 / images


def pairs() -> Iterator[Pair]:
    """Training and evaluation beside what is expected of them, and training beside itself without trainer=gpu."""
    if not torch.cuda.is_available():
        raise SystemExit("gpu: torch finds no CUDA device on this machine")
    name = f"DDPM U-Net of 35.7M weights, {torch.cuda.get_device_name()}"
    step, evaluation = f"training step, {name}", f"evaluation, {name}"
    yield Pair(step, "4,000 images/s", training, rate(ACCEPTED), 1.0, "best", measure="returned")
    yield Pair(step, "7,500 images/s", training, rate(AIM), 1.0, "best", measure="returned")
    yield Pair(step, "float32, as it is written", training, eager, 3.0, "best", measure="returned")
    yield Pair(evaluation, "16,000 images/s", evaluating, rate(EVALUATIONS), 1.0, "best", measure="returned")
