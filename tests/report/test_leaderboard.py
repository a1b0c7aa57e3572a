"""Means, errors and tests by hand and by scipy; what may be compared, and what is equal."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from genzoo.catalogue import direction
from genzoo.report import leaderboard, page, records, texts
from genzoo.report.leaderboard import differ
from genzoo.report.texts import measured, quantity
from tests.report import entry, run, scored

FD = "test/fd_digits"


def tables_of(root):
    found, broken = records.read(records.find([root]))
    assert not broken
    return leaderboard.tables(leaderboard.rows(found))


def rows_of(root):
    return {row.label: row for table in tables_of(root) for row in table.rows}


# Rows


def test_seeds_are_averaged_and_their_error_is_that_of_the_mean(tmp_path):
    values = [3.0, 4.5, 7.25]
    for seed, value in enumerate(values):
        run(tmp_path, seed=seed, metrics=scored(value, seed))
    (row,) = rows_of(tmp_path).values()
    cell = row.cells[FD]
    assert (row.label, row.seeds, cell.values) == ("vae", [0, 1, 2], values)
    assert (cell.mean, cell.source) == (pytest.approx(np.mean(values)), "seeds")
    assert cell.stderr == pytest.approx(stats.sem(values))


def test_one_seed_has_the_error_of_the_measurement_alone(tmp_path):
    run(tmp_path, metrics=scored(3.0))
    (row,) = rows_of(tmp_path).values()
    assert (row.cells[FD].mean, row.cells[FD].stderr, row.cells[FD].source) == (3.0, 0.5, "measurement")
    assert row.cells["model/parameters"].stderr == 0 and row.cells["model/parameters"].source is None


def test_a_value_that_is_not_finite_is_counted_and_not_averaged(tmp_path):
    for seed, value in enumerate([2.0, None, 4.0]):
        run(tmp_path, seed=seed, metrics=scored(value, seed))
    (row,) = rows_of(tmp_path).values()
    assert (row.cells[FD].mean, row.cells[FD].missing, len(row.cells[FD].values)) == (3.0, 1, 2)


def test_a_seed_without_a_number_is_missing(tmp_path):
    """As where samples are not finite, and are compared with nothing."""
    run(tmp_path, seed=0, metrics=scored(2.0))
    broken = scored(0.0, 1)
    del broken[FD]
    run(tmp_path, seed=1, metrics=broken)
    (row,) = rows_of(tmp_path).values()
    assert (row.cells[FD].values, row.cells[FD].missing, row.cells["sampling/nfe"].missing) == ([2.0], 1, 0)
    assert "(1 missing)" in texts.to_markdown(tables_of(tmp_path))


def test_what_is_scored_later_adds_to_what_was_scored(tmp_path):
    made = run(tmp_path, metrics=scored(2.0))
    more = {"test/bpd": entry(3.0, protocol={"unit": "bits/dim"}, setting={"weights": "ema"})}
    made.write_result({"scored": "2026-02-01", "metrics": more, "warnings": []})
    (row,) = rows_of(tmp_path).values()
    assert (row.cells[FD].mean, row.cells["test/bpd"].mean) == (2.0, 3.0)


def test_speeds_of_seeds_on_unlike_machines_are_not_ranked(tmp_path):
    for seed, device in enumerate(["cpu", "cuda"]):
        metrics = scored(2.0, seed)
        metrics["sampling/samples_per_second"]["card"]["protocol"]["device"] = device
        run(tmp_path, seed=seed, metrics=metrics)
    run(tmp_path, model="gan", metrics=scored(2.0))
    (table,) = tables_of(tmp_path)
    found = {row.label: row.cells["sampling/samples_per_second"].protocol for row in table.rows}
    assert found["vae"] == {"unit": "samples/s", leaderboard.DIFFERENT: "device"}
    assert leaderboard.leaders(table, "sampling/samples_per_second") == ([], [])


def test_a_seed_that_is_scored_twice_counts_once(tmp_path):
    made = run(tmp_path, metrics=scored(3.0))
    again = {
        name: {**e, "card": {**e["card"], "setting": {**e["card"]["setting"], "seed": 1}}}
        for name, e in scored(5.0).items()
    }
    made.write_result({"scored": "2026-01-02", "metrics": again, "warnings": []})
    (row,) = rows_of(tmp_path).values()
    assert row.cells[FD].values == [5.0]


@pytest.mark.parametrize(
    ("config", "same"),
    [
        ({"metrics": {"n": 7}}, True),
        ({"logger": {"project": "x"}, "timeout": 3}, True),
        ({"trainer": {"batch_size": 64, "grids": 9}}, True),
        ({"trainer": {"batch_size": 32, "grids": 4}}, False),
        ({"budget": {"images": None, "seconds": 60.0, "flops": None, "samples": 1000}}, False),
        ({"budget": {"images": None, "seconds": 30.0, "flops": None, "samples": 9}}, True),
    ],
)
def test_what_changes_the_training_makes_another_row(tmp_path, config, same):
    run(tmp_path, seed=0, metrics=scored(1.0))
    run(tmp_path, seed=1, metrics=scored(2.0, 1), config=config)
    assert len(rows_of(tmp_path)) == (1 if same else 2)


def test_rows_of_one_family_are_named_by_what_sets_them_apart(tmp_path):
    for beta in (1.0, 4.0):
        model = {"_target_": "VAE", "beta": beta, "likelihood": {"_target_": "a.b.Gaussian"}}
        run(tmp_path, metrics=scored(beta), config={"model": model})
    run(tmp_path, model="gan", metrics=scored(1.0))
    assert set(rows_of(tmp_path)) == {"vae, model.beta=1.0", "vae, model.beta=4.0", "gan"}


def test_samplers_of_one_run_are_rows_of_their_own(tmp_path):
    made = run(tmp_path, model="ddpm")
    for steps in (5, 10):
        sampler = {"sampler": {"name": "DDIM", "steps": steps}}
        metrics = scored(20.0 / steps)
        metrics[FD]["card"]["setting"] |= sampler
        made.write_result({"scored": f"2026-01-{steps:02d}", "metrics": metrics, "warnings": []})
    assert set(rows_of(tmp_path)) == {"ddpm, sampler.steps=5", "ddpm, sampler.steps=10"}


def test_the_fewest_keys_tell_rows_apart():
    rows = [
        {"name": name, "steps": steps, "rho": 7 if name == "Heun" else None, "same": 1}
        for name in ("DDIM", "Heun")
        for steps in (5, 10, 20)
    ]
    assert leaderboard.distinguishing_keys(rows) == ["steps", "name"]
    assert leaderboard.distinguishing_keys(rows[:1]) == leaderboard.distinguishing_keys([{"a": 1}, {"a": 1}]) == []


def test_runs_that_failed_are_counted_and_give_no_number(tmp_path):
    run(tmp_path, seed=0, metrics=scored(1.0))
    run(tmp_path, seed=1, state="failed", why="NonFiniteError: loss")
    run(tmp_path, seed=2, state="failed", why="late", metrics=scored(100.0, 2))
    (row,) = rows_of(tmp_path).values()
    assert (row.failed, row.seeds, row.cells[FD].values) == (2, [0], [1.0])


# Tables


@pytest.mark.parametrize("part", ["n_fake", "features_sha256", "reference_sha256", "resize", "forced"])
def test_unlike_protocols_are_never_in_one_table(tmp_path, part):
    run(tmp_path, model="vae", metrics=scored(1.0))
    other = scored(0.5)
    other[FD]["card"]["protocol"] = {"unit": "squared distance", "n_fake": 1000} | {part: "another"}
    run(tmp_path, model="gan", metrics=other)
    first, second = tables_of(tmp_path)
    assert not first.why and len(second.why) == 1 and part in second.why[0] and FD in second.why[0]
    for table in (first, second):
        assert leaderboard.leaders(table, FD) == ([], [])


@pytest.mark.parametrize("part", ["protocol", "setting"])
def test_bounds_of_unlike_draws_are_never_in_one_table(tmp_path, part):
    """Also where an earlier version has left the draws in the setting; of estimates without bias they do not matter."""
    name, kind = "test__bpd_upper", "LOWER"
    for folder in ("bounds", "estimates"):
        for model, draws in (("vae", 20), ("hvae", 500), ("ddpm", 20)):
            card = {"protocol": {"unit": "bits/dim", "bound": kind}, "setting": {}}
            card[part if kind == "LOWER" else "setting"] |= {"num_samples": draws}
            run(tmp_path / folder, model=model, metrics=scored(1.0, **{name: entry(3.0, 0.1, **card)}))
        name, kind = "test__bpd_estimate", "ESTIMATE"
    alike, apart = tables_of(tmp_path / "bounds")
    assert sorted(row.label for row in alike.rows) == ["ddpm", "vae"]
    assert [row.label for row in apart.rows] == ["hvae"] and "num_samples" in apart.why[0]
    assert len(tables_of(tmp_path / "estimates")) == 1


def test_what_only_one_of_two_rows_has_does_not_part_them(tmp_path):
    bound = entry(3.0, 0.1, protocol={"unit": "bits/dim", "bound": "LOWER"})
    run(tmp_path, model="vae", metrics=scored(1.0, test__bpd_upper=bound))
    run(tmp_path, model="gan", metrics=scored(2.0))
    (table,) = tables_of(tmp_path)
    assert [row.label for row in table.rows] == ["vae", "gan"]
    assert "test/bpd_upper" not in table.rows[1].cells
    assert "| n/a |" in texts.to_markdown([table])


def test_data_are_never_mixed(tmp_path):
    run(tmp_path, metrics=scored(1.0))
    run(tmp_path, data="moons", metrics=scored(1.0))
    assert [table.data for table in tables_of(tmp_path)] == ["digits", "moons"]


def test_speeds_of_unlike_machines_part_no_table_and_are_not_ranked(tmp_path):
    run(tmp_path, model="vae", metrics=scored(1.0))
    other = scored(2.0)
    other["sampling/samples_per_second"]["card"]["protocol"]["device"] = "cuda"
    run(tmp_path, model="gan", metrics=other)
    (table,) = tables_of(tmp_path)
    assert leaderboard.leaders(table, "sampling/samples_per_second") == ([], [])
    assert leaderboard.leaders(table, FD)[0] == [table.rows[0]]


def test_what_training_took_is_no_score(tmp_path):
    run(tmp_path, model="vae", metrics=scored(1.0))
    run(tmp_path, model="gan", metrics=scored(2.0, training__images=entry(1, protocol={"unit": "images"})))
    (table,) = tables_of(tmp_path)
    assert leaderboard.leaders(table, "training/images") == ([], [])


@pytest.mark.parametrize(("better", "name"), [("lower", FD), ("higher", "test/coverage_digits")])
def test_the_best_and_what_cannot_be_told_from_it(tmp_path, better, name):
    values = {"vae": [1.0, 1.1, 0.9], "gan": [1.05, 1.2, 0.95], "ddpm": [9.0, 9.1, 9.2]}
    for model, seeds in values.items():
        for seed, value in enumerate(seeds):
            signed = value if better == "lower" else -value
            run(tmp_path, model=model, seed=seed, metrics={name: entry(signed, 0.1, better)})
    (table,) = tables_of(tmp_path)
    best, near = leaderboard.leaders(table, name)
    assert ([row.label for row in best], [row.label for row in near]) == (["vae"], ["gan"])
    assert [row.label for row in table.rows] == ["vae", "gan", "ddpm"]


def test_equal_numbers_are_all_the_best(tmp_path):
    for model in ("vae", "gan"):
        run(tmp_path, model=model, metrics={FD: entry(0.0, 0.0)})
    (table,) = tables_of(tmp_path)
    assert len(leaderboard.leaders(table, FD)[0]) == 2


def test_nothing_is_told_apart_from_a_mean_whose_error_is_not_known(tmp_path):
    """A recall of one seed has no error; a count of evaluations has none either, but is exact."""
    for i, model in enumerate(("vae", "gan", "ddpm")):
        recall = entry(0.5 + 0.1 * i, None, "higher", {"unit": "share"})
        run(tmp_path, model, metrics=scored(1.0, test__recall_digits=recall, sampling__nfe=entry(1 + 49 * i)))
    (table,) = tables_of(tmp_path)
    best, near = leaderboard.leaders(table, "test/recall_digits")
    assert ([row.label for row in best], {row.label for row in near}) == (["ddpm"], {"vae", "gan"})
    best, near = leaderboard.leaders(table, "sampling/nfe")
    assert ([row.label for row in best], near) == (["vae"], [])


@pytest.mark.parametrize(
    "name", ["sampling/samples_per_second", "sampling/nfe", "model/parameters", "sampling/another", "training/seconds"]
)
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_costs_are_not_tested(tmp_path, name, seeds):
    """15 samples a second can be told from 7,814, however much the fast one's speed differs from seed to seed."""
    better = direction(name, "higher")
    for model, cost in {"vae": 7814.0, "gan": 7000.0, "ddpm": 15.0}.items():
        cost = cost if better == "higher" else 1 / cost
        for seed in range(seeds):
            metrics = scored(1.0, seed) | {name: entry(cost * (1 + 0.4 * seed), None, better, {"unit": "1"})}
            run(tmp_path, model=model, seed=seed, metrics=metrics)
    (table,) = tables_of(tmp_path)
    best, near = leaderboard.leaders(table, name)
    assert ([row.label for row in best], near) == ([] if name.startswith("training") else ["vae"], [])


