"""Posteriors of real images: the test split of digits is degraded and restored, and scored against the truth.

    python experiments/gallery_edit/digits.py RUNS

RUNS is a folder with one run of each family, ``model=ddpm data=digits budget.seconds=240`` and so on; see the README.
Writes digits.json, digits.md and a picture of each restoration that is named below.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMON = ["split=test", "images=24", "n=9"]
TASKS = {
    "inpaint the lower half": ["task=inpaint", "mask=bottom"],
    "super-resolution from 4x4": ["task=super_resolution", "task.sigma=0.05"],
    "denoise, sigma = 0.5": ["task=denoise", "task.sigma=0.5"],
    "deblur, 1 pixel": ["task=deblur", "task.sigma=0.05"],
}
INPAINT = next(iter(TASKS))
METHODS = ["moment_matching", "pigdm", "dps"]
JOBS: list[tuple[str, str, str, list[str]]] = [
    *(("ddpm", task, method, [*words, f"method={method}"]) for task, words in TASKS.items() for method in METHODS),
    ("ddpm", INPAINT, "repaint", [*TASKS[INPAINT], "method=repaint"]),
    *(
        (family, INPAINT, "default", TASKS[INPAINT])
        for family in ("score_sde", "flow_matching", "autoregressive", "realnvp", "gan", "vae")
    ),
]
PICTURES = [("ddpm", INPAINT, "moment_matching"), ("ddpm", "super-resolution from 4x4", "moment_matching")]
SHOWN = ("coverage_50", "coverage_80", "coverage_90", "psnr_mean", "psnr_draw")


def main(runs: Path) -> None:
    """Restore by the command, and collect its scores."""
    found = []
    for family, task, method, words in JOBS:
        (run,) = runs.glob(f"{family}-digits/*")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "edit.png")
            command = [sys.executable, "-m", "genzoo", "edit", f"run={run}", *COMMON, *words, f"out={out}"]
            subprocess.run(command, check=True)
            result = json.loads(out.with_suffix(".json").read_text())
            if (family, task, method) in PICTURES:
                name = f"{family}-{task.split()[0].rstrip(',')}.png"
                (HERE / name).write_bytes(out.read_bytes())
        setting = {key: value for key, value in result["setting"].items() if key not in ("run", "method", "task")}
        found.append({"family": family, "task": task, "method": method, "setting": setting, "scores": result["scores"]})
        (HERE / "digits.json").write_text(json.dumps(found, indent=1) + "\n")
    rows = ["| task | family | method | " + " | ".join(SHOWN) + " | evaluations |", "|---" * (len(SHOWN) + 4) + "|"]
    for entry in found:
        values = [
            f"{score['value']:.2f} ± {score['stderr']:.2f}" if (score := entry["scores"].get(name)) else "n/a"
            for name in SHOWN
        ]
        cells = [entry["task"], f"`{entry['family']}`", entry["method"], *values, str(entry["setting"]["nfe"])]
        rows.append(f"| {' | '.join(cells)} |")
    (HERE / "digits.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
