"""Runs over real SuperLinks and SuperNodes, plain and with TLS and keys, and what they survive."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

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
    "cos2p": (
        *("model.name=resnet8", "data.max-train=120", "cos2p.quorum-ratio=1"),
        *("cos2p.budgets=1,0.5", "cos2p.mask-epochs=2"),
    ),
    "adasplit": ("adasplit.segments=1",),
}
"""What the methods of an exchange of their own need beyond ``SMALL``; FedAvg and AdaptCL have tests of their own.

These two run over TLS in every test of the project; without it, FedAvg and AdaptCL do. The other halves are ``long``.
"""


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


def num_kept(run_dir: Path) -> int:
    """Merges that are in a checkpoint, which is written after everything else of a round."""
    return max((int(path.stem.removeprefix("round-")) for path in run_dir.glob("checkpoints/round-*.pt")), default=0)


def test_adaptcl_decides_rates_from_measured_times_and_its_folder_goes_on_at_another_superlink_with_other_devices(
    plain, secure, tmp_path
):
    run_dir, moved, second = tmp_path / "run", tmp_path / "elsewhere" / "copy", tmp_path / "second"
    before = finish(plain.submit(run_dir, *ADAPTCL, "num-rounds=2", *SMALL), run_dir)
    decisions = select(before, "decision")
    measured = {row["partition_id"]: row["update_time_s"] for row in select(before, "arrival", server_round=1)}
    first = decisions[0]["update_times_s"]
    assert {int(pid): time_s for pid, time_s in first.items()} == pytest.approx(measured)
    shutil.copytree(run_dir, moved)
    shutil.rmtree(run_dir)
    rows = finish(secure.submit(second, *ADAPTCL, "num-rounds=3", *SMALL, f"resume={moved}"), second)
    assert [row["server_round"] for row in select(rows, "merge")] == [1, 2, 3]
    assert select(rows, "merge")[:2] == select(before, "merge")
    assert select(rows, "decision")[: len(decisions)] == decisions
    assert {row["status"] for row in select(rows, "arrival", server_round=3)} == {"merged"}


@pytest.mark.long
@pytest.mark.parametrize("strategy", sorted(STRATEGIES.keys() - {"fedavg", "adaptcl"}))
def test_every_other_method_runs_there_too(strategy, plain, tmp_path):
    """Also those of an exchange of their own, which run over TLS in every test of the project."""
    run_dir = tmp_path / "run"
    capable = {"only-capable.clients": "0,1"} if strategy == "only-capable" else {}  # nobody knows who is
    settings = {**OWN.get(strategy, {}), **capable, "num-rounds": 2, "data.max-train": 80}
    tokens = (f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in settings.items())
    own = OVER_TLS.get(strategy, ())
    rows = finish(plain.submit(run_dir, f"strategy={strategy}", *SMALL, *tokens, *own), run_dir)
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


def kill_client(federation: Federation, run) -> None:
    """Flower may start the message's process again, after its lease has run out."""
    killed = fresh_clientapps(federation, "n0", run)
    assert killed
    assert all("superexec.py" in Path(f"/proc/{pid}/cmdline").read_text() for pid in killed)  # forked, not started
    wait_until(lambda: any(cpu_s(pid) > 0.8 for pid in killed), LIMIT_S, "a client that trains", run)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)


def freeze_node(federation: Federation, run) -> None:
    before = num_answers(federation, "n0")
    fresh_clientapps(federation, "n1", run)
    try:
        federation.nodes["n1"].signal(signal.SIGSTOP)
        frozen_s = time.monotonic()
        wait_until(lambda: num_answers(federation, "n0") > before, LIMIT_S, "the other's answer", run)
        wait_until(lambda: time.monotonic() - frozen_s > 5, 60, "a pause that is to be seen")
    finally:
        federation.nodes["n1"].signal(signal.SIGCONT)


def cut_link(federation: Federation, run, link: Link) -> None:
    before = num_answers(federation, "n0")
    fresh_clientapps(federation, "n1", run)
    link.cut()
    wait_until(lambda: num_answers(federation, "n0") > before, LIMIT_S, "the other's answer", run)
    link.mend()


