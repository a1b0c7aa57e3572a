"""Reject non-finite values before they enter a metric.

Comparisons with NaN are false, so that NaN features would silently lower metrics of nearest neighbours.
"""

from __future__ import annotations

from torch import Tensor


class NonFiniteError(ValueError):
    """Non-finite values in the input of a metric; the message is one line."""

    exit_code = 3  # of the command line


def check_finite(**sets: Tensor) -> None:
    """Check named sets of events or features, (N, ...) each.

    Raises:
        NonFiniteError: with the name of the set and the number of non-finite rows.
    """
    for name, x in sets.items():
        if x.dtype.is_floating_point and not bool(x.isfinite().all()):
            broken = int((~x.isfinite().flatten(1).all(1)).sum()) if x.dim() > 1 else int((~x.isfinite()).sum())
            raise NonFiniteError(f"{broken} of {len(x)} {name.replace('_', ' ')} are not finite: metrics are undefined")
