"""Every family on every law of the plane, and every sampler: `python experiments/gallery_2d/run.py RUNS [model ...]`.

Trains, by the command that a user types, what is not yet in results.json, into run directories under RUNS; scores each model's
distance from the law that made its data, and draws families.png and samplers.png. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from genzoo import load
from genzoo.data import densities
from genzoo.metrics.likelihood import mean_with_error
from genzoo.model import Density
from genzoo.numerics.random import SampleStreams, generator
from genzoo.runs import Run

HERE = Path(__file__).parent
LAWS = {
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
TEST = 4000  # fresh points of the law, never trained on


def train(model: str, law: str, runs: Path) -> dict:
    """Train one model and score it; return what is known of it."""
    outputs = runs / f"{model}-{law}"
    command = [
        "python", "-m", "genzoo", f"model={model}", f"data={law}", f"budget.seconds={SECONDS}", "trainer.threads=1",
    ]  # fmt: skip
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
        **gap(run, law),
    }


def gap(run: Path, law: str) -> dict:
    """Measure how far a model's negative log-likelihood lies above the truth's, in nats, on the same fresh points."""
    model = load(run, device="cpu")
    if not isinstance(model, Density):
        return {"bound": None, "gap": None, "stderr": None}
    x = LAWS[law].sample(TEST, generator("gallery", law))
    with torch.no_grad():
        said = [
            model.log_prob(part, num_samples=20, rng=SampleStreams(0, range(len(part)))).value for part in x.split(1000)
        ]
    value, stderr, _ = mean_with_error(LAWS[law].log_prob(x) - torch.cat(said))
    bound = "+".join(name for name in ("LOWER", "ESTIMATE") if name in str(model.bound)) or "EXACT"
    return {"bound": bound, "gap": value, "stderr": stderr}


def scatter(axes, points: torch.Tensor, title: str, law: str) -> None:
    """Draw points on the frame of a law."""
    (left, right), (low, high) = LAWS[law].support
    axes.scatter(points[:, 0], points[:, 1], s=1.5, alpha=0.5, linewidths=0, color="#1f4e79")
    axes.set(xlim=(left, right), ylim=(low, high), xticks=[], yticks=[])
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=8)


def draw_families(results: dict, runs: Path) -> None:
    """Samples of every family, the truth first."""
    models = [m for m in MODELS if any(f"{m}/{law}" in results for law in LAWS)]
    figure = Figure(figsize=(2.2 * len(LAWS), 2.35 * (1 + len(models))), layout="constrained")
    grid = figure.subplots(1 + len(models), len(LAWS), squeeze=False)
    for axes, law in zip(grid[0], LAWS, strict=True):
        scatter(axes, LAWS[law].sample(POINTS, generator("picture", law)), f"{law}: the truth", law)
    for row, model in zip(grid[1:], models, strict=True):
        for axes, law in zip(row, LAWS, strict=True):
            known = results.get(f"{model}/{law}")
            if known is None:
                axes.set_axis_off()
                continue
            x = load(runs / known["run"], device="cpu").sample(POINTS, rng=SampleStreams(0, range(POINTS))).x
            distance = "no density" if known["gap"] is None else f"+{known['gap']:.3f} nats"
            scatter(axes, x, f"{model}: {distance}", law)
    figure.savefig(HERE / "families.png", dpi=90)


def draw_samplers(results: dict, runs: Path, law: str = "moons") -> None:
    """Samples of each noising family by every sampler, from one trained network each."""
    models = [m for m in ("ddpm", "score_sde", "flow_matching") if f"{m}/{law}" in results]
    figure = Figure(figsize=(2.2 * len(models), 2.35 * len(SAMPLERS)), layout="constrained")
    grid = figure.subplots(len(SAMPLERS), len(models), squeeze=False)
    for row, (name, sampler) in zip(grid, SAMPLERS.items(), strict=True):
        for axes, model in zip(row, models, strict=True):
            built = load(runs / results[f"{model}/{law}"]["run"], device="cpu", sampler=sampler)
            x, nfe, _ = built.sample(POINTS, rng=SampleStreams(0, range(POINTS)))
            scatter(axes, x, f"{model}, {name}, {nfe} evaluations", law)
    figure.savefig(HERE / "samplers.png", dpi=90)


def table(results: dict) -> str:
    """Lay the gaps out as a table of Markdown, models by laws."""
    lines = ["| | " + " | ".join(LAWS) + " |", "|---" * (1 + len(LAWS)) + "|"]
    for model in MODELS:
        cells = []
        for law in LAWS:
            known = results.get(f"{model}/{law}")
            missing = "n/a" if known else ""
            cells.append(
                missing
                if not known or known["gap"] is None
                else f"{known['gap']:.3f} ± {known['stderr']:.3f} ({known['cpu_seconds']:.0f} s)"
            )
        lines.append(f"| `{model}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Fill the gallery."""
    runs, chosen = Path(sys.argv[1]).resolve(), sys.argv[2:] or MODELS
    torch.set_num_threads(1)
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for model in chosen:
        for law in LAWS:
            if f"{model}/{law}" not in results:
                results[f"{model}/{law}"] = train(model, law, runs)
                path.write_text(json.dumps(results, indent=1) + "\n")
    draw_families(results, runs)
    draw_samplers(results, runs)
    print(table(results))


if __name__ == "__main__":
    main()
