"""Runs for tables: kept one by one, extended to a time, and one that fails costs nothing but itself."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bench.adaptcl import METHODS, Case, Task
from bench.common import RESULTS
from bench.hosts import wait_until
from bench.runs import (
    STORES,
    Job,
    add_store,
    best_of,
    carry_out,
    complete,
    first_reaching,
    keep,
    last_within,
    load,
    mean_and_spread,
    merges_a_round,
    read,
    rounds_until,
    run_job,
    store_of,
)
from server_app.config import parse
from server_app.processes import hold
from tests.conftest import ROOT

TINY: dict[str, Any] = {
    "strategy": "fedavg",
    "num-rounds": 2,
    "num-clients": 3,
    "model.name": "mlp",
    "data.max-train": 200,
    "data.partition": "iid",
    "train.schedule": "constant",
}


def last_merge(log: Path) -> dict[str, Any]:
    """What these tests keep of a run."""
    merges = [row for row in read(log) if row["event"] == "merge"]
    return {"round": merges[-1]["server_round"], "times": [row["time_s"] for row in merges]}


def test_a_run_goes_on_beyond_its_rounds_until_a_time_has_passed(tmp_path):
    assert run_job(Job("short", TINY, tmp_path, last_merge)) == ("short", "")
    short = load(tmp_path / "short.json")
    until_s = 3.5 * short["times"][0]
    assert run_job(Job("long", TINY, tmp_path, last_merge, until_s)) == ("long", "")
    long = load(tmp_path / "long.json")
    assert long["times"][:2] == short["times"]
    assert long["times"][-1] >= until_s
    assert 4 <= long["round"] <= 6


def test_a_run_that_fails_is_told_with_its_reason_and_leaves_no_outcome(tmp_path, capsys):
    name, reason = run_job(Job("bad", {**TINY, "num-clients": 150}, tmp_path, last_merge))
    assert name == "bad"
    assert "150" in reason
    assert not (tmp_path / "bad.json").exists()
    print("output is back")
    assert "output is back" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("times", "until_s", "rounds"),
    [
        ([1, 2, 3], 3.0, 0),
        ([1, 2, 3], 5.0, 5),
        ([1, 2, 3], 5.1, 6),
        ([3, 6, 9, 10, 11, 12], 14.0, 8),  # rounds have become shorter
        ([2.0], 3.0, 2),
    ],
)
def test_the_rounds_still_needed_are_those_of_the_present_pace(times, until_s, rounds, tmp_path):
    rows = [{"event": "merge", "server_round": n, "time_s": t} for n, t in enumerate(times, 1)]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, rows)))
    assert rounds_until(tmp_path / "log", until_s) == rounds


def test_no_run_is_started_after_the_time_for_all_is_over(tmp_path):
    reason = run_job(Job("late", TINY, tmp_path, last_merge), time.monotonic() - 1)[1]
    assert reason == "the time for all runs is over"
    assert not (tmp_path / "late.json").exists()


def test_a_run_that_another_process_carries_out_is_left_to_it(tmp_path):
    job = Job("a", {"num-rounds": 1}, tmp_path, lambda log: {})
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "theirs").touch()
    with hold(tmp_path / "runs" / "a.lock"):
        assert run_job(job) == ("a", "another process is at it")
    assert (tmp_path / "runs" / "a" / "theirs").exists()


def dying(log: Path) -> dict[str, Any]:
    """What a fault in a library does."""
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


@pytest.mark.slow
def test_a_run_whose_process_dies_costs_itself_and_no_other(tmp_path, capsys):
    measures = {"first": last_merge, "dies": dying, "after": last_merge, "last": last_merge}
    jobs = [Job(name, TINY, tmp_path, measure) for name, measure in measures.items()]
    failed = carry_out(jobs, workers=1)
    assert list(failed) == ["dies"]
    assert "died" in failed["dies"]
    assert {path.stem for path in tmp_path.glob("*.json")} == {"first", "after", "last"}
    assert "[4/4]" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's word on a parent's death is Linux's")
def test_the_processes_of_a_benchmark_that_is_killed_end_with_it(tmp_path):
    script = (
        "import sys; from pathlib import Path; from bench.runs import Job, carry_out;"
        "from tests.bench.test_runs import never_done;"
        "carry_out([Job('a', {'num-rounds': 1, 'num-clients': 2}, Path(sys.argv[1]), never_done)], 1)"
    )
    bench = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
    try:
        wait_until(lambda: (tmp_path / "pid").exists(), 120.0, "the run to be measured")
        worker = int((tmp_path / "pid").read_text())
    finally:
        bench.kill()
        bench.wait()
    wait_until(lambda: not is_at_work(worker), 30.0, "the worker's end")


def never_done(log: Path) -> dict[str, Any]:
    """A measure that says who takes it, and goes on for ever."""
    part = log.parents[3] / "pid.part"
    part.write_text(str(os.getpid()))
    part.rename(log.parents[3] / "pid")
    threading.Event().wait()
    return {}


def is_at_work(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_outcome_is_whole_or_not_there(tmp_path):
    keep(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        keep(tmp_path / "a.json", {"x": object()})
    assert load(tmp_path / "a.json") == {"x": 1}


def test_means_say_how_many_seeds_did_not_get_there():
    assert mean_and_spread([0.5, 0.7]) == "0.600 ± 0.141"
    assert mean_and_spread([0.25]) == "0.250"
    assert mean_and_spread([0.5, None, float("inf")]) == "not reached (2 of 3)"
    assert mean_and_spread([float("nan"), float("nan")]) == ""


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_bench_adaptcl_is_a_config_with_a_file_of_its_own(method):
    parse({**Task({}, 1, 0.2).keys, **METHODS[method]})
    names = {Case("digits", 5.0, 0, other).name for other in METHODS}
    assert len(names) == len(METHODS)


CURVE = [{"time_s": 0.0, "bytes": 0.0, "best": 0.1}, {"time_s": 1.0, "bytes": 0.3, "best": 0.5}]


def test_a_point_lies_within_a_limit_that_differs_in_the_last_digits_only():
    assert last_within(CURVE, "bytes", 0.1 + 0.1 + 0.1 - 1e-12)["bytes"] == 0.3
    assert last_within(CURVE, "bytes", 0.299)["bytes"] == 0.0


def test_a_run_that_was_planned_to_end_at_a_limit_may_pass_it_by_its_slack():
    assert last_within(CURVE, "time_s", 0.985, 0.02)["best"] == 0.5
    assert last_within(CURVE, "time_s", 0.985, 0.01)["best"] == 0.1


def test_what_came_after_a_limit_is_not_shown_as_what_was_there():
    with pytest.raises(ValueError, match=r"the first evaluation is at 1, beyond 0\.5"):
        last_within(CURVE[1:], "time_s", 0.5)


def test_a_target_is_reached_at_the_first_point_that_has_it_or_never():
    assert first_reaching(CURVE, 0.5) == 1.0
    assert first_reaching(CURVE, 0.2, "bytes") == 1.0
    assert first_reaching(CURVE, 0.6) == float("inf")


def test_the_best_of_a_family_counts_either_statistics():
    members = [{"accuracy": 0.3, "accuracy_reestimated": 0.1}, {"accuracy": 0.2, "accuracy_reestimated": 0.4}]
    assert best_of(members) == 0.4
    assert best_of(members[:1]) == 0.3


@pytest.mark.parametrize(
    ("strategy", "merges"),
    [("fedasync", 20), ("ssp", 20), ("dc-asgd", 20), ("fedbuff", 2), ("semi-async", 2), ("heterofl", 1)],
)
def test_a_round_of_a_lone_merge_loop_is_as_many_answers_as_there_are_clients(strategy, merges):
    assert merges_a_round({"strategy": strategy, "num-clients": 20}) == merges


def kept_commands():
    """Commands of the records that are tables of outcomes in the repository."""
    records = {path.stem: json.loads(path.read_text())["command"] for path in sorted(RESULTS.glob("*.json"))}
    return {name: shlex.split(command)[2:] for name, command in records.items() if "--kept" in command}


@pytest.mark.parametrize("name", kept_commands())
def test_the_kept_tables_are_what_their_command_makes_of_the_kept_outcomes(name, tmp_path, monkeypatch, capsys):
    module, *words = kept_commands()[name]
    monkeypatch.chdir(ROOT)
    import_module(module).main([*words, "--data-dir", str(tmp_path), "--out", str(tmp_path / "again.json")])
    record, again = (json.loads(path.read_text()) for path in (RESULTS / f"{name}.json", tmp_path / "again.json"))
    assert again["results"] == record["results"]


def test_only_what_the_store_lacks_is_run_nothing_with_kept_and_quick_runs_have_a_store_of_their_own(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    add_store(parser, "adp")
    assert store_of(parser.parse_args([]), "adp") == STORES / "adp"
    assert store_of(parser.parse_args(["--quick"]), "adp") == STORES / "adp-quick"
    mine = ["--workers", "1", "--store", str(tmp_path)]
    assert store_of(parser.parse_args([*mine, "--quick"]), "adp") == tmp_path
    jobs = [Job(name, {**TINY, "seed": seed}, tmp_path, last_merge) for seed, name in enumerate("ab")]
    keep(jobs[0].path, {"round": -1})
    assert complete(jobs, parser.parse_args([*mine, "--kept"])) == {}
    assert not jobs[1].path.exists()
    assert complete(jobs, parser.parse_args(mine)) == {}
    assert load(jobs[0].path) == {"round": -1}
    assert load(jobs[1].path)["round"] == 2
    bad = Job("bad", {**TINY, "num-clients": 150}, tmp_path, last_merge)
    assert list(complete([bad], parser.parse_args(mine))) == ["bad"]
    assert "left out: bad: " in capsys.readouterr().out