@pytest.mark.parametrize(("seeds", "marked"), [(2, []), (3, ["gan"]), (4, ["gan"])])
def test_means_of_two_seeds_are_not_tested_and_the_page_says_so(tmp_path, seeds, marked):
    for model, shift in {"vae": 0.0, "gan": 0.01, "ddpm": 50.0}.items():
        for seed in range(seeds):
            run(tmp_path, model=model, seed=seed, metrics={FD: entry(10.0 + shift + seed, 0.1)})
    (table,) = tables_of(tmp_path)
    best, near = leaderboard.leaders(table, FD)
    assert ([row.label for row in best], [row.label for row in near]) == (["vae"], marked)
    assert "Costs and means over two seeds are not tested" in texts.to_markdown([table])


def test_rows_of_two_seeds_are_not_tested_beside_rows_of_three(tmp_path):
    for model, seeds in {"vae": 3, "gan": 2, "ddpm": 3}.items():
        for seed in range(seeds):
            run(tmp_path, model=model, seed=seed, metrics={FD: entry(10.0 + seed + 0.1 * len(model), 0.1)})
    (table,) = tables_of(tmp_path)
    assert [[row.label for row in rows] for rows in leaderboard.leaders(table, FD)] == [["gan"], []]
    with_three = [row for row in table.rows if row.label != "gan"]
    table.rows = with_three
    assert [[row.label for row in rows] for rows in leaderboard.leaders(table, FD)] == [["vae"], ["ddpm"]]


