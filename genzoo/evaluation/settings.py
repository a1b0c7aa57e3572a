"""What an evaluation computes, and on which data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from genzoo.data import DataSet

MAX_NFE = 50  # of the network that a sample may take where nothing else is set


@dataclass(frozen=True)
class EvalSettings:
    """Settings of an evaluation.

    Args:
        n: samples that are drawn and compared with the splits; 0 for none.
        events: of the test split whose density and reconstruction are scored; None for all.
        num_samples: draws that a bound or an estimate of the density uses for each event.
        batch_size: of everything.
        throughput: samples drawn to measure the speed of sampling.
        max_nfe: network evaluations a sample may take, else Heun's sampler in 25 steps is used; None for no limit.
        features: feature network, "inception", "dinov2", "fashion_mnist", "digits", "identity" of vectors; "auto" for the
            embedded network that fits the data, else Inception; None for no distances.
        force: whether to compute a Frechet distance of fewer samples than features; it is marked then.
        inception_weights: a file of torch-fidelity's; None to find or download the published one.
        dinov2_weights: a checkpoint of timm's vit_large_patch14_dinov2.
    """

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
    """The data that a model is scored on."""

    data: DataSet
    name: str
    flip: bool  # whether training used mirror images
