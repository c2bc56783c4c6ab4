"""Runs over real SuperLinks and SuperNodes, plain and with TLS and keys, and what they survive."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from bench.hosts import Federation, rows_of, wait_until
from bench.message import cpu_s
from server_app.checkpoint import load_checkpoint
from strategies import STRATEGIES
from tests.deploy.conftest import LIMIT_S, SMALL
from tests.deploy.link import Link
from tests.runs import OWN, select

pytestmark = pytest.mark.slow

LONG = "train.local-epochs=600"
"""Seconds of training, for what has to happen in its midst."""

ADAPTCL = ("strategy=adaptcl", "adaptcl.pruning-interval=1", "adaptcl.rates.min-timed-rounds=1")


OVER_TLS: dict[str, tuple[str, ...]] = {
    "fedavg": (),
    "adaptcl": ADAPTCL,
    "cos2p": ("model.name=resnet8", "data.max-train=120", "cos2p.quorum-ratio=1"),
    "adasplit": ("adasplit.segments=1",),
}
"""A method of each exchange, and what it needs beyond ``SMALL``."""


def finish(run, run_dir: Path) -> list[dict[str, Any]]:
    """Wait for a run that has to complete, and check what every run leaves behind."""
    assert run.popen.wait(timeout=LIMIT_S) == 0, run.text()
    rows = rows_of(run_dir)
    check_whole(run_dir, rows)
    return rows


def check_whole(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    """The model file loads, the event log is whole, and the report is there."""
    assert [row["event"] for row in rows[:2]] == ["run", "clients"]
    assert rows[-1]["event"] == "end"
    assert rows[-1]["status"] == "completed"
    progress, *_ = load_checkpoint(run_dir)
    assert progress.server_round == rows[-1]["num_rounds"]
    assert (run_dir / "report.html").stat().st_size > 1000


def has_merged(run_dir: Path):
    """Whether the first merge is in the checkpoint, which is written after everything else of a round."""
    return lambda: any(run_dir.glob("checkpoints/round-*.pt"))


def test_fedavg_runs_and_the_engines_time_is_no_part_of_the_update_times(plain, tmp_path):
    run_dir = tmp_path / "run"
    tokens = ("strategy=fedavg", "num-rounds=2", *SMALL, "deployment.num-probes=1")
    rows = finish(plain.submit(run_dir, *tokens), run_dir)
    arrivals = select(rows, "arrival", status="merged")
    assert len(arrivals) == 4
    for row in arrivals:
        away_s = row["finish_s"] - row["start_s"]
        assert row["compute_s"] > 0
        assert row["overhead_s"] > 0.1  # polls, and a process for every message
        assert row["update_time_s"] + row["overhead_s"] == pytest.approx(away_s, abs=1e-6)
        assert row["peak_memory_bytes"] > 0
        assert row["upload_bytes"] == row["download_bytes"] > 0


def test_adaptcl_decides_rates_from_measured_times(plain, tmp_path):
    run_dir = tmp_path / "run"
    rows = finish(plain.submit(run_dir, *ADAPTCL, "num-rounds=2", *SMALL), run_dir)
    decisions = select(rows, "decision")
    assert decisions
    measured = {row["partition_id"]: row["update_time_s"] for row in select(rows, "arrival", server_round=1)}
    first = decisions[0]["update_times_s"]
    assert {int(pid): time_s for pid, time_s in first.items()} == pytest.approx(measured)


@pytest.mark.long
@pytest.mark.parametrize("strategy", sorted(STRATEGIES.keys() - OVER_TLS.keys()))
def test_every_other_method_runs_there_too(strategy, plain, tmp_path):
    run_dir = tmp_path / "run"
    capable = {"only-capable.clients": "0,1"} if strategy == "only-capable" else {}  # nobody knows who is
    settings = {**OWN.get(strategy, {}), **capable, "num-rounds": 2, "data.max-train": 80}
    tokens = (f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in settings.items())
    rows = finish(plain.submit(run_dir, f"strategy={strategy}", *SMALL, *tokens), run_dir)
    assert len(select(rows, "merge")) == 2
    assert not select(rows, "arrival", status="failed")
    assert {row["partition_id"] for row in select(rows, "arrival", status="merged")} == {0, 1}


def fresh_clientapps(federation: Federation, name: str, run) -> list[int]:
    """Process ids of a client that has just been started: it has sent nothing, if its training is ``LONG``."""
    seen = set(federation.clientapps(name))
    wait_until(lambda: set(federation.clientapps(name)) - seen, LIMIT_S, "a client at work", run)
    return sorted(set(federation.clientapps(name)) - seen)


def num_answers(federation: Federation, name: str) -> int:
    """How often a node has sent what its client trained."""
    return federation.nodes[name].text().count("Sending: train")


def test_a_client_killed_in_the_middle_costs_time_or_its_answer_and_the_node_serves_the_next_round(plain, tmp_path):
    """Flower may start the message's process again, after its lease has run out."""
    run_dir = tmp_path / "run"
    run = plain.submit(run_dir, "strategy=fedavg", "num-rounds=3", "reply-timeout-s=240", LONG, *SMALL)
    wait_until(has_merged(run_dir), LIMIT_S, "the first merge", run)
    killed = fresh_clientapps(plain, "n0", run)
    assert all("superexec.py" in Path(f"/proc/{pid}/cmdline").read_text() for pid in killed)  # forked, not started
    wait_until(lambda: any(cpu_s(pid) > 0.8 for pid in killed), LIMIT_S, "a client that trains", run)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    rows = finish(run, run_dir)
    assert killed
    rounds = {row["server_round"]: row for row in select(rows, "arrival", partition_id=0)}
    assert len(rounds) == 3
    assert all(row["status"] in ("merged", "failed") for row in rounds.values())
    assert sum(row["status"] == "failed" for row in rounds.values()) <= 1
    assert select(rows, "merge")[0]["num_merged"] == 2
    assert all(row["status"] == "merged" for row in select(rows, "arrival") if row["partition_id"] != 0)


