"""How cost grows: `python experiments/benchmarks/growth.py [curve ...]`; with `draw`, only the picture.

Each point is a process of its own, which prints processor seconds and the peak of its memory above what it held before the
work. Points of a curve are fitted by ``cost = a x^k`` over its upper half: k is 1 where cost is linear. Figures go into
``growth.json``, and ``growth.png`` shows them. Needs /usr/share/datasets/fashion-mnist for `evaluation`.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from run import cpu, processor_seconds

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def used() -> int:
    """Return the largest resident set so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cost(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Measure some work: the median of its processor seconds, and how much the peak of memory rose."""
    before = used()
    work()  # which warms up
    seconds = []
    for _ in range(repeats):
        start = processor_seconds()
        work()
        seconds.append(processor_seconds() - start)
    return {"seconds": statistics.median(seconds), "bytes": used() - before}


def denoiser(side: int, width: int) -> Any:
    """A DDPM on images of some side with a U-Net of some width."""
    import torch

    from genzoo.diffusion.samplers import DDIM
    from genzoo.diffusion.schedules import LinearSchedule
    from genzoo.families.ddpm import DDPM
    from genzoo.nn.unet import UNet

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = functools.partial(UNet, channels=width, multipliers=(1, 2), blocks=1)
    return DDPM((3, side, side), network=network, levels=256, schedule=LinearSchedule(1000), sampler=DDIM(10))


def step(batch: int = 16, width: int = 32, side: int = 32) -> dict[str, float]:
    """A training step."""
    import torch

    from genzoo.data.dataset import Split
    from genzoo.data.loader import Batches
    from genzoo.training.budget import Budget
    from genzoo.training.module import GenerativeModule

    images = torch.randint(256, (256, 3, side, side), dtype=torch.uint8)
    adam = functools.partial(torch.optim.Adam, lr=1e-4, fused=True)
    budget = Budget(images=10**6)
    module = GenerativeModule(denoiser(side, width), adam, Batches(Split(images, None), batch, 0), budget, clip=1.0)
    module.make_plan()
    return cost(module.step, 5)


def sampling(steps: int = 10, batch: int = 8) -> dict[str, float]:
    """Samples by DDIM."""
    import torch

    from genzoo.diffusion.samplers import DDIM

    model = denoiser(16, 32).eval()
    model.sampler = DDIM(steps)
    rng = torch.Generator().manual_seed(0)
    return cost(lambda: model.sample(batch, rng=rng), 3)


def evaluation(n: int) -> dict[str, float]:
    """All scores of n images of another program, from the start of the process; statistics of the data are cached."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        np.savez(f"{folder}/images.npz", rng.integers(0, 256, (n, 28, 28, 1), dtype=np.uint8))
        words = [f"samples={folder}/images.npz", "data=fashion_mnist", f"metrics.n={n}"]
        start = processor_seconds()
        command = [sys.executable, "-m", "genzoo", "evaluate", *words]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        return {"seconds": processor_seconds() - start, "bytes": largest}


def page(runs: int) -> dict[str, float]:
    """A comparison of runs that are there; its bytes are those of the page."""
    from genzoo.report.comparison import write
    from tests.report import run, scored

    with tempfile.TemporaryDirectory() as folder:
        for i in range(runs):
            config = {"trainer": {"batch_size": i // 5}}
            made = run(
                Path(folder, "runs"), f"family{i % 10}", i % 5, scored(float(i), i % 5), config=config, events=100
            )
            (made.path / "samples.png").write_bytes(b"\x89PNG\r\n\x1a\n" + os.urandom(5_000))
        start = processor_seconds()
        out = write([f"{folder}/runs"], Path(folder, "out"))
        return {"seconds": processor_seconds() - start, "bytes": out.stat().st_size}


# Each curve: what does the work, the argument that grows, its values, and a word on a growth that is not linear.
CURVES: dict[str, tuple[Callable[..., dict[str, float]], str, list[int], str]] = {
    "step against batch": (step, "batch", [4, 8, 16, 32, 64], ""),
    "step against width": (step, "width", [16, 32, 64, 128], "a convolution's work grows as its width squared"),
    "step against side": (step, "side", [8, 16, 32, 64], "pixels grow as the side squared"),
    "sampling against evaluations": (sampling, "steps", [5, 10, 20, 40], ""),
    "sampling against batch": (sampling, "batch", [2, 4, 8, 16, 32], ""),
    "evaluation against images": (evaluation, "n", [10_000, 20_000, 50_000], ""),
    "page against runs": (page, "runs", [10, 30, 100, 300, 1000], ""),
}


def point(name: str, value: int) -> dict[str, float]:
    """Measure one point in a process of its own."""
    paths = os.pathsep.join([str(ROOT), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "growth.py"), "point", name, str(value)]
    ended = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(ended.stdout.splitlines()[-1])


def exponent(x: list[int], y: list[float]) -> float:
    """Fit ``y = a x^k`` to the upper half of a curve and return k."""
    import numpy as np

    half = len(x) // 2
    return float(np.polyfit(np.log(x[half:]), np.log(y[half:]), 1)[0])


def curves(names: list[str]) -> Iterator[dict[str, Any]]:
    """Measure curves."""
    for name in names:
        _, argument, values, why = CURVES[name]
        points = [point(name, value) for value in values]
        curve: dict[str, Any] = {"name": name, "x": argument, "values": values, "why": why}
        for kind in ("seconds", "bytes"):
            curve[kind] = [p[kind] for p in points]
            curve[f"exponent of {kind}"] = round(exponent(values, [max(p[kind], 1e-9) for p in points]), 2)
        yield curve


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Draw all curves, cost against what grows, both on log axes, with a line that is linear."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = plt.subplots(2, len(found), figsize=(3.1 * len(found), 5.6), layout="constrained", squeeze=False)
    for column, curve in zip(axes.T, found, strict=True):
        x = curve["values"]
        for axis, kind, scale, unit in zip(column, ("seconds", "bytes"), (1, 2**20), ("s", "MiB"), strict=True):
            y = [value / scale for value in curve[kind]]
            axis.loglog(x, y, "o-", color="#3465a4", label=f"slope {curve[f'exponent of {kind}']}")
            axis.loglog(x, [y[-1] * value / x[-1] for value in x], ":", color="#888", label="linear")
            axis.set(xlabel=curve["x"], ylabel=unit)
            axis.set_xticks(x, [f"{value:,}" if value < 10_000 else f"{value // 1000}k" for value in x])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
            axis.yaxis.set_minor_locator(NullLocator())
            axis.legend(frameon=False, fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        column[0].set_title(curve["name"], fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure the curves that are named, or all; or be the process of one point."""
    if sys.argv[1:2] == ["point"]:
        work, argument, _, _ = CURVES[sys.argv[2]]
        print(json.dumps(work(**{argument: int(sys.argv[3])})))
        return
    path = HERE / "growth.json"
    known = json.loads(path.read_text())["curves"] if path.is_file() else []
    found = {curve["name"]: curve for curve in known}
    for curve in curves([name for name in sys.argv[1:] or CURVES if name != "draw"]):
        found[curve["name"]] = curve
        kinds = (f"{kind} as {curve['x']}^{curve[f'exponent of {kind}']}" for kind in ("seconds", "bytes"))
        print(f"{curve['name']}: {', '.join(kinds)}", flush=True)
        inside = [found[name] for name in CURVES if name in found]
        path.write_text(json.dumps({"machine": cpu(), "curves": inside}, indent=1) + "\n")
    draw([found[name] for name in CURVES if name in found], HERE / "growth.png")


if __name__ == "__main__":
    main()
