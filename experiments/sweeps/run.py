"""Twenty jobs of which five fail, each in another way; then the same sweep once more, with the cause removed.

    python experiments/sweeps/run.py

Checks that fifteen finish and each failure is named, that the second start runs exactly the five, and that no byte of the
finished runs has changed. Takes about ten minutes on one core; writes ``results.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORDS = [
    *("-m", "--config-dir", str(HERE / "conf"), "model=faulty", "data=moons", "seed=" + ",".join(map(str, range(20)))),
    *("budget.images=640", "trainer.batch_size=64", "trainer.threads=1", "trainer.grids=0"),
    *("metrics.n=100", "metrics.events=16", "timeout=60"),
]


def sweep(folder: str, **environment: str) -> tuple[int, str]:
    """Start the sweep; return its exit code and all that it wrote."""
    path = os.pathsep.join(filter(None, [str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "genzoo", *WORDS, "outputs=runs"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def finished(folder: str) -> dict[str, str]:
    """Return the SHA-256 of every file of every finished run."""
    runs = [path.parent for path in Path(folder).glob("runs/*/*/status.json") if '"state": "done"' in path.read_text()]
    files = [path for run in runs for path in sorted(run.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def runs_in(files: dict[str, str]) -> set[str]:
    return {name.split("/")[2] for name in files}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        code, said = sweep(folder)
        causes = {
            int(seed): cause
            for seed, cause in re.findall(r"^genzoo: job .*seed=(\d+) .*?runs: (.*)$", said, re.MULTILINE)
        }
        first = finished(folder)
        again_code, again = sweep(folder, GENZOO_CURED="1")
        second = finished(folder)
        results = {
            "jobs": 20,
            "finished": len(runs_in(first)),
            "failed": causes,
            "exit_code": code,
            "second_start": {
                "done_before": again.count("already done: "),
                "run": len(runs_in(second)) - len(runs_in(first)),
                "exit_code": again_code,
            },
            "files_of_finished_runs": len(first),
            "files_changed_by_the_second_start": sum(second.get(name) != digest for name, digest in first.items()),
            "minutes": round((time.monotonic() - started) / 60, 1),
        }
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    right = (
        results["finished"] == 15
        and sorted(causes) == [2, 5, 8, 11, 14]
        and results["second_start"] == {"done_before": 15, "run": 5, "exit_code": 0}
        and results["files_changed_by_the_second_start"] == 0
        and code != 0
    )
    sys.exit(0 if right else f"not as promised:\n{said[-3000:]}\n{again[-3000:]}")


if __name__ == "__main__":
    main()
