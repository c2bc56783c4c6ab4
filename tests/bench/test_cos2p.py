"""Co-S2P's table and claims: read from made-up outcomes, and from the kept record; its quick version."""

from __future__ import annotations

import argparse
import json
import math

import pytest

from bench import cos2p, cos2p_memory
from bench.common import RESULTS
from bench.cos2p import METHODS, TASKS, claims, figures, job_of, outcome, summarise
from bench.runs import keep
from fleet.fleet import JETSON_PATTERN
from reporting.log import read_events
from reporting.summary import summarise as summarise_log
from server_app.config import parse
from tests.runs import tiny_run
from wire.flat import ConfigError

MEMORY = [
    {"method": "cos2p", "phase": "masks + weights", "jetson-tx2 measured": 55.0},
    {"method": "cos2p", "phase": "weights", "jetson-tx2 measured": 40.0},
    {"method": "heterofl", "phase": "weights", "jetson-tx2 measured": 60.0},
    {"method": "fedavg", "phase": "weights", "jetson-tx2 measured": 100.0},
]


def run_of(accuracies, round_s=1.0, utilisation=0.5, family=None):
    """A made-up outcome: one evaluation a round."""
    curve = [
        {"time_s": n * round_s, "rounds": n, "upload_bytes": n * 1e6, "base": a / 2, "best": a, "family": family or {}}
        | {"clients": {"0": a, "3": a / 2}}  # a Nano and an Orin
        for n, a in enumerate(accuracies)
    ]
    totals = {"num_rounds": len(curve) - 1, "time_s": curve[-1]["time_s"], "stale_ratio": 0.1}
    totals["peak_memory"] = {"0": 2**20, "3": 3 * 2**20}
    return {"curve": curve, **totals, "utilisation": utilisation, "n_star": 2}


def options_of(store, seeds):
    given = {
        "data_dir": "data",
        "store": store,
        "quick": False,
        "seed": 0,
        "seeds": seeds,
        "budget": 0.1,
        "device": "cpu",
    }
    return argparse.Namespace(**given, also=[])


def test_a_row_is_read_at_the_end_of_the_virtual_time():
    family = {"exit 1": 0.3, "exit 2": 0.4}
    row = figures(run_of([0.1, 0.2, 0.4, 0.6, 0.9], round_s=1.01, family=family), 3.1, 0.3)
    assert (row["best of family"], row["base"]) == (0.6, 0.3), "what came later is not counted"
    assert row["clients' own"] == pytest.approx(0.45)
    assert (row["slow clients' own"], row["slow clients' MiB"], row["fast clients' MiB"]) == (0.6, 1.0, 3.0)
    assert row["first exit"] == 0.3
    assert row["in half the time"] == 0.2
    assert row["time to target"] == pytest.approx(2.02)
    assert (row["rounds"], row["upload MB"], row["median N*"]) == (3, 3.0, 2)


def test_a_target_is_missed_or_missing():
    assert figures(run_of([0.1, 0.2]), 1.0, 0.5)["time to target"] == math.inf
    assert math.isnan(figures(run_of([0.1, 0.2]), 1.0, None)["time to target"])


def test_the_abstracts_four_claims_stand_beside_what_was_found():
    runs = {
        "cos2p": {0: run_of([0.1, 0.5, 0.6], 0.5, 0.9), 1: run_of([0.1, 0.6, 0.8], 0.5, 0.6)},
        "cos2p synchronous": {0: run_of([0.1, 0.6], 1.0, 0.6), 1: run_of([0.1, 0.6], 1.0, 0.5)},
        "fedavg": {0: run_of([0.1, 0.3]), 1: run_of([0.1, 0.4])},
        "heterofl": {0: run_of([0.1, 0.7]), 1: run_of([0.1, 0.8])},
    }
    found = claims(runs, 1.0, MEMORY)
    assert [row["claim"].split()[0] for row in found] == ["accuracy", "accuracy", "utilisation", "memory", "time"]
    best, worst, utilisation, memory, time = [row["found"] for row in found]
    assert best == "-5.0 against the best rival, heterofl"
    assert worst == "+35.0 against the worst rival, fedavg"
    assert utilisation.startswith("1.350 ")
    assert memory == "-45 % measured at rate .5 while masks are learned, -60 % after that (ViT-Tiny)"
    assert time == "-25 % of synchronous, to 0.97 of the lower accuracy of the two", "1 s of 1 and .5 s of 1"


