"""Does every score move the way it should? `python experiments/evaluation/sanity.py`.

Pictures of Fashion-MNIST are spoilt in known ways and scored with the embedded network against the training split; a table and
results.json say what moved where, and a direction that is wrong stops the script.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from genzoo.data import fashion_mnist
from genzoo.evaluation import samples as evaluator
from genzoo.metrics.features import cache_folder, feature_network
from genzoo.metrics.reference import reference

HERE = Path(__file__).parent
N = 5000
CACHE = cache_folder() / "references"


def blurred(x: Tensor) -> Tensor:
    """Smooth with a Gaussian window of one pixel."""
    window = torch.exp(-0.5 * torch.arange(-3, 4, dtype=torch.float32) ** 2)
    window = torch.outer(window, window) / window.sum() ** 2
    return F.conv2d(x.float(), window[None, None], padding=3).round().clamp(0, 255).to(torch.uint8)


def shifted(x: Tensor, by: int = 3) -> Tensor:
    """Move to the right."""
    return F.pad(x, (by, 0))[..., :-by]


def grainy(x: Tensor, sigma: float = 8.0) -> Tensor:
    """Add a little noise."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return (x.float() + sigma * noise).round().clamp(0, 255).to(torch.uint8)


def main() -> None:
    """Spoil, score, compare."""
    torch.set_num_threads(1)
    data, network = fashion_mnist("data"), feature_network("fashion_mnist")
    real = reference("fashion_mnist/train", data.train.x, data.train.y, network, CACHE)
    test, train = data.test.x[:N], data.train.x[evaluator.subset(len(data.train.x), N)]
    half = data.test.x[data.test.y < 5]
    cases = {
        "test split": test,
        "test split, blurred": blurred(test),
        "test split, shifted by 3": shifted(test),
        "test split, 5 of 10 classes": torch.cat([half, half])[:N],
        "test split, 500 images 10 times": test[:500].repeat(10, 1, 1, 1),
        "noise": torch.randint(0, 256, test.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
        "copies of the training split": train,
        "the same, mirrored": train.flip(-1),
        "the same, with grain": grainy(train),
    }
    rows: dict[str, dict] = {}
    for name, x in cases.items():
        scores = evaluator.against(network.extract(x), real, network)
        copies, warning = evaluator.of_copies(x, data.train.x, data.test.x, True, "fashion_mnist", CACHE)
        rows[name] = {key.replace("_fashion_mnist", ""): m.value for key, m in (scores | copies).items()}
        rows[name] |= {"fd_stderr": scores["fd_fashion_mnist"].stderr, "warning": warning}
        print(name, rows[name], flush=True)
    base = rows["test split"]
    for name in ("blurred", "shifted by 3", "5 of 10 classes", "500 images 10 times"):
        assert rows[f"test split, {name}"]["fd"] > base["fd"] + 4 * base["fd_stderr"], name
    assert rows["noise"]["fd"] == max(row["fd"] for row in rows.values())
    for name in ("test split, blurred", "test split, shifted by 3", "noise"):
        assert rows[name]["precision"] < base["precision"] and rows[name]["density"] < base["density"], name
    for name in ("5 of 10 classes", "500 images 10 times"):
        spoilt = rows[f"test split, {name}"]
        assert spoilt["recall"] < base["recall"] and spoilt["coverage"] < base["coverage"], name
        assert abs(spoilt["precision"] - base["precision"]) < 0.05, name
    for name, row in rows.items():
        copied = "copies" in name or "the same" in name
        assert (row["warning"] is not None) == copied, name
        assert not copied or (row["copied"] > 0.5 and row["nearest_ratio"] < 0.5 * base["nearest_ratio"]), name
    (HERE / "results.json").write_text(json.dumps({"n": N, "cases": rows}, indent=1) + "\n")
    columns = (
        "fd",
        "fd_infinity",
        "kd",
        "precision",
        "recall",
        "density",
        "coverage",
        "nearest_ratio",
        "authentic",
        "copied",
    )
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[c]:.3f}" for c in columns) + " |")


if __name__ == "__main__":
    main()
