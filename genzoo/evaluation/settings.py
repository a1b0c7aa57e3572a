"""Settings and data of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from genzoo.data.dataset import DataSet, HeldOut

MAX_NFE = 50  # default limit of network evaluations per sample


@dataclass(frozen=True)
class EvalSettings:
    """Settings of an evaluation.

    Args:
        split: that densities, reconstructions and samples are scored on: "test", or "validation" for choices.
        n: number of samples for sample-based metrics; 0 skips them.
        events: number of examples of the split for density and reconstruction; None for all.
        num_samples: draws per example of a bound or an estimate of the density.
        batch_size: of all computations.
        throughput: number of samples to measure the sampling speed.
        max_nfe: largest NFE per sample, above which Heun's sampler in 25 steps is used; None for no limit.
        features: feature network, "inception", "dinov2", "fashion_mnist", "digits", or "identity" for vectors; "auto" for the
            embedded network of the data set, else Inception; None for no feature-based metrics.
        force: whether to compute a (marked) Frechet distance of fewer samples than features.
        inception_weights: weight file of torch-fidelity; None to find or download the published one.
        dinov2_weights: checkpoint of timm's vit_large_patch14_dinov2.
    """

    split: HeldOut = "test"
    n: int = 1000
    events: int | None = 1000
    num_samples: int = 20
    batch_size: int = 250
    throughput: int = 64
    max_nfe: int | None = MAX_NFE
    features: str | None = "auto"
    force: bool = False
    inception_weights: str | None = None
    dinov2_weights: str | None = None


class EvalData(NamedTuple):
    """The data of an evaluation."""

    data: DataSet
    name: str
    flip: bool  # whether training used horizontal flips