def test_a_node_frozen_and_thawed_is_waited_for(plain, tmp_path):
    run_dir = tmp_path / "run"
    run = plain.submit(run_dir, "strategy=fedavg", "num-rounds=3", LONG, *SMALL)
    wait_until(has_merged(run_dir), LIMIT_S, "the first merge", run)
    before = num_answers(plain, "n0")
    fresh_clientapps(plain, "n1", run)
    try:
        plain.nodes["n1"].signal(signal.SIGSTOP)
        frozen_s = time.monotonic()
        wait_until(lambda: num_answers(plain, "n0") > before, LIMIT_S, "the other's answer", run)
        wait_until(lambda: time.monotonic() - frozen_s > 5, 60, "a pause that is to be seen")
    finally:
        plain.nodes["n1"].signal(signal.SIGCONT)
    rows = finish(run, run_dir)
    assert [row["num_merged"] for row in select(rows, "merge")] == [2, 2, 2]
    frozen = select(rows, "arrival", server_round=2, partition_id=1)[0]
    assert frozen["finish_s"] - frozen["start_s"] > 5


def test_a_link_that_is_cut_for_a_while_costs_time_and_no_answer_of_others(tmp_path):
    run_dir = tmp_path / "run"
    with Federation(tmp_path / "f", 1, poll_s=0.5) as federation:
        link = Link(federation.port)
        federation.start_node("n1", 1, PRUNUS_SUPERLINK=f"127.0.0.1:{link.port}", PRUNUS_PRELOAD="no")
        before = federation.node_id("n1")
        run = federation.submit(run_dir, "strategy=fedavg", "num-rounds=3", "reply-timeout-s=240", *SMALL)
        wait_until(has_merged(run_dir), LIMIT_S, "the first merge", run)
        fresh_clientapps(federation, "n1", run)
        link.cut()
        wait_until(lambda: num_answers(federation, "n0") > 1, LIMIT_S, "the other's answer", run)
        link.mend()
        rows = finish(run, run_dir)
        link.close()
        assert federation.node_id("n1") == before
        assert all(row["status"] == "merged" for row in select(rows, "arrival", partition_id=0))
        assert select(rows, "arrival", partition_id=1)[-1]["status"] == "merged"


def test_after_the_serverapp_is_killed_the_run_goes_on_from_its_last_merge(plain, tmp_path):
    """What was merged is in the checkpoint; at most the round in flight is done again."""
    run_dir = tmp_path / "run"
    run = plain.submit(run_dir, *ADAPTCL, "num-rounds=3", *SMALL, num_attempts=2)
    wait_until(has_merged(run_dir), LIMIT_S, "the first merge", run)
    num_merged = len(select(rows_of(run_dir), "merge"))
    for pid in plain.serverapps():
        os.kill(pid, signal.SIGKILL)
    assert run.popen.wait(timeout=LIMIT_S) == 0, run.text()
    check_resumed(run_dir, num_merged, run.text(), num_rounds=3)


def check_resumed(run_dir: Path, num_merged: int, said: str, num_rounds: int) -> None:
    first, second = rows_of(run_dir), rows_of(run_dir.with_name(f"{run_dir.name}-2"))
    assert first[-1]["event"] == "end"
    assert first[-1]["status"] == "failed"
    assert f"going on from {run_dir}" in said
    check_whole(run_dir.with_name(f"{run_dir.name}-2"), second)
    merges = select(second, "merge")
    assert [row["server_round"] for row in merges] == list(range(1, num_rounds + 1))
    kept = [row for row in select(first, "merge") if row in merges]
    assert len(kept) >= num_merged - 1  # the last may have been logged a moment before the kill, and not yet kept
    decided = [row for row in select(first, "decision") if row["server_round"] <= len(kept)]
    assert [row for row in select(second, "decision") if row in decided] == decided


