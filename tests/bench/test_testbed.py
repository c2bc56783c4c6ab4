"""The testbed of unequal hosts: its fleet, its runs' configs, and its figures from made-up event logs."""

from __future__ import annotations

import argparse
import json

import pytest

from bench import testbed
from bench.testbed import (
    MORE_ROUNDS,
    RUNS,
    against,
    against_synchronous,
    busy_s,
    compare_learned,
    describe_hosts,
    fleet,
    judge_learned,
    settings,
    total,
)
from server_app.config import parse
from tests.runs import tiny_run


def arrival(server_round, pid, update_time_s, status="merged"):
    return {
        "event": "arrival",
        "server_round": server_round,
        "partition_id": pid,
        "update_time_s": update_time_s,
        "status": status,
    }


def evaluation(wall_s, accuracy, reestimated=0.0):
    return {"event": "evaluation", "wall_s": wall_s, "accuracy": accuracy, "accuracy_reestimated": reestimated}


def decision(rates, times_s=None, reference_s=1.0, floors=()):
    rates = {str(host): rate for host, rate in enumerate(rates)}
    times_s = {str(host): time_s for host, time_s in enumerate(times_s or [])}
    about = {"work_ratios": dict.fromkeys(rates, 1.0), "floors": list(floors)}
    return {"event": "decision", "rates": rates, "update_times_s": times_s, "reference_s": reference_s, **about}


def log_of(folder, rows):
    folder.mkdir()
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_fleets_cores_and_links_fall_evenly_to_a_quarter_and_the_cores_add_up():
    hosts = fleet(4, 1.5)
    assert [hosts[0].cores / host.cores for host in hosts] == pytest.approx([1, 2, 3, 4])
    assert [hosts[0].bytes_per_s / host.bytes_per_s for host in hosts] == pytest.approx([1, 2, 3, 4])
    assert sum(host.cores for host in hosts) == pytest.approx(1.5)
    assert fleet(2, 64)[0].cores == 1.0, "a client computes on one core"
    assert {(host.delay_s, host.loss_ratio) for host in fleet(2, 1.0, 0.02, 0.001)} == {(0.02, 0.001)}


def test_every_run_is_a_config_that_parses_and_has_its_share_of_rounds():
    chosen = argparse.Namespace(quick=False, rounds=10, images=2000, seed=3, data_dir="nowhere")
    for name in RUNS:
        run = parse(settings(name, 4, chosen)).run
        assert (run.num_clients, run.seed, run.num_rounds) == (4, 3, round(10 * MORE_ROUNDS.get(name, 1)))


def test_the_time_without_the_engines_share_is_that_of_each_rounds_slowest_merged_answer():
    rows = [arrival(1, 0, 2.0), arrival(1, 1, 5.0), arrival(2, 0, 1.0), arrival(2, 1, 9.0, "rejected")]
    assert busy_s(rows) == 6.0


def test_hosts_are_compared_in_units_of_fedavgs_fastest_in_its_last_round():
    before = [arrival(1, 0, 9.0), arrival(1, 1, 9.0), arrival(2, 0, 2.0), arrival(2, 1, 8.0)]
    first, second = describe_hosts(before, fleet(2, 1.0))
    assert (first["fedavg_time"], second["fedavg_time"]) == (1.0, 4.0)


def test_what_five_decisions_came_to_is_what_the_sixth_went_by():
    after = [decision([1.0, 0.5], [2.0, 2.0 + number]) for number in range(7)]
    after.append(decision([1.0, 0.4], [3.0, 3.3], reference_s=3.0, floors=[1]))
    virtual = [decision([1.0, 0.9]), decision([1.0, 0.3])]
    first, second = compare_learned(after, virtual)
    assert (first["after_five"], second["after_five"]) == (2.0, 7.0)
    assert (first["at_last"], second["at_last"]) == (1.0, pytest.approx(1.1))
    assert (second["rate"], second["rate_predicted"]) == (0.4, 0.3)
    assert (first["is_floored"], second["is_floored"]) == (False, True)
    [only, _] = compare_learned(after[:1], virtual)
    assert only["after_five"] == only["at_last"] == 2.0, "of a short run the last one"


def test_the_verdict_says_how_far_everybody_is_from_the_reference_and_the_rates_from_the_predicted_ones():
    rows = [
        {"rate": 1.0, "rate_predicted": 1.0, "after_five": 0.9, "at_last": 0.8},
        {"rate": 0.4, "rate_predicted": 0.3, "after_five": 1.2, "at_last": 1.1},
        {"rate": 0.4, "rate_predicted": None, "after_five": None, "at_last": None},
    ]
    found = judge_learned(rows)
    assert (found["fastest_after_five"], found["slowest_after_five"]) == (0.9, 1.2)
    assert (found["fastest_at_last"], found["slowest_at_last"]) == (0.8, 1.1)
    assert found["rate_error"] == pytest.approx(0.05)


def test_cos2p_is_compared_with_its_synchronous_self_at_the_same_wall_time(tmp_path):
    log = log_of(tmp_path / "log", [evaluation(0.0, 0.1), evaluation(9.0, 0.3, 0.5), evaluation(30.0, 0.8)])
    ours, other = {"utilisation": 0.6, "accuracy": 0.7, "wall_s": 10.0}, {"utilisation": 0.4}
    found = against_synchronous(ours, other, log)
    assert found["utilisation_ratio"] == pytest.approx(1.5)
    assert found["accuracy_gained_same_wall_time"] == pytest.approx(0.2), ".5 is what it had by then, re-estimated"


def test_a_variants_gain_is_against_fedavgs_end_and_against_fedavg_at_the_same_time(tmp_path):
    log = log_of(tmp_path / "log", [evaluation(0.0, 0.1), evaluation(40.0, 0.5), evaluation(100.0, 0.8)])
    fedavg = {"rounds": 10, "wall_s": 100.0, "update_time_s": 80.0, "accuracy": 0.8, "accuracy_unseen": 0.75}
    ours = {"run": "adaptcl", "rounds": 12, "wall_s": 50.0, "update_time_s": 20.0, "accuracy": 0.7}
    row = against(fedavg, {**ours, "accuracy_unseen": 0.72}, log)
    assert (row["rounds_ratio"], row["wall_time_saved"], row["update_time_saved"]) == (1.2, 0.5, 0.75)
    assert row["accuracy_gained"] == pytest.approx(-0.1)
    assert row["accuracy_gained_same_wall_time"] == pytest.approx(0.2)
    assert row["accuracy_gained_unseen"] == pytest.approx(-0.03)
    assert against(fedavg, {**ours, "accuracy_unseen": None}, log)["accuracy_gained_unseen"] is None


def test_a_runs_row_is_read_from_its_event_log(tmp_path):
    rows = tiny_run(tmp_path / "run", strategy="fedavg", num_rounds=2)
    row = total("fedavg", tmp_path / "run", None)
    assert (row["run"], row["rounds"], row["accuracy_unseen"]) == ("fedavg", 2, None)
    last = [line for line in rows if line["event"] == "evaluation"][-1]
    assert row["accuracy"] == max(last["accuracy"], last["accuracy_reestimated"])
    assert row["update_time_s"] == busy_s(rows) > 0


def test_where_no_hosts_can_be_made_it_says_why_and_measures_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(testbed, "why_not", lambda *link: "not root")
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--out", str(tmp_path / "result.json")])
    assert testbed.main()["results"] == {"skipped": "not root"}
    assert "no unequal hosts can be made here: not root" in capsys.readouterr().out
