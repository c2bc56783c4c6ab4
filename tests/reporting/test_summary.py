"""The numbers of a run, against sums made another way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reporting.log import read_events
from reporting.maps import _evenness
from reporting.report import make_page, write_report
from reporting.rows import Merge
from reporting.summary import SUMMARY_FILE, coverage_gaps, summarise, utilisation
from reporting.units import format_percent, format_seconds
from reporting.waiting import find_waits

MakeRun = Callable[..., Path]


def rows_of(folder: Path, event: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


def test_totals_are_the_sums_over_all_arrivals_merged_or_not(make_run: MakeRun) -> None:
    folder = make_run()
    summary, arrivals = summarise(read_events(folder)), rows_of(folder, "arrival")
    for name in ("download_bytes", "upload_bytes", "train_macs"):
        assert summary[name] == pytest.approx(sum(row[name] for row in arrivals))
    assert sum(summary["num_arrivals"].values()) == len(arrivals) == 300
    assert summary["num_arrivals"]["failed"] > 0


@pytest.mark.parametrize(
    "options", [{"strategy": "fedavg"}, {"strategy": "adaptcl"}, {"strategy": "fedbuff", "buffer": 4}]
)
def test_the_ledger_has_the_same_columns_for_every_strategy_and_adds_up(
    make_run: MakeRun, options: dict[str, Any]
) -> None:
    summary = summarise(read_events(make_run(**options)))
    reference = summarise(read_events(make_run("reference", strategy="heterofl")))
    assert summary.keys() == reference.keys()
    assert [row.keys() for row in summary["ledger"]] == [row.keys() for row in reference["ledger"]]
    for name in ("download_bytes", "upload_bytes", "train_macs"):
        assert sum(row[name] for row in summary["ledger"]) == pytest.approx(summary[name])
    assert sum(row["wait_s"] for row in summary["ledger"]) == pytest.approx(summary["straggler_wait_s"])
    assert sum(row["num_times_last"] for row in summary["ledger"]) == summary["num_merges"]
    busy = [row["utilisation_ratio"] for row in summary["ledger"]]
    assert sum(busy) / len(busy) == pytest.approx(summary["utilisation_ratio"])


def test_the_ledger_says_what_the_engine_took_beside_every_client(make_run: MakeRun) -> None:
    common = {"event": "arrival", "status": "merged", "start_s": 0, "finish_s": 9, "update_time_s": 2}
    rows = [
        {"event": "run", "strategy": "adasplit"},
        {"event": "clients", "clients": [{"partition_id": 0}, {"partition_id": 1}]},
        {**common, "server_round": 1, "partition_id": 0, "overhead_s": 3.0},
        {**common, "server_round": 2, "partition_id": 0, "overhead_s": 4.5},
        {**common, "server_round": 2, "partition_id": 1},
    ]
    log = read_events(make_run(rows=rows))
    summary = summarise(log)
    assert [row["overhead_s"] for row in summary["ledger"]] == [7.5, 0.0]
    assert f">{format_seconds(7.5)}</td>" in make_page(log, summary)


def test_the_ledger_says_how_much_of_the_merges_every_client_was(make_run: MakeRun) -> None:
    """By hand: of the first merge 1/4 and 3/4, of the second, whose weights have another scale, all; late: none."""
    common = {"event": "arrival", "status": "merged", "start_s": 0, "finish_s": 9}
    rows = [
        {"event": "run", "strategy": "cos2p"},
        {"event": "clients", "clients": [{"partition_id": pid} for pid in range(3)]},
        {**common, "server_round": 1, "partition_id": 0, "merge_weight": 1.0},
        {**common, "server_round": 1, "partition_id": 1, "merge_weight": 3.0},
        {**common, "server_round": 2, "partition_id": 0, "merge_weight": 500.0},
        {**common, "server_round": 2, "partition_id": 2, "status": "late"},
    ]
    log = read_events(make_run(rows=rows))
    summary = summarise(log)
    assert [row["weight_ratio"] for row in summary["ledger"]] == [0.625, 0.375, 0.0]
    assert f">{format_percent(0.625, 0)}</td>" in make_page(log, summary)
    older = [{key: value for key, value in row.items() if key != "merge_weight"} for row in rows]
    assert {row["weight_ratio"] for row in summarise(read_events(make_run("older", rows=older)))["ledger"]} == {None}


def test_a_synchronous_round_lets_everyone_wait_for_its_last_arrival(make_run: MakeRun) -> None:
    folder = make_run(strategy="fedavg", num_clients=5, num_rounds=3)
    waits, closings = find_waits(read_events(folder))
    finishes: dict[int, list[float]] = {}
    for row in rows_of(folder, "arrival"):
        finishes.setdefault(row["server_round"], []).append(row["finish_s"])
    expected = sum(max(times) - time for times in finishes.values() for time in times)
    assert sum(wait.wait_s for wait in waits) == pytest.approx(expected)
    assert [closing.held_up_s for closing in closings] == pytest.approx(
        [sorted(times)[-1] - sorted(times)[-2] for times in finishes.values()]
    )
    slowest = max(rows_of(folder, "arrival"), key=lambda row: row["update_time_s"])["partition_id"]
    assert {closing.straggler for closing in closings} == {slowest}


def test_nobody_waits_when_every_arrival_is_merged_at_once(make_run: MakeRun) -> None:
    summary = summarise(read_events(make_run(strategy="fedasync", buffer=1, num_rounds=50)))
    assert summary["straggler_wait_s"] == pytest.approx(0.0, abs=1e-6)
    # only work that was still under way at the end is missing from the log
    assert summary["utilisation_ratio"] > 0.8


@pytest.mark.parametrize("status", ["merged", "late", "rejected", "failed"])
def test_utilisation_is_all_work_that_came_back_over_all_clients_time_however_rounds_close(
    make_run: MakeRun, status: str
) -> None:
    """Client 2 is never asked; client 1's second request is under way at the end."""

    def arrival(pid: int, start_s: float, finish_s: float, status: str = "merged") -> dict[str, object]:
        times = {"start_s": start_s, "finish_s": finish_s, "update_time_s": finish_s - start_s}
        return {"event": "arrival", "server_round": 1, "partition_id": pid, "status": status, **times}

    start = {"event": "run", "strategy": "cos2p", "num_clients": 3}
    merges = [{"event": "merge", "server_round": n, "time_s": 4.0 * n} for n in (1, 2)]
    waits_for_all = [
        start,
        arrival(0, 0, 2),
        arrival(1, 0, 4),
        merges[0],
        arrival(0, 4, 6),
        arrival(1, 4, 8),
        merges[1],
    ]
    for_none = [
        start,
        arrival(0, 0, 2),
        arrival(0, 2, 4),
        merges[0],
        arrival(1, 0, 7, status),
        arrival(0, 4, 8),
        merges[1],
    ]
    found = [summarise(read_events(make_run(f"run{i}", rows))) for i, rows in enumerate((waits_for_all, for_none))]
    assert [summary["utilisation_ratio"] for summary in found] == pytest.approx([12 / 24, 15 / 24])
    assert utilisation(0.0, 3, 0.0) is None


