"""Every family on every density of the plane, and every sampler: `python experiments/gallery_2d/run.py RUNS [model ...]`.

Trains, by the command that a user types, what results.json has no distance of, into run directories under RUNS; scores each
model against the density that made its data, and draws adversarial.png, and families.png and samplers.png once all runs are
there. Interrupted, it goes on where it was. Ends with 1, and names them, if samples of some family are farther from the data
than LIMIT times the distance of two draws of the data, or were not measured.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure

from genzoo import load
from genzoo.data import densities
from genzoo.metrics.likelihood import mean_and_stderr
from genzoo.metrics.sliced_wasserstein import sliced_wasserstein
from genzoo.model import Density, GenerativeModel
from genzoo.numerics.random import SampleStreams, generator
from genzoo.runs import Run

HERE = Path(__file__).parent
DENSITIES = {
    "gaussian_mixture": densities.GaussianMixture(),
    "moons": densities.Moons(),
    "checkerboard": densities.Checkerboard(),
    "swiss_roll": densities.SwissRoll(),
}
MODELS = (
    "vae", "hvae", "vqvae", "latent", "autoregressive", "realnvp", "glow", "ddpm", "score_sde", "flow_matching",
    "gan", "wgan", "wgan_gp",
)  # fmt: skip
SECONDS = 90  # of training
# Adversarial models get a number of points, so that the load of the machine does not change the weights: 16,000, 15,000 and
# 6,000 steps, those of the critic and of the generator together, of 64, 64 and 256 points.
BUDGETS = {
    model: ["budget.seconds=null", f"budget.images={images}"]
    for model, images in {"wgan_gp": 1_024_000, "wgan": 960_000, "gan": 1_536_000}.items()
}
SAMPLERS = {
    "ancestral": {"_target_": "genzoo.diffusion.samplers.Ancestral", "steps": 200},
    "ddim": {"_target_": "genzoo.diffusion.samplers.DDIM", "steps": 50},
    "dpm_solver": {"_target_": "genzoo.diffusion.samplers.DPMSolver", "steps": 20},
    "euler": {"_target_": "genzoo.diffusion.samplers.Euler", "steps": 50},
    "midpoint": {"_target_": "genzoo.diffusion.samplers.Midpoint", "steps": 18},
    "heun": {"_target_": "genzoo.diffusion.samplers.Heun", "steps": 18},
    "ode": {"_target_": "genzoo.diffusion.samplers.AdaptiveODE", "rtol": 1e-4, "atol": 1e-4},
    "euler_maruyama": {"_target_": "genzoo.diffusion.samplers.EulerMaruyama", "steps": 300},
    "predictor_corrector": {"_target_": "genzoo.diffusion.samplers.PredictorCorrector", "steps": 150},
}
POINTS = 2000  # in a picture
TEST = 4000  # fresh points of the density, never trained on
PAIRS = 20  # of draws of so many points, whose median distance is the unit of LIMIT
LIMIT = 2.0
ADVERSARIAL = ("gan", "wgan", "wgan_gp")


def train(model: str, density: str, runs: Path) -> dict:
    """Train one model; return its command, run directory, processor seconds, images and commit."""
    outputs, budget = runs / f"{model}-{density}", BUDGETS.get(model, [f"budget.seconds={SECONDS}"])
    command = ["python", "-m", "genzoo", f"model={model}", f"data={density}", *budget, "trainer.threads=1"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command[1:], f"outputs={outputs}", "metrics.n=0"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = max(outputs.glob("*/*/"))
    status = Run(run).status
    return {
        "command": " ".join(command),
        "run": str(run.relative_to(runs)),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "images": status["images"],
        "git_commit": status["git_commit"],
    }


def score(run: Path, density: str) -> dict:
    """Measure a model against the density that made its data."""
    model, truth = load(run, device="cpu"), DENSITIES[density]
    x = truth.sample(TEST, generator("gallery", density))
    drawn = model.sample(TEST, rng=SampleStreams(0, range(TEST))).x
    return {"distance": sliced_wasserstein(x, drawn), **gap(model, density, x)}


def gap(model: GenerativeModel, density: str, x: torch.Tensor) -> dict:
    """Measure how far a model's negative log-likelihood lies above the truth's, in nats, on the same fresh points."""
    if not isinstance(model, Density):
        return {"bound": None, "gap": None, "stderr": None}
    with torch.no_grad():
        log_prob = [
            model.log_prob(part, num_samples=20, rng=SampleStreams(0, range(len(part)))).value for part in x.split(1000)
        ]
    value, stderr, _ = mean_and_stderr(DENSITIES[density].log_prob(x) - torch.cat(log_prob))
    bound = "+".join(name for name in ("LOWER", "ESTIMATE") if name in str(model.bound)) or "EXACT"
    return {"bound": bound, "gap": value, "stderr": stderr}


def limits() -> dict[str, float]:
    """Return for each density LIMIT times the median distance of two draws of TEST points."""

    def pair(name: str, i: int) -> float:
        a, b = (DENSITIES[name].sample(TEST, generator("gallery", name, side, i)) for side in ("a", "b"))
        return sliced_wasserstein(a, b)

    return {name: LIMIT * statistics.median(pair(name, i) for i in range(PAIRS)) for name in DENSITIES}


def scatter(axes, points: torch.Tensor, title: str, density: str) -> None:
    """Draw points on the frame of a density."""
    (left, right), (low, high) = DENSITIES[density].support
    axes.scatter(points[:, 0], points[:, 1], s=1.5, alpha=0.5, linewidths=0, color="#1f4e79")
    axes.set(xlim=(left, right), ylim=(low, high), xticks=[], yticks=[])
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=8)


def present(results: dict, runs: Path, key: str) -> bool:
    """Whether a run is at hand and scored."""
    row = results.get(key, {})
    return "distance" in row and (runs / row["run"]).is_dir()


def draw_families(results: dict, runs: Path, models: tuple[str, ...], name: str) -> None:
    """Draw samples of families, the truth first; leave out what was not trained yet."""
    figure = Figure(figsize=(2.2 * len(DENSITIES), 2.35 * (1 + len(models))), layout="constrained")
    grid = figure.subplots(1 + len(models), len(DENSITIES), squeeze=False)
    for axes, density in zip(grid[0], DENSITIES, strict=True):
        scatter(
            axes, DENSITIES[density].sample(POINTS, generator("picture", density)), f"{density}: the truth", density
        )
    for row, model in zip(grid[1:], models, strict=True):
        for axes, density in zip(row, DENSITIES, strict=True):
            if not present(results, runs, f"{model}/{density}"):
                axes.set_axis_off()
                continue
            known = results[f"{model}/{density}"]
            x = load(runs / known["run"], device="cpu").sample(POINTS, rng=SampleStreams(0, range(POINTS))).x
            nats = "" if known["gap"] is None else f", +{known['gap']:.3f} nats"
            scatter(axes, x, f"{model}: SW {known['distance']:.3f}{nats}", density)
    figure.savefig(HERE / name, dpi=90)


def draw_samplers(results: dict, runs: Path, density: str = "moons") -> None:
    """Draw samples of each diffusion and flow model by every sampler, from one trained network each."""
    models = ("ddpm", "score_sde", "flow_matching")
    figure = Figure(figsize=(2.2 * len(models), 2.35 * len(SAMPLERS)), layout="constrained")
    grid = figure.subplots(len(SAMPLERS), len(models), squeeze=False)
    for row, (name, sampler) in zip(grid, SAMPLERS.items(), strict=True):
        for axes, model in zip(row, models, strict=True):
            built = load(runs / results[f"{model}/{density}"]["run"], device="cpu", sampler=sampler)
            x, nfe, _ = built.sample(POINTS, rng=SampleStreams(0, range(POINTS)))
            scatter(axes, x, f"{model}, {name}, {nfe} evaluations", density)
    figure.savefig(HERE / "samplers.png", dpi=90)


def table(results: dict, cell: Callable[[dict, str], str]) -> str:
    """Lay results out as a table of Markdown, models by densities."""
    lines = ["| | " + " | ".join(DENSITIES) + " |", "|---" * (1 + len(DENSITIES)) + "|"]
    for model in MODELS:
        cells = [cell(results.get(f"{model}/{density}", {}), density) for density in DENSITIES]
        lines.append(f"| `{model}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def nats(row: dict, density: str) -> str:
    """Write one gap."""
    return "n/a" if row.get("gap") is None else f"{row['gap']:.3f} ± {row['stderr']:.3f} ({row['cpu_seconds']:.0f} s)"


def distance(row: dict, limit: float) -> str:
    """Write one distance, in bold if it exceeds the limit."""
    if "distance" not in row:
        return "not measured"
    mark = "**" if row["distance"] > limit else ""
    return f"{mark}{row['distance']:.3f}{mark} ({row['cpu_seconds']:.0f} s)"


def main() -> None:
    """Fill the gallery."""
    runs, chosen = Path(sys.argv[1]).resolve(), sys.argv[2:] or MODELS
    torch.set_num_threads(1)
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for model in chosen:
        for density in DENSITIES:
            row = results.get(f"{model}/{density}", {})
            if "distance" in row:
                continue
            if not row or not (runs / row["run"]).is_dir():
                row = train(model, density, runs)
            results[f"{model}/{density}"] = {**row, **score(runs / row["run"], density)}
            path.write_text(json.dumps(results, indent=1) + "\n")
    if all(present(results, runs, f"{model}/{density}") for model in MODELS for density in DENSITIES):
        draw_families(results, runs, MODELS, "families.png")
        draw_samplers(results, runs)
    draw_families(results, runs, ADVERSARIAL, "adversarial.png")
    allowed = limits()
    for name, limit in allowed.items():
        print(f"limit of {name}: {limit:.3f}")
    print(table(results, nats))
    print(table(results, lambda row, name: distance(row, allowed[name])))
    rows = {(model, name): results.get(f"{model}/{name}", {}) for model in MODELS for name in DENSITIES}
    wrong = [
        f"{model} on {name}: {row.get('distance', 'not measured')}"
        for (model, name), row in rows.items()
        if row.get("distance", math.inf) > allowed[name]
    ]
    if wrong:
        sys.exit("too far from the data, or not measured:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