PARTIAL = ["test/precision", "test/precision_digits", "train/precision_fashion_mnist", "test/density", "test/density_digits",
           "memorisation/copied", "memorisation/shifted", "memorisation/exact_copies", "memorisation/authentic"]  # fmt: skip


@pytest.mark.parametrize("name", PARTIAL)
def test_noise_is_crowned_in_no_column_that_it_can_win(tmp_path, name):
    better = "lower" if name.rpartition("/")[2] in ("copied", "shifted", "exact_copies") else "higher"
    for model, value in {"noise": 0.93 if better == "higher" else 0.0, "vae": 0.5}.items():
        run(tmp_path, model=model, metrics={name: entry(value, 0.01, better, {"unit": "share"})})
    (table,) = tables_of(tmp_path)
    assert leaderboard.leaders(table, name) == ([], []) and not leaderboard.ranked(table, name)
    assert "**" not in texts.to_markdown([table]).split("Mean ±")[0]


def test_recall_coverage_and_distances_have_a_best(tmp_path):
    names = ["test/recall_digits", "test/coverage_digits", "test/fid", "test/kd_digits", "test/bpd", "test/mmd"]
    for i, model in enumerate(("vae", "gan")):
        run(tmp_path, model=model, metrics={name: entry(1.0 + i, 0.01) for name in names})
    (table,) = tables_of(tmp_path)
    assert all(len(leaderboard.leaders(table, name)[0]) == 1 for name in names)