def test_a_run_bears_a_killed_client_a_frozen_node_a_cut_link_and_the_loss_of_all_nodes(tmp_path):
    """One after the other: each costs time or the answer it hit, and no answer of others."""
    run_dir = tmp_path / "run"
    with Federation(tmp_path / "f", 1, poll_s=0.5) as federation:
        link = Link(federation.port)
        far = {"PRUNUS_SUPERLINK": f"127.0.0.1:{link.port}", "PRUNUS_PRELOAD": "no"}
        federation.start_node("n1", 1, **far)
        ids = {name: federation.node_id(name) for name in ("n0", "n1")}
        settings = ("num-rounds=7", "loop.max-empty-rounds=2", "reply-timeout-s=240", LONG, *SMALL)
        run = federation.submit(run_dir, "strategy=fedavg", *settings)
        wait_until(lambda: num_kept(run_dir), LIMIT_S, "the first merge", run)

        def answers_during(injury) -> dict[int, list[dict[str, Any]]]:
            before = num_kept(run_dir)
            injury()
            last = num_kept(run_dir) + 1
            wait_until(lambda: num_kept(run_dir) >= last, LIMIT_S, "the merge after an injury", run)
            rows = [row for row in select(rows_of(run_dir), "arrival") if before < row["server_round"] <= last]
            return {pid: [row for row in rows if row["partition_id"] == pid] for pid in range(2)}

        answers = answers_during(lambda: kill_client(federation, run))
        assert [row["status"] for row in answers[0]].count("failed") <= 1
        assert {row["status"] for row in answers[1]} == {"merged"}

        answers = answers_during(lambda: freeze_node(federation, run))
        assert {row["status"] for row in answers[0] + answers[1]} == {"merged"}
        assert max(row["finish_s"] - row["start_s"] for row in answers[1]) > 5

        answers = answers_during(lambda: cut_link(federation, run, link))
        assert {row["status"] for row in answers[0]} == {"merged"}
        assert [row["status"] for row in answers[1]].count("failed") <= 1
        assert {name: federation.node_id(name) for name in ids} == ids

        fresh_clientapps(federation, "n0", run)
        for node in federation.nodes.values():
            node.kill()
        federation.start_node("n0", 0)
        federation.start_node("n1", 1, **far)
        rows = finish(run, run_dir)
        link.close()
        # without keys a node that returns is another node; the run counts the lost answers and goes on
        assert not set(ids.values()) & {federation.node_id(name) for name in ids}
        assert {row["status"] for row in select(rows, "arrival")} == {"merged", "failed"}
        last = select(rows, "merge")[-1]
        assert (last["server_round"], last["num_merged"]) == (7, 2)


def check_continued(failed: Path, following: Path, num_merged: int, said: str) -> None:
    """One attempt has the merges and decisions of the one before."""
    first, second = rows_of(failed), rows_of(following)
    assert first[-1]["event"] == "end"
    assert first[-1]["status"] == "failed"
    row = select(second, "resume")[-1]
    done = row["server_round"]
    assert row["source"] == str(failed)
    assert f"going on from {failed} after round {done}:" in said
    kept = [row for row in select(first, "merge") if row["server_round"] <= done]
    assert len(kept) >= num_merged - 1  # the last may have been logged a moment before the kill, and not yet kept
    assert select(second, "merge")[: len(kept)] == kept
    decided = [row for row in select(first, "decision") if row["server_round"] <= done]
    assert [row for row in select(second, "decision") if row in decided] == decided


def test_after_the_serverapp_and_then_the_superlink_is_killed_the_run_goes_on_from_its_last_merge(tmp_path):
    """What was merged is in a checkpoint: at most the round in flight is done again; the nodes find their way back."""
    run_dir, second, third = (tmp_path / name for name in ("run", "run-2", "run-3"))
    with Federation(tmp_path / "f", 2, poll_s=0.5) as federation:
        before = [federation.node_id(name) for name in federation.nodes]
        run = federation.submit(run_dir, *ADAPTCL, "num-rounds=4", *SMALL, num_attempts=3)
        wait_until(lambda: num_kept(run_dir), LIMIT_S, "the first merge", run)
        num_first = len(select(rows_of(run_dir), "merge"))
        for pid in federation.serverapps():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: num_kept(second) > num_kept(run_dir), LIMIT_S, "a merge of the second attempt", run)
        num_second = len(select(rows_of(second), "merge"))
        assert federation.superlink is not None
        federation.superlink.kill()
        federation.start_superlink()
        assert run.popen.wait(timeout=LIMIT_S) == 0, run.text()
        assert all(node.is_alive for node in federation.nodes.values())
        assert [federation.node_id(name) for name in federation.nodes] == before
    check_continued(run_dir, second, num_first, run.text())
    check_continued(second, third, num_second, run.text())
    rows = rows_of(third)
    check_whole(third, rows)
    assert [row["server_round"] for row in select(rows, "merge")] == [1, 2, 3, 4]


