"""Profile a training step of every family: `python experiments/benchmarks/profiles.py [family ...]`.

Writes ``profiles/<family>.txt``: where the time of a step goes as torch's profiler sees it, for the default setting of the
family on scikit-learn's digits, on one thread and in float32. Of an adversarial family that is one round of all turns, of a
family in stages a step of each. Times are the operators' own; what is left of the clock is Python's.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from genzoo.config.compose import preflight
from genzoo.jobs.train import prepare

HERE = Path(__file__).parent / "profiles"
FAMILIES = (
    "autoregressive",
    "ddpm",
    "flow_matching",
    "gan",
    "glow",
    "hvae",
    "latent",
    "realnvp",
    "score_sde",
    "vae",
    "vqvae",
    "wgan",
    "wgan_gp",
)
# Kinds of operators by parts of their names, the first that fits; whatever is left is work on single elements.
KINDS = {
    "optimiser and averages": ("adam", "_foreach_", "rmsprop"),
    "convolutions": ("conv",),
    "matrix products": ("addmm", "aten::mm", "bmm", "linear", "aten::dot", "scaled_dot_product"),
    "norms": ("_norm",),
    "random numbers": ("rand", "normal_", "uniform_", "bernoulli", "exponential_"),
    "copies": ("copy_", "aten::cat", "index", "gather", "stack", "contiguous", "clone", "zero_", "fill_"),
}
STEPS = 10


def kind_of(operator: str) -> str:
    """Name the kind of an operator."""
    names = (kind for kind, parts in KINDS.items() if any(part in operator.lower() for part in parts))
    return next(names, "single elements")


def profiled(module: Any, rounds: int) -> tuple[profile, float]:
    """Profile some steps after some that warm up; return their profile and seconds."""
    for _ in range(rounds):
        module.step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        for _ in range(rounds):
            module.step()
        seconds = time.perf_counter() - start
    return found, seconds


def of_family(family: str) -> str:
    """Profile each stage of a family, and say first what holds it."""
    words = [f"model={family}", "data=digits", "budget.images=100000", "trainer.threads=1"]
    config = preflight("train", [*words, "trainer.precision=32-true"])[0]
    module = prepare(config, None, []).module
    module.make_plan()
    texts = [f"python experiments/benchmarks/profiles.py {family}    # {' '.join(words)}"]
    for stage, begins in zip(module.stages, [0, *module.plan.boundaries], strict=True):
        module.progress.steps = begins
        turns = getattr(stage.module, "n_critic", 0) + 1
        rounds = max(STEPS // turns, 1) * turns
        found, seconds = profiled(module, rounds)
        events = found.key_averages()
        kinds: dict[str, float] = {}
        for event in events:
            kinds[kind_of(event.key)] = kinds.get(kind_of(event.key), 0.0) + event.self_cpu_time_total / 1e6
        kinds["Python"] = max(seconds - sum(kinds.values()), 0.0)
        shares = sorted(kinds.items(), key=lambda item: -item[1])
        held = ", ".join(f"{name} {100 * spent / seconds:.0f} %" for name, spent in shares if spent > 0.015 * seconds)
        table = events.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=48)
        batch = module.batches.batch_size
        texts.append(
            f"{stage.name}: {1e3 * seconds / rounds:.1f} ms a step of {batch} images, held by {held}\n\n{table}"
        )
    return "\n\n".join(texts)


def main() -> None:
    """Profile the families that are named, or all."""
    HERE.mkdir(exist_ok=True)
    for family in sys.argv[1:] or FAMILIES:
        text = of_family(family)
        (HERE / f"{family}.txt").write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")
        print(*(f"{family}, {line}" for line in text.splitlines() if " held by " in line), sep="\n", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
