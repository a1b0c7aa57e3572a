"""Copy what a reader needs of finished runs: `python experiments/first_light/collect.py RUN [RUN ...]`.

For each run: its grid of samples as <model>.png, and its configuration, status and scores in results.json. Of all of them:
families.png, some samples of each family, and the table of the scores, which is printed.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from genzoo.runs import Run

HERE = Path(__file__).parent
COLUMNS = {
    "density": ("test/bpd", "test/bpd_upper", "test/bpd_estimate"),
    "`fd_fashion_mnist` to test": ("test/fd_fashion_mnist",),
    "precision": ("test/precision_fashion_mnist",),
    "coverage": ("test/coverage_fashion_mnist",),
    "copied": ("memorisation/copied",),
    "samples/s": ("sampling/samples_per_second",),
    "evaluations": ("sampling/nfe",),
}


def cell(metrics: dict, names: tuple[str, ...]) -> str:
    """Show the first of some scores that a run has."""
    for name in names:
        if name in metrics:
            value, stderr = metrics[name]["value"], metrics[name]["stderr"]
            if isinstance(value, int):
                return str(value)
            text = f"{value:,.0f}" if "per_second" in name else f"{value:.3f}" if value < 1 else f"{value:.2f}"
            return text + (f" ± {stderr:.2g}" if stderr else "") + {"upper": " (bound)"}.get(name.split("_")[-1], "")
    return "n/a"


def draw(collected: dict) -> None:
    """Two rows of samples of every family."""
    figure = Figure(figsize=(9, 0.55 * len(collected)), layout="constrained")
    for axes, (model, known) in zip(figure.subplots(len(collected), 1), collected.items(), strict=True):
        with Image.open(HERE / f"{model}.png") as grid:
            top, middle = (grid.crop((0, row, grid.width, row + 60)) for row in (0, 58))
        strip = Image.new("L", (2 * grid.width, 60), 255)
        strip.paste(top, (0, 0))
        strip.paste(middle, (grid.width, 0))
        axes.imshow(strip, cmap="gray", vmin=0, vmax=255)
        distance = known["result"]["metrics"].get("test/fd_fashion_mnist")
        axes.set_ylabel(
            model + (f"\n{distance['value']:.1f}" if distance else ""), rotation=0, ha="right", va="center", fontsize=9
        )
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.savefig(HERE / "families.png", dpi=130)


def main() -> None:
    """Collect the runs named on the command line."""
    path = HERE / "results.json"
    collected = json.loads(path.read_text()) if path.is_file() else {}
    for run in map(Run, sys.argv[1:]):
        model = run.path.parent.name.partition("-")[0]
        shutil.copyfile(run.path / "samples.png", HERE / f"{model}.png")
        config, status = {**run.config, "outputs": "outputs"}, run.status
        status["command"] = " ".join(word for word in status["command"].split() if not word.startswith("outputs="))
        collected[model] = {"config": config, "status": status, "result": run.result}
    path.write_text(json.dumps(collected, indent=1) + "\n")

    def distance(model: str) -> float:
        return collected[model]["result"]["metrics"].get("test/fd_fashion_mnist", {"value": 1e9})["value"]

    collected = {model: collected[model] for model in sorted(collected, key=distance)}
    draw(collected)
    print("| | " + " | ".join(COLUMNS) + " | images seen | weights |\n" + "|---" * (len(COLUMNS) + 3) + "|")
    for model, known in collected.items():
        metrics, status = known["result"]["metrics"], known["status"]
        cells = [cell(metrics, names) for names in COLUMNS.values()]
        weights = metrics["model/parameters"]["value"] / 1e6
        print(f"| [`{model}`]({model}.png) | " + " | ".join(cells) + f" | {status['images']:,} | {weights:.2f}M |")


if __name__ == "__main__":
    main()