def test_a_client_that_gets_new_work_before_the_merge_does_not_count_as_waiting(make_run: MakeRun) -> None:
    summary = summarise(read_events(make_run(strategy="fedbuff", buffer=4, num_rounds=40)))
    busy_s = sum(row["update_time_s"] for row in summary["ledger"])
    assert summary["straggler_wait_s"] < 0.05 * busy_s


def test_late_arrivals_wait_for_nobody(make_run: MakeRun) -> None:
    common = {"event": "arrival", "server_round": 1, "start_s": 0}
    rows = [
        {"event": "run", "strategy": "cos2p"},
        {**common, "partition_id": 0, "status": "merged", "finish_s": 2, "update_time_s": 2},
        {"event": "merge", "server_round": 1, "time_s": 3.0},
        {**common, "partition_id": 1, "status": "late", "finish_s": 5, "update_time_s": 5},
        {"event": "merge", "server_round": 2, "time_s": 9.0},
    ]
    waits, _ = find_waits(read_events(make_run(rows=rows)))
    assert [wait.wait_s for wait in waits] == [1.0, 0.0]


def test_time_to_accuracy_is_the_first_evaluation_at_or_above_the_target(make_run: MakeRun) -> None:
    folder = make_run()
    summary = summarise(read_events(folder), targets=(0.8, 0.9999))
    central = [row for row in rows_of(folder, "evaluation") if row["where"] == "central"]
    first = next(row for row in central if row["accuracy"] >= 0.8)
    found = {row["target"]: row for row in summary["time_to_accuracy"]}
    assert found["80 %"]["time_s"] == first["time_s"]
    assert found["80 %"]["server_round"] == first["server_round"]
    arrivals = [row for row in rows_of(folder, "arrival") if row["server_round"] <= first["server_round"]]
    assert found["80 %"]["total_bytes"] == sum(row["download_bytes"] + row["upload_bytes"] for row in arrivals)
    assert found["99.99 %"]["time_s"] is None
    best = max(row["accuracy"] for row in central)
    assert found["95 % of best"]["accuracy"] == pytest.approx(0.95 * best)
    assert summary["final_accuracy"] == central[-1]["accuracy"]
    assert summary["best_accuracy"] == best


