"""Error rates of the statements on ranks, on simulated tables whose truth is known."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
from scipy import stats

from genzoo.report import texts
from genzoo.report.certainty import holm, standings, welch, winner
from tests.report import run, scored
from tests.report.test_leaderboard import tables_of


class Mean(NamedTuple):
    mean: float | None
    stderr: float | None
    freedom: float
    better: str | None = "lower"
    testable: bool = True


def simulated(truth: np.ndarray, spread: np.ndarray, seeds: int, rng: np.random.Generator) -> list[Mean]:
    """The means of a table whose rows have some true means and spreads between seeds."""
    x = truth + spread * rng.standard_normal((seeds, len(truth)))
    errors = x.std(0, ddof=1) / math.sqrt(seeds)
    return [Mean(float(m), float(s), seeds - 1) for m, s in zip(x.mean(0), errors, strict=True)]


LAWS = {
    "equal rows": (np.zeros(9), np.ones(9)),
    "unequal spreads": (np.zeros(6), np.array([0.1, 0.3, 1.0, 3.0, 10.0, 0.5])),
    "two equal best rows": (np.array([0.0, 0, 9, 9, 9]), np.ones(5)),
    "two rows": (np.zeros(2), np.ones(2)),
}


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("law", LAWS)
def test_statements_that_hold_with_95_percent_fail_in_at_most_5(law, seeds):
    truth, spread = LAWS[law]
    rng, tables = np.random.default_rng(seeds), 1000
    named = wrong_ranks = outside = 0
    for _ in range(tables):
        means = simulated(truth, spread, seeds, rng)
        found = standings(means, draws=2)
        named += winner(means) is not None
        for i, standing in enumerate(found):
            # A row has every rank that it shares with equal ones.
            first, last = 1 + (truth < truth[i]).sum(), (truth <= truth[i]).sum()
            if standing.ranks[0] > first or standing.ranks[1] < last:
                wrong_ranks += 1
                break
        outside += any(not s.interval[0] <= t <= s.interval[1] for s, t in zip(found, truth, strict=True))
    most = stats.binom.ppf(0.999, tables, 0.05)
    assert named <= most and wrong_ranks <= most and outside <= most


def test_a_clear_difference_is_found():
    truth, rng = np.array([0.0, 5, 6, 7, 8]), np.random.default_rng(0)
    found = [simulated(truth, np.ones(5), 5, rng) for _ in range(200)]
    assert np.mean([winner(means) == 0 for means in found]) > 0.95  # five spreads, five seeds
    assert np.mean([standings(means, draws=2)[0].ranks == (1, 1) for means in found]) > 0.8


def test_the_probability_of_being_the_best_is_that_of_two_normal_means():
    a, b = Mean(1.0, 0.3, math.inf), Mean(1.5, 0.4, math.inf)
    expected = stats.norm.cdf((1.5 - 1.0) / 0.5)
    first, second = standings([a, b], draws=200_000)
    assert first.best == pytest.approx(expected, abs=4e-3) and second.best == pytest.approx(1 - expected, abs=4e-3)
    higher = standings([a._replace(better="higher"), b._replace(better="higher")], draws=200_000)
    assert higher[1].best == pytest.approx(expected, abs=4e-3)
    half = 0.3 * stats.norm.ppf(1 - 0.05 / 4)
    assert first.interval == pytest.approx((1 - half, 1 + half)) == higher[0].interval


def test_tests_are_those_of_scipy():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=4), rng.normal(1, 2, size=6)
    a, b = (Mean(float(v.mean()), float(v.std(ddof=1) / math.sqrt(len(v))), len(v) - 1) for v in (x, y))
    assert welch(a, b) == pytest.approx(stats.ttest_ind(x, y, equal_var=False).pvalue)
    assert welch(a, a._replace(mean=a.mean, stderr=None)) == 1
    assert welch(Mean(1, 0, 1), Mean(1, 0, 1)) == 1 and welch(Mean(1, 0, 1), Mean(2, 0, 1)) == 0
    # The smallest of four is multiplied by four, and no later one is smaller.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_what_is_not_tested_has_no_standing():
    tested, two, none = Mean(1.0, 0.1, 2), Mean(2.0, 0.1, 1, testable=False), Mean(3.0, None, math.inf)
    assert [s is not None for s in standings([tested, two, tested, none])] == [True, False, True, False]
    assert standings([tested, two, none]) == [None] * 3 and standings([]) == []
    assert winner([tested]) is winner([]) is None
    assert winner([tested, two]) is winner([tested, none]) is None  # the rank of the other is unknown
    assert winner([tested, Mean(9.0, 0.1, 2)]) == 0
    assert winner([tested._replace(better="higher"), Mean(9.0, 0.1, 2, "higher")]) == 1


def test_a_table_says_how_certain_its_ranks_are(tmp_path):
    for seed in range(3):
        run(tmp_path, "vae", seed, scored(3.0 + 0.1 * seed, seed))
        run(tmp_path, "gan", seed, scored(9.0 + 0.1 * seed, seed))
    (table,) = tables_of(tmp_path)
    (said,) = texts.certainty(table)
    assert said.endswith("vae is the best. Ranks: vae 1, gan 2. Probability of being the best: vae 100%.")
    assert said in texts.to_markdown([table]).replace("\\", "")
    run(tmp_path, "ddpm", 0, scored(1.0))
    (table,) = tables_of(tmp_path)
    said, warning = texts.certainty(table)
    assert "measurement alone" in warning and "ddpm 1" in said
    for seed in range(2):
        run(tmp_path, "hvae", seed, scored(1.0 + seed, seed))
    (table,) = tables_of(tmp_path)
    assert "no row is certainly the best" in texts.certainty(table)[0] and "two seeds" in texts.certainty(table)[-1]
