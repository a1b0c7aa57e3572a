"""How many samples a comparison needs: light to import, since it is asked before anything takes long."""

from __future__ import annotations

from genzoo.metrics.features import FeatureNetwork

K, K_COVERAGE = 3, 5  # neighbours, of precision and recall and of density and coverage
LEAST = K_COVERAGE + 1  # events of a set in which all have neighbours


class TooFew(ValueError):
    """Fewer samples than a distance needs; the message is one line."""

    exit_code = 2  # of the command line


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
