"""How many samples a comparison needs: light to import, since it is asked before anything takes long."""

from __future__ import annotations

from genzoo.metrics.features import FeatureNetwork

K, K_COVERAGE = 3, 5  # neighbours, of precision and recall and of density and coverage
LEAST = K_COVERAGE + 1  # events of a set in which all have neighbours


class TooFew(ValueError):
    """Fewer samples than a distance needs; the message is one line."""

    exit_code = 2  # of the command line


def check_references(sizes: dict[str, int], network: FeatureNetwork | None, force: bool) -> None:
    """Refuse data of which no split has as many images as the network has features.

    Args:
        sizes: of the splits, by name.
        network: what features are made of; None for none.
        force: whether distances from smaller ones are wanted, and marked.

    Raises:
        TooFew: naming the splits.
    """
    if network is not None and not force and all(n < network.dim for n in sizes.values()):
        raise TooFew(f"{too_small(sizes, network)}; add images, or say metrics.force=true and have the number marked")


def too_small(sizes: dict[str, int], network: FeatureNetwork) -> str | None:
    """Say which splits are smaller than a Frechet distance needs; None where none is."""
    few = [f"{name} ({n} real images)" for name, n in sizes.items() if n < network.dim]
    if not few:
        return None
    return f"data: {' and '.join(few)} smaller than the {network.dim} features of {network.name} that a Frechet distance needs"


def check_enough(n: int, network: FeatureNetwork | None, force: bool) -> None:
    """Refuse samples without neighbours, and a Frechet distance from the singular covariance of fewer samples than features.

    Raises:
        TooFew: the second unless forced.
    """
    if n < LEAST:
        raise TooFew(f"metrics.n={n}: {LEAST} samples are the least that can be compared; 0 for none")
    if network is not None and n < network.dim and not force:
        raise TooFew(
            f"metrics.n={n}: fewer samples than the {network.dim} features of {network.name}, of which no Frechet distance "
            f"can be trusted; draw at least {network.dim}, or say metrics.force=true and have the number marked"
        )