def test_a_machine_that_is_not_recorded_is_said_to_be_so(tmp_path):
    made = run(tmp_path, metrics=scored(1.0))
    made.update_status(machine=None)
    assert texts.fairness(tables_of(tmp_path)[0])[-1] == "Machine: not recorded."


def test_differences_are_told_by_welchs_test():
    rng = np.random.default_rng(0)
    decisions = []
    for i in range(200):
        a, b = rng.normal(0, 1, 3 + i % 3), rng.normal(rng.uniform(0, 4), 3, 3 + i % 2)
        cells = [leaderboard.cell(FD, [entry(float(v)) for v in values], len(values)) for values in (a, b)]
        expected = bool(stats.ttest_ind(a, b, equal_var=False).pvalue < 0.05)
        assert differ(*cells) == expected
        decisions.append(expected)
    assert 20 < sum(decisions) < 180


# What was equal


def test_what_was_equal_is_said_and_what_was_not(tmp_path):
    run(tmp_path, model="vae", metrics=scored(1.0))
    other = scored(2.0, training__flops=entry(3 * 10**12, protocol={"unit": "FLOPs"}))
    other["training/images"]["value"] = 6400
    run(tmp_path, model="gan", metrics=other)
    (table,) = tables_of(tmp_path)
    used = {use.name: use for use in leaderboard.resource_use(table)}
    assert {name: use.equal for name, use in used.items()} == {
        "images": False, "seconds": True, "operations": False, "parameters": True,
    }  # fmt: skip
    said = " ".join(texts.fairness(table))
    for words in (
        "Equal seconds: 30 s.",
        "Unequal images: 640 to 6,400 images (10 times)",
        "(3 times)",
        "Seeds 0 in every row",
    ):
        assert words in said