def test_federated_accuracy_is_the_headline_where_there_is_no_central_one(make_run: MakeRun) -> None:
    rows = [json.loads(line) for line in (make_run("both") / "events.jsonl").open()]
    folder = make_run("federated", rows=[row for row in rows if row.get("where") != "central"])
    summary = summarise(read_events(folder))
    assert summary["evaluation"] == "federated"
    assert summary["final_accuracy"] == rows_of(folder, "evaluation")[-1]["accuracy"]
    assert summary["federated"]["min"] <= summary["federated"]["median"] <= summary["federated"]["max"]


def test_summary_json_is_strict_json_even_when_training_diverged(make_run: MakeRun) -> None:
    rows = [
        {"event": "run", "strategy": "fedavg"},
        {"event": "evaluation", "server_round": 1, "time_s": 1.0, "accuracy": 0.1, "loss": math.nan},
        {"event": "evaluation", "server_round": 2, "time_s": 2.0, "accuracy": math.nan, "loss": math.inf},
    ]
    folder = make_run(rows=rows)
    write_report(folder)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    summary = json.loads((folder / SUMMARY_FILE).read_text(), parse_constant=refuse)
    assert summary["final_accuracy"] == 0.1
    assert summary["final_loss"] is None


def test_a_run_that_was_killed_before_its_first_reply_still_has_a_summary(make_run: MakeRun) -> None:
    summary = summarise(read_events(make_run(rows=[{"event": "run", "strategy": "fedavg", "num_clients": 3}])))
    assert (summary["status"], summary["final_accuracy"], summary["total_time_s"]) == ("unfinished", None, 0.0)


def test_coverage_to_date_is_summed_up_by_the_tensor_whose_entries_differ_most() -> None:
    row = Merge(1, 2.0, coverage_least={"a": 0.5, "b": 0.0, "c": 1.0}, coverage_most={"a": 0.75, "b": 0.5, "c": 1.0})
    assert coverage_gaps(row) == [("b", 0.0, 0.5), ("a", 0.5, 0.25), ("c", 1.0, 0.0)]
    assert "entries of b differ most: 0.0 % to 50.0 % of all answers" in _evenness(row)
    even = Merge(1, 2.0, coverage_least={"a": 0.5}, coverage_most={"a": 0.5})
    assert "every entry was held as often as any other of its tensor" in _evenness(even)
    assert _evenness(Merge(1, 2.0)) == ""
