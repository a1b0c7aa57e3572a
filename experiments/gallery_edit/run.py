"""What a trained model is for, in pictures: `python experiments/gallery_edit/run.py RUNS [picture ...]`.

Trains the models of MODELS by the command that a user types, into run directories under RUNS, or goes on where it was
interrupted; then draws classes, a ladder of guidance scales with its scores, fillings of a masked image by four families,
interpolations, a traversal, an attribute and sampling paths, each by a command of genzoo. Every command and score is kept in
results.json.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

from genzoo.data import digits
from genzoo.data.images import fashion_mnist
from genzoo.data.pictures import as_bytes, save_png
from genzoo.distributions.discretization import bin_center
from genzoo.runs import Run

HERE = Path(__file__).parent
TRAINING = [
    "data.conditional=true",
    "trainer.threads=1",
    "metrics.n=0",
    "metrics.events=200",
    "trainer.grids=2",
    "resume=auto",
]
MODELS = {  # images that each is trained on
    ("ddpm", "digits"): 600_000, ("flow_matching", "digits"): 600_000, ("vae", "digits"): 300_000,
    ("autoregressive", "digits"): 100_000, ("realnvp", "digits"): 200_000,
    ("vae", "fashion_mnist"): 150_000, ("ddpm", "fashion_mnist"): 100_000, ("gan", "fashion_mnist"): 150_000,
    ("autoregressive", "fashion_mnist"): 40_000,
}  # fmt: skip
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
FILLERS = {
    "digits": ("ddpm", "flow_matching", "autoregressive", "vae", "realnvp"),
    "fashion_mnist": ("ddpm", "autoregressive", "vae", "gan"),
}
CHOSEN = {"digits": 5, "fashion_mnist": 12}  # of the test split, to fill: a digit and a garment
MARGIN, LINE = 8, 16  # pixels


class Gallery:
    """Runs, and what was done with them.

    Args:
        runs: folder of run directories.
    """

    def __init__(self, runs: Path):
        self.runs = runs
        path = HERE / "results.json"
        self.results: dict = (
            json.loads(path.read_text()) if path.is_file() else {"commands": {}, "runs": {}, "ladder": {}}
        )

    def save(self) -> None:
        (HERE / "results.json").write_text(json.dumps(self.results, indent=1, sort_keys=True) + "\n")

    def genzoo(self, picture: str, *words: str) -> str:
        """Run a command, keep it under the name of its picture, and return what it prints."""
        shown = {str(self.runs): "RUNS", f"{HERE}/": "experiments/gallery_edit/"}
        told = ["python", "-m", "genzoo"]
        for word in words:
            for path, name in shown.items():
                word = word.replace(path, name)
            told.append(word)
        commands = self.results["commands"].setdefault(picture, [])
        if (line := shlex.join(told)) not in commands:
            commands.append(line)
        done = subprocess.run([sys.executable, "-m", "genzoo", *words], text=True, stdout=subprocess.PIPE, check=True)
        return done.stdout

    def run(self, model: str, data: str) -> str:
        """Return the run of a model, trained first if need be."""
        images = MODELS[model, data]
        words = [f"model={model}", f"data={data}", f"budget.images={images}", *TRAINING, f"outputs={self.runs}"]
        out = self.genzoo("training", *words)
        path = Path(out.strip().splitlines()[-1].split(": ")[1])
        status = Run(path).status
        self.results["runs"][f"{model} on {data}"] = {
            "images": status["images"], "seconds": round(status["train_seconds"], 1), "git": status.get("git_commit")
        }  # fmt: skip
        return str(path)


def titled(panels: dict[str, Image.Image], columns: int) -> Image.Image:
    """Lay pictures out in rows, each below its title."""
    width = max(panel.width for panel in panels.values()) + MARGIN
    height = max(panel.height for panel in panels.values()) + LINE + MARGIN
    rows = -(-len(panels) // columns)
    canvas = Image.new("RGB", (min(columns, len(panels)) * width + MARGIN, rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (title, panel) in enumerate(panels.items()):
        left, top = MARGIN + i % columns * width, MARGIN + i // columns * height
        draw.text((left, top), title, fill="black")
        canvas.paste(panel.convert("RGB"), (left, top + LINE))
    return canvas


def classes(gallery: Gallery, temporary: Path) -> None:
    """A row a class, by each family."""
    for data in ("digits", "fashion_mnist"):
        panels = {}
        for model in (model for model, of in MODELS if of == data):
            words = [f"run={gallery.run(model, data)}", "label=0-9", "n=8", f"out={temporary / 'grid.png'}"]
            words += ["guidance=2"] if model in ("ddpm", "flow_matching") else []
            gallery.genzoo("classes", "sample", *words)
            panels[model + (", guidance 2" if len(words) > 4 else "")] = Image.open(temporary / "grid.png").copy()
        titled(panels, 3 if data == "digits" else 2).save(HERE / f"classes-{data}.png", optimize=True)


def ladder(gallery: Gallery, temporary: Path) -> None:
    """The same noise at rising scales; on digits the accuracy and recall of 1,000 samples at each."""
    for data in ("digits", "fashion_mnist"):
        run, panels = gallery.run("ddpm", data), {}
        for scale in SCALES:
            words = ["sample", f"run={run}", "label=0-9", "n=6", f"guidance={scale:g}", f"out={temporary / 'grid.png'}"]
            gallery.genzoo("guidance", *words)
            panels[f"s = {scale:g}"] = Image.open(temporary / "grid.png").copy()
            if data == "digits":
                gallery.results["ladder"][f"{scale:g}"] = scores(gallery, run, scale)
                gallery.save()
        titled(panels, len(panels)).save(HERE / f"guidance-{data}.png", optimize=True)


def scores(gallery: Gallery, run: str, scale: float) -> dict[str, dict[str, float | None]]:
    """Score guided samples; the values and standard errors by the names of the metrics."""
    gallery.genzoo(
        "guidance", "evaluate", f"run={run}", f"guidance={scale:g}", "metrics.n=1000", "metrics.throughput=2"
    )
    found = Run(Path(run)).result["metrics"]
    names = ("train/class_accuracy_digits", "train/recall_per_class_digits", "train/recall_digits", "test/fd_digits")
    return {name: {part: found[name][part] for part in ("value", "stderr")} for name in names}


def fillings(gallery: Gallery, temporary: Path) -> None:
    """The lower half of a test image, by every family that can fill it, with the mean and the spread of the draws."""
    for data, models in FILLERS.items():
        source = digits() if data == "digits" else fashion_mnist("data")
        chosen = CHOSEN[data]
        image, label = source.test.x[chosen : chosen + 1], int(source.test.y[chosen])
        save_png(temporary / "image.png", as_bytes(bin_center(image, source.levels), source.levels)[0])
        panels = {}
        for model in models:
            words = [
                f"run={gallery.run(model, data)}",
                f"image={temporary / 'image.png'}",
                "task=inpaint",
                "mask=bottom",
            ]
            gallery.genzoo("fillings", "edit", *words, f"label={label}", "n=6", f"out={temporary / 'filled.png'}")
            panels[f"{model}: observed, six draws, mean, spread"] = Image.open(temporary / "filled.png").copy()
        titled(panels, 1).save(HERE / f"fillings-{data}.png", optimize=True)


def latents(gallery: Gallery, temporary: Path) -> None:
    """Interpolations by three kinds of latents, traversals and an attribute of a VAE."""
    panels = {}
    for model in ("vae", "realnvp", "ddpm"):
        words = [f"run={gallery.run(model, 'digits')}", "n=6", "label=3", f"out={temporary / 'grid.png'}"]
        gallery.genzoo("interpolations", "interpolate", *words)
        panels[f"{model} on digits"] = Image.open(temporary / "grid.png").copy()
    words = [f"run={gallery.run('vae', 'fashion_mnist')}", "n=6", "label=0", f"out={temporary / 'grid.png'}"]
    gallery.genzoo("interpolations", "interpolate", *words)
    panels["vae on fashion_mnist"] = Image.open(temporary / "grid.png").copy()
    titled(panels, 2).save(HERE / "interpolations.png", optimize=True)
    run = gallery.run("vae", "fashion_mnist")
    gallery.genzoo("traversals", "traverse", f"run={run}", "label=9", f"out={HERE / 'traversals.png'}")
    # Of an unconditional model: in a conditional one the class is no part of the latent.
    words = ["model=vae", "data=digits", "budget.images=300000", *TRAINING[1:], f"outputs={gallery.runs}"]
    run = gallery.genzoo("attribute", *words).strip().splitlines()[-1].split(": ")[1]
    gallery.genzoo("attribute", "attribute", f"run={run}", "minus=3", "plus=8", f"out={HERE / 'attribute.png'}")


def trajectories(gallery: Gallery, temporary: Path) -> None:
    """Sampling paths: animated images, a step-by-step grid, and points of the plane over their density."""
    run = gallery.run("ddpm", "fashion_mnist")
    words = ["trajectory", f"run={run}", "label=0-9", "guidance=2"]
    gallery.genzoo("trajectories", *words, "n=1", "frames=24", f"out={HERE / 'trajectory.gif'}")
    gallery.genzoo("trajectories", *words, "n=1", f"out={HERE / 'trajectory.png'}")
    words = ["model=flow_matching", "data=moons", "budget.images=2000000", *TRAINING[1:], f"outputs={gallery.runs}"]
    out = gallery.genzoo("trajectories", *words)
    run = out.strip().splitlines()[-1].split(": ")[1]
    gallery.genzoo("trajectories", "trajectory", f"run={run}", "frames=30", f"out={HERE / 'moons.gif'}")


PICTURES: dict[str, Callable[[Gallery, Path], None]] = {
    function.__name__: function for function in (classes, fillings, latents, trajectories, ladder)
}


def main(runs: Path, chosen: list[str]) -> None:
    temporary = runs / "temporary"
    temporary.mkdir(parents=True, exist_ok=True)
    gallery = Gallery(runs.absolute())
    for name in chosen or PICTURES:
        PICTURES[name](gallery, temporary.absolute())
        gallery.save()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