@pytest.mark.long
@pytest.mark.parametrize("strategy", OVER_TLS)
def test_a_method_of_its_own_exchange_goes_on_from_its_last_merge_too(strategy, plain, tmp_path):
    run_dir, second = tmp_path / "run", tmp_path / "run-2"
    tokens = (f"strategy={strategy}", "num-rounds=4", *SMALL, *OVER_TLS[strategy])
    run = plain.submit(run_dir, *tokens, num_attempts=2)
    wait_until(lambda: num_kept(run_dir), LIMIT_S, "the first merge", run)
    for pid in plain.serverapps():
        os.kill(pid, signal.SIGKILL)
    rows = finish(run, second)
    check_continued(run_dir, second, 1, run.text())
    rounds = [row["server_round"] for row in select(rows, "merge")]
    assert rounds == list(range(rounds[0], 5)), "every round that merges, once; AdaSplit's first ones have no server"
    assert {row["partition_id"] for row in select(rows, "arrival", status="merged")} == {0, 1}


@pytest.mark.long
@pytest.mark.parametrize("small_disk", ["1m"], indirect=True)
def test_a_run_that_fills_the_servers_disk_stops_and_says_so_and_goes_on_elsewhere(small_disk, plain, tmp_path):
    second = tmp_path / "second"
    tokens = ("strategy=fedavg", "keep-checkpoints=100", *SMALL)
    run = plain.submit(small_disk, *tokens, "num-rounds=50")
    assert run.popen.wait(timeout=LIMIT_S) == 1
    assert "No space left on device" in run.text()
    before = rows_of(small_disk)
    assert before[-1]["status"] == "failed"
    assert "No space left on device" in before[-1]["reason"]
    num_before = num_kept(small_disk)
    assert 0 < num_before < 50
    more = (f"num-rounds={num_before + 2}", f"resume={small_disk}")
    rows = finish(plain.submit(second, *tokens, *more), second)
    assert [row["server_round"] for row in select(rows, "merge")] == list(range(1, num_before + 3))
    assert [row["server_round"] for row in select(rows, "resume")] == [num_before]


@pytest.mark.long
def test_a_node_whose_link_is_cut_for_longer_than_it_counts_as_online_takes_part_again(tmp_path):
    run_dir = tmp_path / "run"
    with Federation(tmp_path / "f", 1, poll_s=0.5) as federation:
        link = Link(federation.port)
        federation.start_node("n1", 1, PRUNUS_SUPERLINK=f"127.0.0.1:{link.port}")
        before = federation.node_id("n1")
        run = federation.submit(run_dir, "strategy=fedavg", "num-rounds=10000", *SMALL)
        wait_until(lambda: num_kept(run_dir), LIMIT_S, "the first merge", run)
        link.cut()
        wait_until(lambda: is_offline(federation, before), LIMIT_S, "the end of the connection", run)
        alone = num_kept(run_dir) + 2  # the round that was open may still have its answer
        wait_until(lambda: num_kept(run_dir) >= alone, LIMIT_S, "a round without it", run)
        link.mend()
        wait_until(lambda: merged_after(run_dir, 1, alone), LIMIT_S, "its next answer", run)
        assert federation.node_id("n1") == before
        link.close()
    rows = rows_of(run_dir)
    assert {row["status"] for row in select(rows, "arrival", partition_id=0)} == {"merged"}
    assert select(rows, "merge", server_round=alone)[0]["num_merged"] == 1
    load_checkpoint(run_dir)


def merged_after(run_dir: Path, partition_id: int, server_round: int) -> bool:
    """Whether a client's answer was merged in a later round."""
    found = select(rows_of(run_dir), "arrival", partition_id=partition_id, status="merged")
    return any(row["server_round"] > server_round for row in found)


