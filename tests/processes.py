"""Fifty steps of every family in one, two and four processes that share each batch: ``python -m tests.processes``.

Every file of ``conf/model`` is trained in float32 by the trainer's own module with Adam, small, on points and on images, with
and without classes, and with options that draw noise elsewhere: dropout, transport, importance sampling. Batches, weights
and the seed are the same whatever the number of processes, so that all differences are those of the order in which float32
sums are taken. To show what another noise would do, ``by_rank`` also trains with noise that depends on the rank.

Figures go to ``experiments/reliability/processes.json``; ``python -m tests.processes table`` shows them.
"""

from __future__ import annotations

import copy
import datetime
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from genzoo.data.dataset import Split
from genzoo.data.loader import Batches
from genzoo.model import GenerativeModel, Loss
from genzoo.numerics import distributed
from genzoo.numerics.random import generator
from genzoo.training import module as training
from genzoo.training.budget import Budget
from genzoo.training.module import GenerativeModule

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "experiments" / "reliability" / "processes.json"
STEPS, BATCH, EXAMPLES, TIMEOUT = 50, 16, 200, 1200
DOUBLE, BY_RANK = "4, float64", "2, noise by rank"


def subjects(dtype: torch.dtype = torch.float32) -> dict[str, tuple[GenerativeModel, Batches]]:
    """Build every model and its data."""
    from tests.numerics.test_distributed import drop, options
    from tests.test_interface import batch, cases

    chosen = {name: case for name, (case, model) in cases().items() if isinstance(model, GenerativeModel)} | options()
    found = {}
    for name, case in chosen.items():
        model = (drop(case.fresh()) if name.endswith("dropout") else case.fresh()).to(dtype)
        x, y = batch(model, EXAMPLES)
        if model.levels is not None:
            x = torch.randint(model.levels, x.shape, generator=generator("levels"), dtype=torch.uint8)
        found[name] = model, Batches(Split(x, y), BATCH, seed=3)
    return found


def train(model: GenerativeModel, batches: Batches) -> dict[str, Any]:
    """Train one model by what this process has of each batch; return its losses and its weights."""
    batches.share(distributed.rank(), distributed.world_size())
    model = model.train()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    module = GenerativeModule(model, adam, batches, Budget(images=STEPS * BATCH), clip=1.0, seed=5)
    module.make_plan()
    losses: list[float] = []
    overflows = module._overflows

    def watch(loss: Loss, norm: torch.Tensor) -> bool:
        losses.append(float(loss.total.detach()))  # of the whole batch
        return overflows(loss, norm)

    module._overflows = watch  # type: ignore[method-assign]
    module.cost = lambda stage, turn: 0  # type: ignore[method-assign]  # FLOPs, which are counted on a copy
    while not module.finished:
        module.step()
    return {"losses": losses, "start": start, "weights": model.state_dict()}


def distance(one: dict[str, Any], many: dict[str, Any]) -> tuple[float, float]:
    """Return how far losses differ, relative to the largest, and weights, relative to how far they were moved."""
    a, b = (torch.tensor(run["losses"], dtype=torch.float64) for run in (one, many))
    names = [name for name, value in one["weights"].items() if value.is_floating_point()]
    moved = sum(float((one["weights"][n] - one["start"][n]).double().square().sum()) for n in names) ** 0.5
    apart = sum(float((one["weights"][n] - many["weights"][n]).double().square().sum()) for n in names) ** 0.5
    return float((a - b).abs().max() / a.abs().max()), apart / moved


def main(world: int, rank: int, folder: Path, by_rank: bool) -> None:
    """Train all subjects as one rank of ``world``."""
    torch.set_num_threads(1)
    if world > 1:
        wait = datetime.timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", f"file://{folder}/meeting", timeout=wait, rank=rank, world_size=world)
    if by_rank:
        training.batch_generator = lambda *name, device: generator(*name, distributed.rank(), device=device)
    given = torch.load(folder.parent / "subjects.pt", weights_only=False)
    found = {name: train(*copy.deepcopy(one)) for name, one in given.items()}
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        torch.save(found, folder / "found.pt")


def launch(world: int, folder: Path, by_rank: bool = False) -> dict[str, dict[str, Any]]:
    """Train all subjects in ``world`` processes."""
    folder.mkdir()
    command = [sys.executable, "-m", "tests.processes", "rank", str(world)]
    words = [str(folder), str(int(by_rank))]
    started = [subprocess.Popen([*command, str(rank), *words], cwd=ROOT) for rank in range(world)]
    try:
        codes = [process.wait(4 * TIMEOUT) for process in started]
    finally:
        for process in started:
            process.kill()
    if any(codes):
        raise RuntimeError(f"processes ended with {codes}")
    return torch.load(folder / "found.pt", weights_only=False)


Figures = dict[
    str, dict[str, list[float]]
]  # by model and kind of run: how far losses and weights are from one process's


def experiment() -> Figures:
    """Train all subjects in 1, 2 and 4 processes, and in 2 whose noise depends on the rank."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        torch.save(subjects(), folder / "subjects.pt")
        alone = launch(1, folder / "1")
        found = {"2": launch(2, folder / "2"), "4": launch(4, folder / "4")}
        found[BY_RANK] = launch(2, folder / "by_rank", by_rank=True)
    return {name: {key: list(distance(one, many[name])) for key, many in found.items()} for name, one in alone.items()}


def in_double(found: Figures) -> None:
    """Train those anew in float64 whose difference in float32 has grown: what is left shows if it began as rounding."""
    grown = [
        n for n, row in found.items() if max(row["2"][0], row["4"][0]) > 1e-5 or max(row["2"][1], row["4"][1]) > 1e-4
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        every = subjects(torch.float64)
        torch.save({name: every[name] for name in grown}, folder / "subjects.pt")
        alone, four = launch(1, folder / "1"), launch(4, folder / "4")
    for name in grown:
        found[name][DOUBLE] = list(distance(alone[name], four[name]))


def table(found: Figures) -> str:
    """Return the figures as Markdown."""
    keys = ["2", "4", DOUBLE, BY_RANK]
    lines = ["| model | " + " | ".join(f"{key}: losses | weights" for key in keys) + " |", "|---" * 9 + "|"]
    for name, row in found.items():
        cells = [cell for key in keys for cell in ([f"{value:.0e}" for value in row[key]] if key in row else ["", ""])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        main(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5] == "1")
    elif sys.argv[1:] == ["table"]:
        print(table(json.loads(OUT.read_text())))
    else:
        figures = json.loads(OUT.read_text()) if sys.argv[1:] == ["double"] else experiment()
        in_double(figures)
        OUT.write_text(json.dumps(figures, indent=1) + "\n")
        print(table(figures))
