"""What ADP's pruning saves: the three countings by hand, and the small version of the benchmark."""

from __future__ import annotations

import pytest

from bench import adp
from bench.adp import compare, job_of, read_options, rounds_to, tabulate, task_of, variants
from bench.runs import mean_and_spread
from server_app.config import parse


def curve_of(accuracies, up=10.0, down=10.0):
    """A made-up run: ten clients that each train to .9 in every round."""
    spent = {"up": up, "down": down, "macs": 100.0, "seconds": 2.0, "clients": 10.0, "train": 9.0}
    return {"curve": [{"round": n, "test": a, **spent} for n, a in enumerate(accuracies, start=1)], "gates": {}}


def test_bytes_to_a_target_in_the_three_countings():
    unpruned = curve_of([0.2, 0.4, 0.6, 0.8])
    pruned = curve_of([0.4, 0.73, 0.7, 0.7], up=5.0)
    row = compare(pruned, unpruned)
    assert (
        row["rounds to 90% of best, first hit"],
        compare(unpruned, unpruned)["rounds to 90% of best, first hit"],
    ) == (2, 4)
    assert row["authors' bytes to it, first hit"] == 2 / 4 - 1
    assert row["salient bytes to it, first hit"] == (5 + 5) / 40 - 1
    assert row["wire bytes to it, first hit"] == (2 * 15) / (4 * 20) - 1


def test_bytes_to_accuracies_are_shown_where_the_run_with_nothing_pruned_gets_there_with_every_seed():
    unpruned = {0: curve_of([0.2, 0.62, 0.76]), 1: curve_of([0.3, 0.5, 0.72])}
    pruned = {0: curve_of([0.2, 0.61, 0.71], up=5.0), 1: curve_of([0.61, 0.65, 0.69], up=5.0)}
    rows = {row["variant"]: row for row in tabulate({"plain": unpruned, "d=1": unpruned, "d=0.5": pruned})}
    row = rows["d=0.5"]
    assert not any("75%" in column or "80%" in column for column in row), "one seed does not get to .75"
    assert row["rounds to 60%, first hit"] == "1.500 ± 0.707"  # rounds 2 and 1; unpruned 2 and 3
    assert row["authors' bytes to 60%, first hit"] == mean_and_spread([0.0, 1 / 3 - 1])
    assert row["salient bytes to 60%, first hit"] == mean_and_spread([10 / 20 - 1, 5 / 30 - 1])
    assert row["wire bytes to 60%, first hit"] == mean_and_spread([30 / 40 - 1, 15 / 60 - 1])
    assert row["salient bytes to 70%, first hit"] == "not reached (1 of 2)"
    assert row.keys() == rows["plain"].keys()


def test_where_no_accuracy_is_reached_the_table_has_shares_of_the_best_alone():
    runs = {"d=1": {0: curve_of([0.2, 0.3])}, "d=0.5": {0: curve_of([0.1, 0.28])}}
    (_, row) = tabulate(runs)
    assert row["rounds to 90% of best, first hit"] == "2.000"
    assert not any(column.startswith("rounds to 6") for column in row)


def test_controls_without_gates_are_compared_with_the_run_without_gates():
    plain, gated = curve_of([0.5, 0.6], up=8.0), curve_of([0.5, 0.7], up=10.0)
    control = curve_of([0.5, 0.6], up=4.0)
    runs = {"plain": {0: plain}, "d=1": {0: gated}, "client": {0: control}, "static": {0: control, 1: control}}
    rows = {row["variant"]: row for row in tabulate(runs)}
    assert rows["static"]["upload"] == "-0.500"
    assert rows["static"]["lost points"] == "0.000"
    assert rows["static"]["seeds"] == 1, "there is nothing to compare the other with"
    assert rows["client"]["upload"] == "-0.600"
    assert rows["plain"]["upload"] == "-0.200", "what gates cost"
    assert "static" not in {row["variant"] for row in tabulate({k: v for k, v in runs.items() if k != "plain"})}


def test_points_lost_and_the_gap_to_training_are_means_of_the_last_five_rounds():
    unpruned = curve_of([0.0, 0.8, 0.8, 0.8, 0.8, 0.8])
    pruned = curve_of([0.0, 0.7, 0.7, 0.7, 0.7, 0.6])
    row = compare(pruned, unpruned)
    assert row["lost points"] == pytest.approx(100 * (0.8 - 0.68))
    assert row["train - test"] == pytest.approx(0.9 - 0.68)


