"""The table of all methods: read at equal rounds, time and bytes; its quick version runs every method."""

from __future__ import annotations

import json

import pytest

from bench import baselines
from bench.baselines import METHODS, QUICK, compare, job_of, outcome, tabulate
from bench.runs import Task, merges_a_round
from server_app.config import parse
from strategies import STRATEGIES
from tests.runs import tiny_run


def run_of(accuracies, round_s=1.0, round_bytes=10.0):
    """A made-up outcome: one evaluation a round."""
    curve = [
        {"round": n, "merged": 4 * n, "time_s": n * round_s, "bytes": n * round_bytes, "macs": n, "accuracy": a}
        for n, a in enumerate(accuracies)
    ]
    kept = {"utilisation_ratio": 0.5, "straggler_wait_ratio": 0.25, "n_star_min": 3}
    return {"curve": curve, "time_s": curve[-1]["time_s"], **kept}


def test_a_row_is_read_at_the_three_limits():
    run = run_of([0.1, 0.3, 0.5, 0.62, 0.66], round_s=0.5, round_bytes=3.0)
    row = compare(run, 2, {"time_s": 1.6, "bytes": 10.0}, (0.6, 0.65, 0.7), False)
    assert (row["= rounds"], row["= time"], row["= bytes"]) == (0.5, 0.62, 0.62)
    assert row["time to 60%"] == pytest.approx(1.5 / 1.6)
    assert row["time to 70%"] == float("inf")
    assert row["time for the rounds"] == pytest.approx(1.0 / 1.6)


def test_targets_are_shares_of_fedavgs_best_where_it_does_not_get_to_the_first():
    runs = {"fedavg": {0: run_of([0.1, 0.3, 0.4])}, "heterofl": {0: run_of([0.1, 0.35, 0.38, 0.41, 0.45], 0.5, 4.0)}}
    table = tabulate(Task("t", QUICK.keys, 2, 100), runs)
    first, second = table["rows"]
    assert table["targets"] == "shares of FedAvg's best"
    assert second["= rounds"] == "0.380"
    assert second["= time"] == "0.450"
    assert second["= bytes"] == "0.450", "16 bytes are the fewest"
    assert first["= bytes"] == "0.300"
    assert second["time to 100% of FedAvg"] == "0.750"
    assert first["time to 100% of FedAvg"] == "1.000"


def test_what_a_method_is_above_its_rivals_is_taken_seed_by_seed_at_fedavgs_time():
    runs = {
        "fedavg": {0: run_of([0.1, 0.3, 0.4]), 1: run_of([0.1, 0.2, 0.6])},
        "smallest-everywhere": {0: run_of([0.1, 0.2, 0.3, 0.45, 0.9], 0.5), 1: run_of([0.1, 0.2, 0.3, 0.3, 0.5], 0.5)},
        "only-capable": {1: run_of([0.1, 0.4, 0.5])},
    }
    fedavg, smallest, capable = tabulate(Task("t", QUICK.keys, 2, 100), runs)["rows"]
    assert fedavg["over smallest-everywhere"] == "-0.200 ± 0.424", "-.5 and .1: rounds of half the time are all in it"
    assert fedavg["over only-capable"] == "0.100"
    assert smallest["over smallest-everywhere"] == "0.000 ± 0.000"
    assert capable["over smallest-everywhere"] == "0.000"


def test_seeds_that_are_missing_are_left_out_and_counted():
    runs = {"fedavg": {0: run_of([0.1, 0.7]), 1: run_of([0.1, 0.8])}, "fedprox": {1: run_of([0.1, 0.6])}, "ssp": {}}
    table = tabulate(Task("t", QUICK.keys, 1, 100), runs)
    assert [(row["method"], row["seeds"]) for row in table["rows"]] == [("fedavg", 2), ("fedprox", 1)]
    assert table["rows"][0]["= rounds"] == "0.750 ± 0.071"


def test_every_method_is_a_config_that_parses_and_has_a_file_of_its_own(tmp_path):
    jobs = [job_of(QUICK, method, 0, tmp_path) for method in METHODS]
    for job in jobs:
        assert parse(job.keys).run.num_rounds == QUICK.num_rounds * merges_a_round(job.keys)
    assert len({job.name for job in jobs}) == len(METHODS)


def test_every_method_with_a_global_model_has_a_row():
    assert METHODS.keys() >= {name for name, kind in STRATEGIES.items() if kind.has_global_model}
    assert {"only-capable", "smallest-everywhere", "fedavg"} <= METHODS.keys()


def test_an_outcome_counts_what_was_spent_before_each_evaluation(tmp_path):
    rows = tiny_run(tmp_path / "run", strategy="heterofl", num_rounds=3)
    got = outcome(tmp_path / "run" / "events.jsonl")
    arrivals = [row for row in rows if row["event"] == "arrival"]
    assert [point["merged"] for point in got["curve"]] == [0, 4, 8, 12]
    assert got["curve"][-1]["bytes"] == sum(row["download_bytes"] + row["upload_bytes"] for row in arrivals)
    assert got["curve"][-1]["time_s"] == got["time_s"] == max(row["finish_s"] for row in arrivals)
    assert all(point["accuracy"] >= point["base"] for point in got["curve"])
    assert 0 < got["utilisation_ratio"] <= 1


def test_without_the_data_it_says_what_is_missing(tmp_path, capsys):
    assert baselines.main(["--data-dir", str(tmp_path)]) is None
    assert "no CIFAR-10 in" in capsys.readouterr().out


@pytest.mark.slow
def test_the_quick_version_has_a_row_for_every_method_and_repeats_nothing(tmp_path, capsys):
    options = ["--quick", "--workers", "1", "--store", str(tmp_path / "store"), "--out", str(tmp_path / "result.json")]
    record = baselines.main(options)
    assert record is not None
    (table,) = record["results"]["tables"]
    assert record["results"]["failed"] == []
    assert [row["method"] for row in table["rows"]] == list(METHODS)
    fedavg = table["rows"][0]
    assert float(fedavg["time for the rounds"]) == 1.0
    assert all(float(row["= time"]) > 0.15 for row in table["rows"])
    capsys.readouterr()
    again = baselines.main(options)
    assert again is not None
    assert again["results"] == record["results"]
    assert "min left" not in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["results"] == record["results"]
