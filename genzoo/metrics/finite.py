"""Refuse numbers that are not finite before they enter a score.

Comparisons with NaN are false, so that one of them makes a share of neighbours 0 without a word, and every mean NaN.
"""

from __future__ import annotations

from torch import Tensor


class NotFinite(ValueError):
    """Values that are not finite among what is scored; the message is one line."""

    exit_code = 3  # of the command line


def check_finite(**sets: Tensor) -> None:
    """Check sets of events or features, (N, ...) each, by their names.

    Raises:
        NotFinite: with the name of the set and how many of its rows hold NaN or infinity.
    """
    for name, x in sets.items():
        if x.dtype.is_floating_point and not bool(x.isfinite().all()):
            broken = int((~x.isfinite().flatten(1).all(1)).sum()) if x.dim() > 1 else int((~x.isfinite()).sum())
            raise NotFinite(
                f"{broken} of {len(x)} {name.replace('_', ' ')} are not finite: no score can be made of them"
            )