def test_a_limit_that_was_not_kept_is_not_equal(tmp_path):
    run(tmp_path, model="vae", metrics=scored(1.0))
    run(tmp_path, model="gan", metrics=scored(1.0, training__seconds=entry(60.0, protocol={"unit": "s"})))
    (table,) = tables_of(tmp_path)
    assert not {use.name: use for use in leaderboard.resource_use(table)}["seconds"].equal


def limited(images: int, seconds: float) -> dict[str, Any]:
    return {"budget": {"images": images, "seconds": seconds, "flops": None, "samples": 1000}}


def spent(images: int, seconds: float) -> dict[str, Any]:
    units = {"training__images": entry(images, protocol={"unit": "images"})}
    return scored(1.0, **units, training__seconds=entry(seconds, protocol={"unit": "s"}))


def test_a_limit_that_ended_no_run_is_not_what_was_equal(tmp_path):
    """Both were given 30 seconds and used 29; what ended them were 640 images."""
    for model, seconds in (("vae", 29.5), ("gan", 27.5)):
        ends = {"ended_by": "images", "planned_by": "images"}
        run(tmp_path, model=model, metrics=spent(640, seconds), config=limited(640, 30.0), **ends)
    (table,) = tables_of(tmp_path)
    said = " ".join(texts.fairness(table))
    assert "Equal images: 640 images." in said and "Unequal seconds: 27.5 to 29.5 s" in said
    assert not any(leaderboard.ending_note(table, row) for row in table.rows)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_row_that_another_limit_ended_is_marked(recorded, tmp_path):
    rows = ("vae", 640, 9.0, "images"), ("gan", 640, 12.0, "images"), ("ddpm", 300, 30.0, "seconds")
    for model, images, seconds, end in rows:
        ends = {"ended_by": end, "planned_by": end} if recorded else {}
        run(tmp_path, model=model, metrics=spent(images, seconds), config=limited(640, 30.0), **ends)
    (table,) = tables_of(tmp_path)
    notes = {row.model: leaderboard.ending_note(table, row) for row in table.rows}
    assert notes == {"vae": None, "gan": None, "ddpm": "ended by seconds"}
    said = " ".join(texts.fairness(table))
    assert "Unequal images: 300 to 640" in said and "Ended by different limits: images, seconds." in said
    assert "| ddpm (ended by seconds) |" in texts.to_markdown([table])
    shown = page.board(table, page.Interned(), page.Interned(), page.Interned())
    assert {row["model"]: row["ended"] for row in shown} == notes


