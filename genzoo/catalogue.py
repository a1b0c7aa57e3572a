"""Catalogue of all metrics: name, unit, direction and definition.

A name may contain ``{split}``, the reference split, ``{scored}``, the split of densities, and ``{network}``, the feature
network. On Inception-v3 the part ``_{network}`` is omitted, and some metrics have another name.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, Literal

Direction = Literal["lower", "higher", "neither"]


@dataclass(frozen=True)
class Metric:
    """A metric, possibly for each split and network."""

    name: str  # in result files
    label: str  # displayed name, without the split
    unit: str
    better: Direction
    meaning: str
    source: str  # paper of its definition, or empty
    inception: tuple[str, str] | None = None  # different name and label on Inception features
    noise_leads: bool = False  # poor samples may be best, so that it is not ranked

    @property
    def base(self) -> str:
        """Name without split and network."""
        return self.name.removeprefix("{split}/").removeprefix("{scored}/").replace("_{network}", "")

    @property
    def variants(self) -> tuple[tuple[str, str], ...]:
        """Name and label, and those on Inception features."""
        if "{network}" not in self.name:
            return ((self.name, self.label),)
        inception = self.inception or (self.name.replace("_{network}", ""), self.label.replace(" ({network})", ""))
        return (self.name, self.label), inception

    def on(self, network: str | None) -> str:
        """Name on the features of a network (None for Inception), without the split."""
        (name, _), (of_inception, _) = self.variants
        chosen = of_inception if network is None else name.replace("{network}", network)
        return chosen.removeprefix("{split}/")


FRECHET = "Heusel et al. 2017, https://arxiv.org/abs/1706.08500"
UNBIASED = "Chong, Forsyth 2020, https://arxiv.org/abs/1911.07023"
KERNEL = "Binkowski et al. 2018, https://arxiv.org/abs/1801.01401"
INCEPTION = "Salimans et al. 2016, https://arxiv.org/abs/1606.03498"
MANIFOLD = "Kynkaanniemi et al. 2019, https://arxiv.org/abs/1904.06991"
BALLS = "Naeem et al. 2020, https://arxiv.org/abs/2002.09797"
ACCURACY = "Shmelkov, Schmid, Alahari 2018, https://arxiv.org/abs/1807.09499"
PER_CLASS = "Miyato, Koyama 2018, https://arxiv.org/abs/1802.05637"
JOINT = "Grathwohl et al. 2020, https://arxiv.org/abs/1912.03263"
BIDIRECTIONAL = "Grosse, Ghahramani, Adams 2015, https://arxiv.org/abs/1511.02543"
GUIDED = "Dhariwal, Nichol 2021, https://arxiv.org/abs/2105.05233"
SLICED = "Bonneel et al. 2015, https://doi.org/10.1007/s10851-014-0506-3"
MMD = "Gretton et al. 2012, https://jmlr.org/papers/v13/gretton12a.html"
AUTHENTIC = "Alaa et al. 2022, https://arxiv.org/abs/2102.08921"
COPIED = "Yoon et al. 2023, https://openreview.net/forum?id=shciCbSk9h"
CONTRASTIVE = "Radford et al. 2021, https://arxiv.org/abs/2103.00020"
CLIP_SCORE = "Hessel et al. 2021, https://arxiv.org/abs/2104.08718"
SSIM = "Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861"
ATTRIBUTES = "Cho, Zala, Bansal 2023, https://arxiv.org/abs/2202.04053"
LIKELIHOOD = "Theis, van den Oord, Bethge 2016, https://arxiv.org/abs/1511.01844"

COSTS = ("sampling/", "model/", "training/")  # metrics of cost, not of quality

# Suffixes of labels
SPLITS = {"test": " to test", "train": " to train", "validation": " to validation"}
SCORED = {"validation": " of validation"}

# Suffixes of the names of likelihood metrics, with their kind and meaning.
BOUNDS = {
    "": ("exact", "negative log density"),
    "_upper": ("upper bound", "upper bound of the negative log density"),
    "_estimate": ("unbiased estimate", "unbiased estimate of the negative log density"),
    "_upper_estimate": (
        "estimate of an upper bound",
        "unbiased estimate of an upper bound of the negative log density",
    ),
}

METRICS = (
    *(
        Metric(
            f"{{scored}}/bpd{end}", f"bits/dim ({kind})", "bits/dim", "lower", f"{meaning} of dequantised images", LIKELIHOOD,
        )
        for end, (kind, meaning) in BOUNDS.items()
    ),
    *(
        Metric(f"{{scored}}/nll{end}", f"nats ({kind})", "nats", "lower", f"{meaning} of vectors", LIKELIHOOD)
        for end, (kind, meaning) in BOUNDS.items()
    ),
    Metric(
        "{scored}/nll_truth", "nats (data distribution)", "nats", "lower",
        "negative log density of the data distribution: an estimate of the entropy, the lower bound of all models", LIKELIHOOD,
    ),
    Metric(
        "partition/log_z_lower", "log Z, from below", "nats", "neither",
        "lower bound, in expectation, of the log normaliser by annealed importance sampling, mean over conditions",
        BIDIRECTIONAL,
    ),
    Metric(
        "partition/log_z_upper", "log Z, from above", "nats", "neither",
        "upper bound, in expectation, of the log normaliser by reverse annealed importance sampling, up to the convergence of "
        "the chains that it starts from; mean over conditions", BIDIRECTIONAL,
    ),
    Metric(
        "{split}/fd_{network}", "FD ({network})", "squared distance", "lower",
        "Frechet distance of the normal distributions with mean and covariance of the features", FRECHET,
        inception=("{split}/fid", "FID"),
    ),
    Metric(
        "{split}/fd_{network}_infinity", "FD of infinitely many samples ({network})", "squared distance", "lower",
        "Frechet distance, extrapolated to infinitely many samples", UNBIASED,
        inception=("{split}/fid_infinity", "FID of infinitely many samples"),
    ),
    Metric(
        "{split}/kd_{network}", "KD ({network})", "squared MMD", "lower",
        "kernel distance: unbiased squared MMD of the features with a cubic polynomial kernel, mean over subsets", KERNEL,
        inception=("{split}/kid", "KID"),
    ),
    Metric(
        "{split}/precision_{network}", "precision ({network})", "share", "higher",
        "fraction of samples in the k-nearest-neighbour balls of the data", MANIFOLD, noise_leads=True,
    ),
    Metric(
        "{split}/recall_{network}", "recall ({network})", "share", "higher",
        "fraction of data in the k-nearest-neighbour balls of the samples", MANIFOLD,
    ),
    Metric(
        "{split}/density_{network}", "density ({network})", "share", "higher",
        "mean number of data balls that contain a sample, over k; may exceed 1", BALLS, noise_leads=True,
    ),
    Metric(
        "{split}/coverage_{network}", "coverage ({network})", "share", "higher",
        "fraction of data balls that contain a sample", BALLS,
    ),
    Metric(
        "{split}/class_score_{network}", "class score ({network})", "classes", "higher",
        "exponential of the mutual information between sample and predicted class", INCEPTION,
        inception=("{split}/is", "IS"),
    ),
    Metric(
        "{split}/class_accuracy_{network}", "class accuracy ({network})", "share", "higher",
        "fraction of samples classified as the class they were conditioned on", ACCURACY,
    ),
    Metric(
        "{split}/fd_per_class_{network}", "FD per class ({network})", "squared distance, mean over classes", "lower",
        "Frechet distance within each class, mean over classes", PER_CLASS,
    ),
    Metric(
        "{split}/recall_per_class_{network}", "recall per class ({network})", "share, mean over classes", "higher",
        "recall within each class, mean over classes: the diversity that is left once the class is given", MANIFOLD,
    ),
    Metric(
        "{split}/sliced_wasserstein", "sliced wasserstein", "distance", "lower",
        "Wasserstein-2 distance of projections, root mean square over directions", SLICED,
    ),
    Metric(
        "{split}/mmd", "MMD", "squared MMD", "lower",
        "unbiased squared maximum mean discrepancy with a Gaussian kernel", MMD,
    ),
    Metric(
        "memorisation/nearest_ratio", "nearest ratio (memorisation)", "samples' over test's", "neither",
        "median distance of samples to the nearest training example, over that of test examples", "",
        noise_leads=True,
    ),
    Metric(
        "memorisation/authentic", "authentic (memorisation)", "share", "higher",
        "fraction of samples farther from the nearest training example than that is from its own nearest neighbour", AUTHENTIC,
        noise_leads=True,
    ),
    Metric(
        "memorisation/copied", "copied (memorisation)", "share", "lower",
        "fraction of samples whose nearest training example is less than a third as far as the second nearest", COPIED,
        noise_leads=True,
    ),
    Metric(
        "memorisation/shifted", "shifted (memorisation)", "share", "lower",
        "fraction of copied samples up to a shift by a pixel", COPIED, noise_leads=True,
    ),
    Metric(
        "memorisation/exact_copies", "exact copies (memorisation)", "samples", "lower",
        "number of samples equal to a training example", "", noise_leads=True,
    ),
    Metric(
        "reconstruction/mse", "MSE of reconstructions", "on [0, 1]", "lower",
        "mean squared error of reconstructed images", "",
    ),
    Metric(
        "reconstruction/psnr", "PSNR of reconstructions", "dB", "higher",
        "peak signal-to-noise ratio of reconstructed images", "",
    ),
    Metric(
        "reconstruction/ssim", "SSIM of reconstructions", "1 is alike", "higher",
        "structural similarity of reconstructed images", SSIM,
    ),
    Metric(
        "text/attributes", "attributes right", "share", "higher",
        "fraction of samples for training captions, all of whose attributes a checker reads as in their captions", ATTRIBUTES,
    ),
    Metric(
        "text/held_out", "attributes right, held-out captions", "share", "higher",
        "fraction of samples for captions of the test split, all of whose attributes are right", ATTRIBUTES,
    ),
    Metric(
        "classifier/accuracy", "accuracy", "share", "higher",
        "fraction of test examples that a classifier assigns to their class, without noise", GUIDED,
    ),
    Metric(
        "classifier/cross_entropy", "cross-entropy", "nats", "lower",
        "mean of -log p(y | x) over test examples", JOINT,
    ),
    Metric(
        "classifier/accuracy_noisy", "accuracy on noisy data", "share", "higher",
        "fraction of noisy test examples assigned to their class, at uniform angles of signal and noise", GUIDED,
    ),
    Metric(
        "classifier/cross_entropy_noisy", "cross-entropy on noisy data", "nats", "lower",
        "mean of -log p(y | x_t) over noisy test examples, at uniform angles of signal and noise", GUIDED,
    ),
    Metric(
        "text/clip_score_{network}", "CLIP score ({network})", "2.5 max(cos, 0)", "higher",
        "agreement of samples with their captions in the space of a contrastive network", CLIP_SCORE,
    ),
    Metric(
        "retrieval/loss", "contrastive loss", "nats", "lower",
        "mean of -log of the probability of the right text and of the right image, among candidates", CONTRASTIVE,
    ),
    Metric(
        "retrieval/image_to_text", "text of an image", "share", "higher",
        "fraction of test images whose text has the largest cosine among candidates with distinct texts", CONTRASTIVE,
    ),
    Metric(
        "retrieval/text_to_image", "image of a text", "share", "higher",
        "fraction of test texts whose image has the largest cosine among candidates with distinct texts", CONTRASTIVE,
    ),
    Metric(
        "retrieval/loss_noisy", "contrastive loss of noisy data", "nats", "lower",
        "contrastive loss of noisy test examples, at uniform angles of signal and noise", CONTRASTIVE,
    ),
    Metric(
        "retrieval/image_to_text_noisy", "text of a noisy image", "share", "higher",
        "fraction of noisy test images whose text has the largest cosine, at uniform angles of signal and noise", CONTRASTIVE,
    ),
    Metric(
        "sampling/samples_per_second", "samples per second", "samples/s", "higher",
        "throughput of sampling in batches, on the machine of the protocol", "",
    ),
    Metric("sampling/nfe", "NFE", "evaluations", "lower", "network evaluations per sample", ""),
    Metric("model/parameters", "parameters", "weights", "lower", "parameters of the model", ""),
    Metric("training/images", "training images", "images", "lower", "training examples processed, with repetitions", ""),
    Metric("training/seconds", "training seconds", "s", "lower", "time of the training steps", ""),
    Metric("training/flops", "training FLOPs", "FLOPs", "lower", "floating-point operations of the training steps", ""),
)  # fmt: skip
BY_BASE = {metric.base: metric for metric in METRICS}


@functools.cache
def _patterns() -> list[tuple[re.Pattern[str], Metric, str]]:
    """Patterns of all names, the longest fixed part first, since ``fd_{network}`` matches other names too."""
    found = [(name, metric, label) for metric in METRICS for name, label in metric.variants]
    found.sort(key=lambda entry: -len(re.sub(r"\{\w+\}", "", entry[0])))
    variables = {
        "{split}": "(?P<split>train|validation|test|all)",
        "{scored}": "(?P<scored>validation|test)",
        "{network}": r"(?P<network>\w+)",
    }
    return [
        (
            re.compile("".join(variables.get(part) or re.escape(part) for part in re.split(r"(\{\w+\})", name))),
            metric,
            label,
        )
        for name, metric, label in found
    ]


@functools.lru_cache(4096)
def _find(name: str) -> tuple[Metric, str] | None:
    for pattern, metric, label in _patterns():
        if match := pattern.fullmatch(name):
            parts = match.groupdict(default="")
            of = SPLITS.get(parts.get("split", ""), "") + SCORED.get(parts.get("scored", ""), "")
            return metric, label.replace("{network}", parts.get("network", "")) + of
    return None


def lookup(name: str) -> Metric:
    """Return the metric of a name in a result file.

    Raises:
        KeyError: for an unknown name.
    """
    if found := _find(name):
        return found[0]
    raise KeyError(f"{name}: not a metric of the catalogue")


def declared(name: str) -> Metric | None:
    """Return the metric of a name, or None if it is not in the catalogue."""
    found = _find(name)
    return found[0] if found else None


def label(name: str) -> str | None:
    """Return the label of a name, with network and split, or None if it is not in the catalogue."""
    found = _find(name)
    return found[1] if found else None


def direction(name: str, recorded: Any = None) -> Literal["lower", "higher"] | None:
    """Return the better direction, or None.

    Args:
        name: in a result file.
        recorded: direction in the file, for names that are not in the catalogue.
    """
    metric = declared(name)
    better = metric.better if metric else recorded
    return better if better in ("lower", "higher") else None


def is_cost(name: str) -> bool:
    """Whether a metric measures cost, not quality."""
    return name.startswith(COSTS)