# --- with TLS and keys ------------------------------------------------------------------------------------------------


def test_fedavg_runs_and_the_engines_time_is_no_part_of_the_update_times(secure, tmp_path):
    run_dir = tmp_path / "run"
    tokens = ("strategy=fedavg", "num-rounds=2", *SMALL, "deployment.num-probes=1")
    rows = finish(secure.submit(run_dir, *tokens), run_dir)
    arrivals = select(rows, "arrival", status="merged")
    assert len(arrivals) == 4
    for row in arrivals:
        away_s = row["finish_s"] - row["start_s"]
        assert row["compute_s"] > 0
        assert row["overhead_s"] > 0.1  # polls, and a process for every message
        assert row["update_time_s"] + row["overhead_s"] == pytest.approx(away_s, abs=1e-6)
        assert row["peak_memory_bytes"] > 0
        assert row["upload_bytes"] == row["download_bytes"] > 0


@pytest.mark.parametrize("strategy", [*OVER_TLS, pytest.param("adaptcl", marks=pytest.mark.long)])
def test_a_method_of_its_own_exchange_runs_there(strategy, secure, tmp_path):
    run_dir = tmp_path / "run"
    tokens = (f"strategy={strategy}", "num-rounds=2", *SMALL, *OVER_TLS.get(strategy, ADAPTCL))
    before = set(secure.folder.rglob("memory/**/*.pt"))
    rows = finish(secure.submit(run_dir, *tokens), run_dir)
    assert len(select(rows, "merge")) == 2
    assert {row["partition_id"] for row in select(rows, "arrival", status="merged")} == {0, 1}
    if strategy == "cos2p":
        remembered = sorted(set(secure.folder.rglob("memory/**/*.pt")) - before, key=lambda path: path.name)
        first, second = mask_steps(remembered)
        assert second == 2 * first > 0, "the second mask phase goes on from the first"


def mask_steps(memories: Sequence[Path]) -> list[float]:
    """Steps that the mask scores' optimiser had made, in each of a client's memories that have one."""
    found = (torch.load(path, weights_only=True).get("objective", {}) for path in memories)
    return [float(memory["optimizer"]["step"]) for memory in found if "optimizer" in memory]


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


def is_offline(federation: Federation, node_id: int) -> bool:
    """Whether the SuperLink, by its database, has not heard from a node for long."""
    with closing(sqlite3.connect(federation.folder / "superlink" / "superlink.db", timeout=60)) as database:
        signed = (node_id - 2**64,) if node_id >= 2**63 else (node_id,)
        (online_until_s,) = database.execute("select online_until from node where node_id = ?", signed).fetchone()
    return bool(online_until_s < time.time())


def test_a_killed_node_returns_to_its_run_with_its_identity_and_a_revoked_key_never_but_with_a_new_one(
    secure, tmp_path
):
    run_dir, before = tmp_path / "run", secure.node_id("n1")
    run = secure.submit(run_dir, "strategy=fedavg", "num-rounds=10000", *SMALL)
    wait_until(lambda: num_kept(run_dir), LIMIT_S, "the first merge", run)
    secure.nodes["n1"].kill()
    killed = num_kept(run_dir) + 1
    wait_until(lambda: is_offline(secure, before), LIMIT_S, "the end of the old connection")  # refused before
    secure.start_node("n1", 1)
    assert secure.node_id("n1") == before
    wait_until(lambda: merged_after(run_dir, 1, killed), LIMIT_S, "an answer of the node that has returned", run)
    for pid in secure.serverapps():
        os.kill(pid, signal.SIGKILL)
    run.popen.wait(timeout=LIMIT_S)
    answers = select(rows_of(run_dir), "arrival")
    assert {row["status"] for row in answers if row["partition_id"] == 0} == {"merged"}
    assert [row["status"] for row in answers if row["partition_id"] == 1].count("failed") <= 1

    secure.script("node-key.sh", "revoke", str(before))
    secure.nodes["n1"].kill()
    node = secure.start_node("n1", 1, is_awaited=False)
    wait_until(lambda: not node.is_alive, LIMIT_S, "the refusal")
    assert "2004" in node.text()
    for name in ("key", "key.pub"):
        (secure.folder / "n1" / name).unlink()
    secure.start_node("n1", 1)
    assert secure.node_id("n1") != before
