"""Minimum sample sizes of metrics, for early checks."""

from __future__ import annotations

from genzoo.metrics.features import FeatureNetwork

K, K_COVERAGE = 3, 5  # nearest neighbours for precision and recall, and for density and coverage
MIN_SAMPLES = K_COVERAGE + 1  # minimum number of events for nearest-neighbour metrics


class TooFewSamplesError(ValueError):
    """Too few samples for a metric; the message is one line."""

    exit_code = 2  # of the command line


def check_references(sizes: dict[str, int], network: FeatureNetwork | None, force: bool) -> None:
    """Reject data if every split has fewer images than the network has features.

    Args:
        sizes: of the splits, by name.
        network: the feature network, if any.
        force: whether to accept smaller splits, with flagged distances.

    Raises:
        TooFewSamplesError: with the names of the splits.
    """
    if network is not None and not force and all(n < network.dim for n in sizes.values()):
        raise TooFewSamplesError(
            f"{small_splits(sizes, network)}; add images, or set metrics.force=true to report a flagged distance"
        )


def small_splits(sizes: dict[str, int], network: FeatureNetwork) -> str | None:
    """Describe the splits that are too small for a Frechet distance; None if there are none."""
    few = [f"{name} ({n} real images)" for name, n in sizes.items() if n < network.dim]
    if not few:
        return None
    return f"data: {' and '.join(few)} smaller than the feature dimension {network.dim} of {network.name}: no Frechet distance"


def check_sample_size(n: int, network: FeatureNetwork | None, force: bool) -> None:
    """Reject too few samples for nearest neighbours or, unless forced, for a nonsingular covariance.

    Raises:
        TooFewSamplesError: for fewer than ``MIN_SAMPLES`` samples, or fewer than features.
    """
    if n < MIN_SAMPLES:
        raise TooFewSamplesError(f"metrics.n={n}: at least {MIN_SAMPLES} samples are needed (0 skips sample metrics)")
    if network is not None and n < network.dim and not force:
        raise TooFewSamplesError(
            f"metrics.n={n}: fewer samples than the feature dimension {network.dim} of {network.name}, too few for a Frechet "
            f"distance; draw at least {network.dim}, or set metrics.force=true to report a flagged distance"
        )
