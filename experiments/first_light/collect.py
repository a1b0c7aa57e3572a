"""Copy what a reader needs of finished runs: `python experiments/first_light/collect.py RUN [RUN ...]`.

For each run: its grid of samples as <model>.png, and its configuration, status and scores in results.json.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from genzoo.runs import Run

HERE = Path(__file__).parent


def main() -> None:
    """Collect the runs named on the command line."""
    path = HERE / "results.json"
    collected = json.loads(path.read_text()) if path.is_file() else {}
    for run in map(Run, sys.argv[1:]):
        model = run.path.parent.name.partition("-")[0]
        shutil.copyfile(run.path / "samples.png", HERE / f"{model}.png")
        collected[model] = {"config": run.config, "status": run.status, "result": run.result}
    path.write_text(json.dumps(collected, indent=1) + "\n")


if __name__ == "__main__":
    main()