def test_every_claim_of_the_paper_stands_beside_what_was_found():
    unpruned, pruned = curve_of([0.5, 0.7]), curve_of([0.5, 0.7], up=5.0)
    runs = {"plain": {0: unpruned}, "d=1": {0: unpruned}, "d=0.3": {0: pruned}, "client": {0: pruned}}
    rows = tabulate({**runs, "static": {0: pruned}})
    claims = adp.judge([{"base": "fedavg", "partition": "iid", "rows": rows}], lambda density: density + 0.02)
    assert [claim["where"] for claim in claims] == [f"fedavg, iid, {name}" for name in ("d=0.3", "client", "static")]
    for name, value in adp.CLAIMED.items():
        assert {claim[f"claimed {name}"] for claim in claims} == {value}
    assert [claim["inference MACs"] for claim in claims] == [pytest.approx(-0.68), pytest.approx(-0.48), None]
    assert claims[0]["wire"] == "-0.250"


@pytest.mark.parametrize("task", [*adp.TASKS.values(), adp.QUICK])
def test_inference_is_counted_from_the_tasks_own_shapes_and_falls_with_the_density(task):
    dense, half, third = (adp.inference_share(task, 1.0, density) for density in (1.0, 0.5, 0.3))
    assert 1 <= dense < 1.03, "the predictors are all that is added"
    assert third < half < dense - 0.2


def test_a_target_that_is_never_reached_has_no_bytes():
    row = compare(curve_of([0.2, 0.3]), curve_of([0.2, 0.9]))
    assert row["authors' bytes to it, first hit"] is None
    assert row["rounds to 90% of best, 5-round mean"] is None, "there are not even five rounds"


def test_a_round_in_which_the_machine_had_other_work_does_not_count_in_seconds():
    unpruned, pruned = curve_of([0.1, 0.2, 0.3]), curve_of([0.1, 0.2, 0.3])
    unpruned["curve"][0]["seconds"] = 400.0
    for point in pruned["curve"]:
        point["seconds"] = 1.5
    assert compare(pruned, unpruned)["seconds"] == pytest.approx(1.5 / 2 - 1)


def test_a_window_is_reached_when_its_mean_is():
    curve = curve_of([0.1, 0.9, 0.1, 0.8, 0.8])["curve"]
    assert rounds_to(curve, 0.7, 1) == 2
    assert rounds_to(curve, 0.7, 2) == 5


@pytest.mark.parametrize("task", adp.TASKS)
def test_every_variant_is_a_config_that_parses_and_has_a_file_of_its_own(task, tmp_path):
    options = read_options(["--task", task, "--controls", "--store", str(tmp_path)])
    jobs = [
        job_of(task_of(options), base, partition, seed, name, options)
        for base in options.base
        for partition in options.partition
        for seed in range(options.seeds)
        for name in variants(options)
    ]
    assert len({job.path for job in jobs}) == len(jobs) == 2 * 3 * 3 * 9
    assert not {mark for job in jobs for mark in job.path.name if mark in ":*? "}, "for every file system"
    for job in jobs:
        parse(job.keys)


@pytest.mark.slow
def test_the_quick_version_has_a_row_for_every_variant_and_repeats_nothing(tmp_path, capsys):
    command = ["--quick", "--workers", "1", "--store", str(tmp_path / "runs"), "--out", str(tmp_path / "adp.json")]
    record = adp.main(command)
    (table,) = record["results"]["tables"]
    assert [row["variant"] for row in table["rows"]] == ["plain", "d=1", "d=0.5"]
    assert table["rows"][1]["upload"] == "0.000", "the unpruned run against itself"
    assert float(table["rows"][2]["MACs"]) < 0
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")}
    assert adp.main(command)["results"] == record["results"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")} == kept


def test_fewer_filters_may_be_sent_than_are_computed_at_every_density_but_1():
    command = ["--density", ".9", "--density", ".5", "--upload-density", ".25"]
    assert list(variants(read_options(command))) == ["plain", "d=1", "d=0.9", "d=0.5", "d=0.9 u=0.25", "d=0.5 u=0.25"]
    found = variants(read_options([*command, "--upload", "salient", "--upload", "changed"]))
    assert list(found)[4:6] == ["d=0.9 u=0.25", "d=0.9 u=0.25 changed"]
    fewer = {"adp.density": 0.9, "adp.share": "group", "adp.upload-density": 0.25}
    assert found["d=0.9 u=0.25"] == {**fewer, "adp.upload": "salient"}
    assert found["d=0.9 u=0.25 changed"] == {**fewer, "adp.upload": "changed"}
    with pytest.raises(SystemExit):
        read_options(["--upload", "changed"])
    row = {"variant": "d=0.9 u=0.25", "last upload": "", "lost points": ""}
    row |= {f"{way} bytes to it, first hit": "" for way in ("authors'", "salient", "wire")}
    (claim,) = adp.judge([{"base": "fedavg", "partition": "iid", "rows": [row]}], lambda density: density)
    assert claim["inference MACs"] == pytest.approx(-0.1), "what is computed counts, not what is sent"
