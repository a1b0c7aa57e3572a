"""Peak memory of the statistics of a Frechet distance: `python experiments/benchmarks/frechet_memory.py`.

Features of 2,048 dimensions arrive in batches of 250; each count of them runs in a process of its own.
"""

from __future__ import annotations

import resource
import subprocess
import sys

COUNTS = (5_000, 50_000)


def main() -> None:
    """Print the peak for each count; as a child, take the statistics of one."""
    if len(sys.argv) > 1:
        import torch

        from genzoo.metrics.frechet import FeatureMoments

        torch.set_num_threads(1)
        metric = FeatureMoments(2048)
        for start in range(0, int(sys.argv[1]), 250):
            metric.update(torch.randn(250, 2048, generator=torch.Generator().manual_seed(start)))
        assert metric.compute().n == int(sys.argv[1])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    for count in COUNTS:
        said = subprocess.run([sys.executable, __file__, str(count)], check=True, capture_output=True, text=True)
        print(f"{count:,} x 2048: {said.stdout.strip()} MiB")


if __name__ == "__main__":
    main()