def test_what_its_parts_do_for_slow_clients_is_a_mean_of_differences_seed_by_seed():
    runs = {
        "cos2p": {0: run_of([0.1, 0.5]), 1: run_of([0.1, 0.8])},
        "cos2p no distillation": {0: run_of([0.1, 0.4]), 1: run_of([0.1, 0.6])},
    }
    (found,) = [row["found"] for row in claims(runs, 1.0, MEMORY) if row["claim"].endswith("distillation above none")]
    assert found == "15.0 ± 7.1 points"


def test_runs_are_compared_seed_by_seed_where_an_outcome_is_missing():
    runs = {
        "cos2p": {0: run_of([0.1, 0.2], 1.0, 0.2), 1: run_of([0.1, 0.8], 0.5, 0.8)},
        "cos2p synchronous": {1: run_of([0.1, 0.8], 1.0, 0.4)},
        "fedavg": {1: run_of([0.1, 0.7])},
    }
    best, _, utilisation, _, time = [row["found"] for row in claims(runs, 1.0, MEMORY)]
    assert best == "+10.0 against the best rival, fedavg"
    assert utilisation == "2.000 x of synchronous"
    assert time.startswith("-50 % of synchronous")


def test_a_targets_seed_is_the_runs_own(tmp_path):
    options = options_of(tmp_path, 3)
    kept = {"fedavg": {1: [0.1, 0.4], 2: [0.1, 0.8]}, "cos2p": {0: [0.1, 0.9], 2: [0.1, 0.4, 0.5, 0.9]}}
    for method, by_seed in kept.items():
        for seed, accuracies in by_seed.items():
            keep(job_of("digits", seed, method, options).path, run_of(accuracies))
    table = summarise("digits", options, MEMORY)
    ours, fedavg = table["rows"]
    assert (ours["method"], ours["seeds"], ours["time to target"]) == ("cos2p", 2, "3.000"), "seed 0 has no target"
    assert fedavg["time to target"] == "1.000 ± 0.000"
    assert [run["seed"] for run in table["raw"]["cos2p"]] == [0, 2]


def test_the_kept_records_claims_are_what_is_made_of_its_runs():
    record = json.loads((RESULTS / "cos2p.json").read_text())
    (table,) = record["results"]["tables"]
    budget_s = table["budget_s"]

    def curve(run):
        point = {"base": run["base"], "best": run["best"], "family": run["family"], "clients": {}}
        return {**run, "curve": [{**point, "time_s": min(run["time_s"], budget_s)}]}

    runs = {name: {run["seed"]: curve(run) for run in same} for name, same in table["raw"].items()}
    kept = [row["found"] for row in table["claims"] if row["claim"].startswith(("accuracy", "utilisation"))]
    found = claims(runs, budget_s, record["results"]["memory"])
    assert [row["found"] for row in found if row["claim"].startswith(("accuracy", "utilisation"))] == kept


def test_the_best_of_the_family_may_be_one_whose_statistics_were_reestimated(tmp_path):
    member = {"name": "exit 1", "accuracy": 0.2, "accuracy_reestimated": 0.7}
    base = {"accuracy": 0.5, "accuracy_reestimated": 0.4}
    arrival = {"event": "arrival", "partition_id": 0, "finish_s": 1.0, "update_time_s": 1.0, "staleness": 0}
    rows = [
        {"event": "clients", "clients": [{}]},
        {**arrival, "upload_bytes": 1},
        {"event": "merge", "time_s": 1.0, "n_star": 1},
        {"event": "evaluation", "where": "central", "server_round": 1, "time_s": 1.0, **base, "family": [member]},
    ]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, rows)))
    (point,) = outcome(tmp_path / "log")["curve"]
    assert (point["base"], point["best"], point["family"]) == (0.5, 0.7, {"exit 1": 0.2})
    assert (point["rounds"], point["upload_bytes"]) == (1, 1)


def test_every_run_is_a_config_that_parses_and_has_a_file_of_its_own(tmp_path):
    options = options_of(tmp_path, 1)
    longer = argparse.Namespace(**{**vars(options), "budget": 0.2})
    jobs = [job_of(task, 0, method, given) for given in (options, longer) for task in TASKS for method in METHODS]
    for job in jobs:
        parse(job.keys)
    assert len({job.path for job in jobs}) == len(jobs)


