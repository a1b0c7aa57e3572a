r"""How certain a ranking is: of the best row, of every rank, and of each mean.

Rows i = 1..k have means m_i of independent seeds with standard errors s_i and f_i degrees of freedom. Two rows are compared by
Welch's test, whose p-value p_ij is two-sided.

    winner      the row with the best mean, if it differs from each other row at 5 %. All k - 1 tests have to be significant, so
                that none needs a correction: a false winner is named in at most 5 % of tables (an intersection-union test).
    ranks       row i has the ranks 1 + #{j significantly better} to k - #{j significantly worse}, with Holm's correction of
                all k (k - 1)/2 tests: in 95 % of tables, every rank is in its interval.
    intervals   m_i +- t s_i with the quantile of level 1 - 0.05/(2 k) (Bonferroni): in 95 % of tables, all means are inside.
    P(best)     the probability that a row's true mean is the best, if each is m_i + s_i t(f_i) (Behrens-Fisher posterior of a
                flat prior), from 20,000 draws. No test: it is highest for the row with the best mean, even among equals.

A mean of one run has the error of its measurement alone, of normal distribution, which is not that between seeds. Rows of two
seeds are not tested.

References:
    Welch 1947, Biometrika 34, https://doi.org/10.1093/biomet/34.1-2.28.
    Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure", https://www.jstor.org/stable/4615733.
    Berger 1982, Technometrics 24, https://doi.org/10.1080/00401706.1982.10487790 (intersection-union tests).
    Al Mohamad, Goeman, van Zwet 2018, "Simultaneous Confidence Intervals for Ranks", https://arxiv.org/abs/1708.02729.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.05
DRAWS = 20_000


class Mean(Protocol):
    """The mean of a metric over the runs of a row, see ``genzoo.report.leaderboard.Cell``."""

    @property
    def mean(self) -> float | None: ...
    @property
    def stderr(self) -> float | None: ...
    @property
    def better(self) -> str | None: ...
    @property
    def freedom(self) -> float: ...
    @property
    def testable(self) -> bool: ...


class Standing(NamedTuple):
    """What is known of a row among the tested rows of a column.

    Attributes:
        ranks: first and last rank, 1 the best.
        interval: of the mean, simultaneous over the rows.
        best: the probability that its true mean is the best.
    """

    ranks: tuple[int, int]
    interval: tuple[float, float]
    best: float


def is_tested(mean: Mean) -> bool:
    """Whether a mean has an error that tests may use."""
    return mean.mean is not None and mean.stderr is not None and mean.testable and mean.better in ("lower", "higher")


def welch(a: Mean, b: Mean) -> float:
    """Return the two-sided p-value of two means being equal; 1 if an error is missing."""
    assert a.mean is not None and b.mean is not None
    if a.stderr is None or b.stderr is None:
        return 1.0
    difference, variance = abs(a.mean - b.mean), a.stderr**2 + b.stderr**2
    if variance == 0:
        return float(difference == 0)
    inverse = sum((c.stderr**2 / variance) ** 2 / c.freedom for c in (a, b) if c.stderr)
    freedom = 1 / inverse if inverse > 0 else math.inf
    return 2 * float(stdtr(freedom, -difference / math.sqrt(variance)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number; those below a level are significant at it, simultaneously."""
    adjusted, largest, count = [0.0] * len(p_values), 0.0, len(p_values)
    for done, i in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (count - done) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def standings(means: Sequence[Mean], level: float = LEVEL, draws: int = DRAWS) -> list[Standing | None]:
    """Return the standing of each row; None for those that are not tested, and for all if fewer than two are.

    Args:
        means: of one metric, with the same direction.
        level: of all tests and intervals together.
        draws: for the probabilities of being the best.
    """
    tested = [i for i, mean in enumerate(means) if is_tested(mean)]
    if len(tested) < 2:
        return [None] * len(means)
    chosen = [means[i] for i in tested]
    k, sign = len(chosen), -1.0 if chosen[0].better == "higher" else 1.0
    m, s, f = (np.array([getattr(c, name) for c in chosen], float) for name in ("mean", "stderr", "freedom"))
    m = sign * m  # the lowest is the best
    pairs = list(itertools.combinations(range(k), 2))
    adjusted = holm([welch(chosen[i], chosen[j]) for i, j in pairs])
    better = np.zeros((k, k), bool)  # row i is significantly better than row j
    for (i, j), p in zip(pairs, adjusted, strict=True):
        if p < level:
            better[(i, j) if m[i] < m[j] else (j, i)] = True
    first, last = 1 + better.sum(0), k - better.sum(1)
    rng = np.random.default_rng(0)
    finite = np.where(np.isfinite(f), f, 1e9)
    drawn = m + s * rng.standard_t(finite, (draws, k))
    wins = np.bincount(drawn.argmin(1), minlength=k) / draws
    half = s * np.array([stdtrit(min(freedom, 1e9), 1 - level / (2 * k)) for freedom in f])
    found: list[Standing | None] = [None] * len(means)
    for place, i in enumerate(tested):
        low, high = sorted((sign * (m[place] - half[place]), sign * (m[place] + half[place])))
        ranks = int(first[place]), int(last[place])
        found[i] = Standing(ranks, (float(low), float(high)), float(wins[place]))
    return found


def winner(means: Sequence[Mean], level: float = LEVEL) -> int | None:
    """Return the row that is better than each other one; None where none is, or a row cannot be tested.

    Args:
        means: of one metric, with the same direction.
        level: the largest probability of naming a false winner.
    """
    if len(means) < 2 or not all(map(is_tested, means)):
        return None
    sign = -1.0 if means[0].better == "higher" else 1.0
    best = min(range(len(means)), key=lambda i: sign * (means[i].mean or 0.0))
    others = (mean for i, mean in enumerate(means) if i != best)
    return best if all(welch(means[best], other) < level for other in others) else None