def test_a_row_that_ended_before_its_plan_is_marked_also_where_all_did(tmp_path):
    for model in ("vae", "gan"):
        ends = {"ended_by": "seconds", "planned_by": "images"}
        run(tmp_path, model=model, metrics=spent(600, 30.0), config=limited(640, 30.0), **ends)
    (table,) = tables_of(tmp_path)
    notes = [leaderboard.ending_note(table, row) for row in table.rows]
    assert notes == ["ended by seconds, planned by images"] * 2
    said = " ".join(texts.fairness(table))
    assert "Equal seconds: 30 s." in said and "Ended before the learning-rate schedule: " in said


def test_unlike_seeds_and_machines_are_said(tmp_path):
    run(tmp_path, model="vae", seed=0, metrics=scored(1.0))
    run(tmp_path, model="vae", seed=1, metrics=scored(1.0, 1), machine={"cpu": "another"})
    run(tmp_path, model="gan", seed=0, metrics=scored(1.0))
    said = " ".join(texts.fairness(tables_of(tmp_path)[0]))
    assert "Different seeds: 1 to 2 per row" in said and "Different machines: " in said and "another" in said


# Texts


@pytest.mark.parametrize(
    ("mean", "stderr", "text"),
    [
        (17.7634, 1.13, "17.8 ± 1.1"), (0.01234, 0.00056, "0.01234 ± 0.00056"), (1234.5, 67.8, "1,234 ± 68"),
        (3.0, None, "3"), (3.0, 0.0, "3"), (1.5e12, 1e10, "1.5e+12 ± 1e+10"), (None, None, "not finite"),
    ],
)  # fmt: skip
def test_a_mean_is_shown_to_two_digits_of_its_error(mean, stderr, text):
    assert measured(leaderboard.Cell([], 0, mean, stderr, None, "", None, {})) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (12.345, "12.3"), (1234567, "1.23M"), (20000, "20,000"), (3.4e12, "3.4e+12"), (17, "17")],
)
def test_a_quantity_has_the_digits_that_it_needs(value, text):
    assert quantity(value) == text


def test_the_csv_has_every_number_in_full(tmp_path):
    for seed, value in enumerate([1 / 3, 2 / 3]):
        run(tmp_path, seed=seed, metrics=scored(value, seed))
    lines = list(csv.DictReader(io.StringIO(texts.to_csv(tables_of(tmp_path)))))
    line = next(line for line in lines if line["metric"] == FD)
    assert float(line["mean"]) == 0.5 and float(line["stderr"]) == pytest.approx(1 / 6, rel=1e-15)
    assert (line["seeds"], line["n"], line["unit"], line["stderr_of"]) == ("0 1", "2", "squared distance", "seeds")


@pytest.mark.parametrize("text", ["=cmd()", "+1+1", "-2+3", "@SUM(1)"])
def test_no_text_of_a_run_is_a_formula_of_a_spreadsheet(tmp_path, text):
    run(tmp_path, model="vae", data=text, name="x", metrics={FD: entry(-1.5)})
    line = next(csv.DictReader(io.StringIO(texts.to_csv(tables_of(tmp_path)))))
    assert line["data"] == f"'{text}" and float(line["mean"]) == -1.5


def test_no_text_of_a_run_is_markdown(tmp_path):
    run(tmp_path, model="vae", data="a|b<img src=x>[c](javascript:d)", name="x", metrics=scored(1.0))
    text = texts.to_markdown(tables_of(tmp_path), ["failed: <script>"])
    assert "<img" not in text and "<script>" not in text and "[c]" not in text.replace("\\[c]", "") and "a\\|b" in text


def test_bounds_have_their_names():
    assert texts.label("test/bpd_upper") == "bits/dim (upper bound)"
    assert texts.label("test/bpd") == "bits/dim (exact)"
    assert texts.label("test/nll_estimate") == "nats (unbiased estimate)"


def test_the_mean_of_nothing_is_nothing():
    cell = leaderboard.cell(FD, [entry(None), entry(math.nan)], 2)
    assert (cell.mean, cell.stderr, cell.missing) == (None, None, 2)