def test_after_the_superlink_is_killed_and_restarted_the_run_goes_on_and_the_nodes_find_it_again(tmp_path):
    run_dir = tmp_path / "run"
    with Federation(tmp_path / "f", 2, poll_s=0.5) as federation:
        before = [federation.node_id(name) for name in federation.nodes]
        run = federation.submit(run_dir, *ADAPTCL, "num-rounds=3", *SMALL, num_attempts=2)
        wait_until(has_merged(run_dir), LIMIT_S, "the first merge", run)
        num_merged = len(select(rows_of(run_dir), "merge"))
        assert federation.superlink is not None
        federation.superlink.kill()
        federation.start_superlink()
        assert run.popen.wait(timeout=LIMIT_S) == 0, run.text()
        check_resumed(run_dir, num_merged, run.text(), num_rounds=3)
        assert all(node.is_alive for node in federation.nodes.values())
        assert [federation.node_id(name) for name in federation.nodes] == before


def test_after_all_nodes_are_killed_others_with_their_partitions_take_over(tmp_path):
    """Without keys a node that returns is another node; the run counts the lost answers and goes on."""
    run_dir = tmp_path / "run"
    with Federation(tmp_path / "f", 2, poll_s=0.5) as federation:
        settings = ("num-rounds=3", "loop.max-empty-rounds=2", "reply-timeout-s=240", LONG, *SMALL)
        run = federation.submit(run_dir, "strategy=fedavg", *settings)
        wait_until(has_merged(run_dir), LIMIT_S, "the first merge", run)
        fresh_clientapps(federation, "n0", run)
        before = {name: federation.node_id(name) for name in ("n0", "n1")}
        for node in federation.nodes.values():
            node.kill()
        for number in range(2):
            federation.start_node(f"n{number}", number)
        rows = finish(run, run_dir)
        assert {name: federation.node_id(name) for name in before} != before
        assert {row["status"] for row in select(rows, "arrival")} == {"merged", "failed"}
        assert select(rows, "merge")[-1]["server_round"] == 3


# --- with TLS and keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", OVER_TLS)
def test_a_run_over_tls_with_authenticated_nodes(strategy, secure, tmp_path):
    run_dir = tmp_path / "run"
    tokens = (f"strategy={strategy}", "num-rounds=2", *SMALL, *OVER_TLS[strategy])
    rows = finish(secure.submit(run_dir, *tokens), run_dir)
    assert len(select(rows, "merge")) == 2
    assert {row["partition_id"] for row in select(rows, "arrival", status="merged")} == {0, 1}


def test_a_copy_of_a_runs_folder_goes_on_at_another_superlink_with_other_devices(plain, secure, tmp_path):
    run_dir, moved, second = tmp_path / "run", tmp_path / "elsewhere" / "copy", tmp_path / "second"
    before = finish(plain.submit(run_dir, *ADAPTCL, "num-rounds=2", *SMALL), run_dir)
    shutil.copytree(run_dir, moved)
    shutil.rmtree(run_dir)
    rows = finish(secure.submit(second, *ADAPTCL, "num-rounds=3", *SMALL, f"resume={moved}"), second)
    assert [row["server_round"] for row in select(rows, "merge")] == [1, 2, 3]
    assert select(rows, "merge")[:2] == select(before, "merge")
    assert select(rows, "decision")[: len(select(before, "decision"))] == select(before, "decision")
    assert {row["status"] for row in select(rows, "arrival", server_round=3)} == {"merged"}


def test_a_node_whose_key_is_not_registered_is_refused(secure):
    node = secure.start_node("stranger", 0, is_registered=False, is_awaited=False)
    wait_until(lambda: not node.is_alive, LIMIT_S, "the refusal")
    assert "2004" in node.text()
    assert node.popen.returncode != 0


def test_a_node_without_tls_is_refused(secure, tmp_path):
    insecure = Federation(tmp_path / "f", 0)
    insecure.folder.mkdir()
    insecure.port = secure.port
    node = insecure.start_node("plain", 0, is_awaited=False)
    try:
        assert not node.wait_for(r"SuperNode ID: \d+", 20)
    finally:
        insecure.close()


def test_a_killed_node_returns_with_its_identity_and_a_revoked_key_never(secure):
    before = secure.node_id("n1")
    secure.nodes["n1"].kill()
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:  # refused while the old registration counts as online; systemd tries again too
        node = secure.start_node("n1", 1, is_awaited=False)
        if node.wait_for(r"SuperNode ID: \d+", 120):
            break
        assert "2004" in node.text()
    assert secure.node_id("n1") == before
    secure.script("node-key.sh", "revoke", str(before))
    secure.nodes["n1"].kill()
    node = secure.start_node("n1", 1, is_awaited=False)
    wait_until(lambda: not node.is_alive, LIMIT_S, "the refusal")
    assert "2004" in node.text()