def test_a_setting_given_for_all_is_one_of_co_s2ps_runs_alone_and_names_their_files(tmp_path):
    options = options_of(tmp_path, 1)
    given = argparse.Namespace(**{**vars(options), "also": ["cos2p.coverage-norm=per-entry", "cos2p.masks=first"]})
    before, after = ({method: job_of("digits", 0, method, chosen) for method in METHODS} for chosen in (options, given))
    assert {m for m in METHODS if before[m].path != after[m].path} == {m for m in METHODS if "cos2p" in m}
    assert after["cos2p"].keys["cos2p.coverage-norm"] == "per-entry"
    assert after["cos2p random masks"].keys["cos2p.masks"] == "random", "what a row is about stays"
    assert after["fedavg"].keys == before["fedavg"].keys
    with pytest.raises(ConfigError, match=r"unknown key 'cos2p\.mask'"):
        job_of("digits", 0, "cos2p", argparse.Namespace(**{**vars(options), "also": ["cos2p.mask=first"]}))


def test_an_outcome_of_a_real_run_has_what_the_table_needs(tmp_path):
    settings = {"model__name": "resnet8", "model__exits": True, "num_rounds": 1, "data__max_train": 120}
    rows = tiny_run(tmp_path / "run", strategy="cos2p", evaluation__where="both", train__local_epochs=1, **settings)
    got = outcome(tmp_path / "run" / "events.jsonl")
    merges, last = ([row for row in rows if row["event"] == event] for event in ("merge", "evaluation"))
    assert (got["num_rounds"], got["time_s"]) == (1, merges[-1]["time_s"])
    assert len(got["curve"][-1]["clients"]) == 4
    assert got["curve"][-1]["family"], "the last evaluation has the exits"
    in_the_report = summarise_log(read_events(tmp_path / "run"))["utilisation_ratio"]
    assert got["utilisation"] == pytest.approx(in_the_report), "of four clients"
    row = figures(got, got["time_s"], 0.0)
    assert row["base"] == [line["accuracy"] for line in last if line["where"] == "central"][-1]
    assert row["time to target"] == 0.0
    assert not math.isnan(row["clients' own"] + row["first exit"])


@pytest.mark.slow
def test_peak_memory_is_measured_for_each_method_phase_and_device_and_set_against_the_full_model():
    methods = {name: METHODS[name] for name in ("cos2p", "only-capable", "fedavg")}
    memory = cos2p_memory.measure_memory(methods, "vit_micro")
    assert [(row["method"], row["phase"]) for row in memory] == [
        ("cos2p", "masks + weights"),
        ("cos2p", "weights"),
        ("only-capable", "weights"),
        ("fedavg", "weights"),
    ]
    masks, weights, capable, full = memory
    for device in JETSON_PATTERN:
        assert full[f"{device} measured"] > 0
        assert full[f"{device} counted"] == full["jetson-nano counted"], "everybody has the full model"
        assert weights[f"{device} counted"] <= masks[f"{device} counted"] < 1.01 * full[f"{device} counted"]
    assert masks["jetson-tx2 counted"] < 0.78 * full["jetson-tx2 counted"]
    assert [name for name in capable if "measured" in name] == [f"{device} measured" for device in JETSON_PATTERN[2:]]
    ratio = masks["jetson-tx2 measured"] / full["jetson-tx2 measured"]
    assert cos2p_memory.saved_ratios(memory, "cos2p", "jetson-tx2")["masks + weights"] == ratio - 1


@pytest.mark.slow  # as well: -m "not slow" puts itself in the place of the default, which leaves out what is long
@pytest.mark.long
def test_the_quick_version_has_rows_claims_and_memory_and_repeats_nothing(tmp_path, capsys, monkeypatch):
    options = ["--quick", "--budget", "0.2", "--workers", "1", "--store", str(tmp_path / "store")]
    options += ["--out", str(tmp_path / "result.json")]
    record = cos2p.main(options)
    (table,) = record["results"]["tables"]
    assert [row["method"] for row in table["rows"]] == list(cos2p.QUICK)
    assert len(table["claims"]) == 5
    capsys.readouterr()
    monkeypatch.delattr(cos2p_memory, "measure_memory")  # it is kept too
    assert cos2p.main(options)["results"] == record["results"]
    assert "min left" not in capsys.readouterr().out
