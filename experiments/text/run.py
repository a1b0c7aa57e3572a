"""Pictures from words: `python experiments/text/run.py RUNS [family ...] [--seeds 0 1 ...] [--data shapes emoji]`.

Trains each text-to-image family on captioned pictures by the command that a user types, 30 minutes on one core each, into run
directories under RUNS, or goes on where it was interrupted; scores the attributes of samples for captions of seen and of
held-out combinations; and draws captions that were chosen before any training. Every command and score is kept in
results.json, from which the table of the README is written.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from genzoo.runs import Run

HERE = Path(__file__).parent
FAMILIES = ("dalle", "glide", "unclip")
TRAINING = ["budget.seconds=1800", "trainer.threads=1", "trainer.grids=4", "trainer.scores=0", "resume=auto"]
SCORES = ["metrics.n=500", "metrics.events=50", "metrics.throughput=64"]
WORDS = {
    "dalle": ["codec=fsq", "likelihood@codec.likelihood=gaussian", "codec.likelihood.log_var=-4"],
    "unclip": ["denoiser@model.decoder=flow_matching", "network@model.decoder.network=glide_dit_image"],
}
GUIDANCE = {"dalle": "1.5", "glide": "2.0", "unclip": "2.0"}
# Chosen before any training: eight scenes of figures, of which the last three are held out from training, and ten emoji.
CAPTIONS = {"shapes": HERE / "captions-shapes.txt", "emoji": HERE / "captions-emoji.txt"}
COLUMNS = ("text/attributes", "text/held_out", "memorisation/exact_copies", "memorisation/copied")


def genzoo(*words: str) -> str:
    """Run a command and return what it prints."""
    print("python -m genzoo", shlex.join(words), flush=True)
    done = subprocess.run([sys.executable, "-m", "genzoo", *words], text=True, stdout=subprocess.PIPE, check=True)
    return done.stdout


def train(runs: Path, family: str, data: str, seed: int) -> Path:
    """Train a family, or find its finished run."""
    place = runs / f"{data}-{seed}"
    words = [f"model={family}", f"data={data}", f"seed={seed}", *WORDS.get(family, []), f"outputs={place}"]
    words += [*TRAINING, *SCORES]
    out = genzoo(*words)
    marks = ("run: ", "already done: ")
    return Path(next(line for line in out.splitlines() if line.startswith(marks)).partition(": ")[2])


def score(run: Path, family: str) -> dict[str, dict]:
    """Score samples of a run, guided and not, and return the scores by the scale of guidance."""
    found = {}
    for scale in ("1", GUIDANCE[family]):
        kept = [entry for _, entry in Run(run).named_results() if _scale(entry) == float(scale)]
        if not kept or scale != "1":
            genzoo("evaluate", f"run={run}", f"guidance={scale}", *SCORES)
            kept = [entry for _, entry in Run(run).named_results() if _scale(entry) == float(scale)]
        metrics = kept[-1]["metrics"]
        found[scale] = {
            name: {"value": metrics[name]["value"], "stderr": metrics[name]["stderr"]}
            for name in (*COLUMNS, "sampling/samples_per_second", "sampling/nfe", "model/parameters")
            if name in metrics
        }
        for name in COLUMNS[:2]:
            if name in metrics:
                found[scale][name]["per_attribute"] = metrics[name]["detail"]["per_attribute"]
    return found


def _scale(result: dict) -> float:
    """Return the scale of guidance of a result, 1 without any."""
    card = next((entry["card"] for name, entry in result["metrics"].items() if name.startswith("text/")), {})
    return float((card.get("setting", {}).get("guidance") or {}).get("scale", 1))


def draw(run: Path, family: str, data: str) -> None:
    """Draw the captions that were chosen before."""
    genzoo(
        "sample",
        f"run={run}",
        f"texts={CAPTIONS[data]}",
        "n=8",
        f"guidance={GUIDANCE[family]}",
        f"out={HERE / f'{family}-{data}.png'}",
    )


def main(words: list[str]) -> None:
    """Train, score and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--data", nargs="*", default=["shapes"], choices=list(CAPTIONS))
    given = parser.parse_args(words)
    path = HERE / "results.json"
    results: dict = json.loads(path.read_text()) if path.is_file() else {}
    for data in given.data:
        for seed in given.seeds:
            for family in given.families:
                run = train(given.runs, family, data, seed)
                status = Run(run).status
                results[f"{family}-{data}-{seed}"] = {
                    "train_seconds": status.get("train_seconds"),
                    "images": status.get("images"),
                    "command": str(status.get("command")).replace(str(given.runs), "RUNS"),
                    "git_commit": status.get("git_commit"),
                    "machine": status.get("machine"),
                    "scores": score(run, family),
                }
                path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
                if seed == given.seeds[0]:
                    draw(run, family, data)
    print(table(results))


def table(results: dict) -> str:
    """Write a row for each run and scale of guidance, as Markdown."""
    lines = [
        "| family | data | seed | guidance | all attributes right, seen | held out | exact copies | seconds a picture |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in sorted(results.items()):
        family, data, seed = name.split("-")
        for scale, scores in entry["scores"].items():
            cells = [_cell(scores.get(column)) for column in COLUMNS[:2]]
            copies = scores.get(COLUMNS[2], {}).get("value", "n/a")
            speed = scores["sampling/samples_per_second"]["value"]
            lines.append(
                f"| `{family}` | {data} | {seed} | {scale} | {' | '.join(cells)} | {copies} | {1 / speed:.3f} |"
            )
    return "\n".join(lines)


def _cell(score: dict | None) -> str:
    return "n/a" if score is None else f"{score['value']:.1%} ± {score['stderr']:.1%}"


if __name__ == "__main__":
    main(sys.argv[1:])
