"""AdaSplit: what crosses the network and when, equivalent exchanges, faults, and ways back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client_app.handler import handle
from server_app.checkpoint import load_checkpoint
from tests.runs import equal_states, final_state, select, tiny_run, without_timings
from wire.flat import ConfigError
from wire.message import Instruction, Report

BASE: dict[str, Any] = {
    "strategy": "adasplit",
    "num_clients": 3,
    "num_rounds": 5,
    "train__optimizer": "adam",
    "train__learning_rate": 0.003,
    "train__local_epochs": 1,
    "data__max_train": 240,
    "data__partition": "dirichlet:2",
    "evaluation__every": 9,
    "adasplit__eta": 1.0,
    "adasplit__kappa": 0.6,
    "adasplit__segments": 4,
}


TWO_TESTS_OF_40: dict[str, Any] = {"num_clients": 2, "data__max_train": 400, "data__partition": "iid"}


def adasplit(folder: Path, handler: Callable[[Instruction], Report] = handle, **settings: Any) -> list[dict[str, Any]]:
    return tiny_run(folder, handler, **{**BASE, **settings})


def masks(folder: Path) -> dict[str, torch.Tensor]:
    own = load_checkpoint(folder)[1]
    return {pid: client["logits"] for pid, client in own["server"]["clients"].items()}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """One grant and one upload per step."""
    folder = tmp_path_factory.mktemp("exact")
    return folder, adasplit(folder, adasplit__exchange="exact")


def test_nothing_comes_down_in_training_and_nothing_goes_up_in_the_local_phase(exact):
    arrivals = select(exact[1], "arrival")
    assert {row["download_bytes"] for row in arrivals} == {0}
    assert {row["server_round"] for row in arrivals} == {3, 4, 5}  # the request of round 3 covers all local rounds
    assert {row["upload_bytes"] for row in select(exact[1], "arrival", server_round=3)} == {0}
    assert all(row["upload_bytes"] > 0 for row in arrivals if row["server_round"] > 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"adasplit__segments": 1},
        {"adasplit__segments": 3, "adasplit__pipeline": False},
        {"adasplit__segments": 3},
        {"adasplit__segments": 1, "adasplit__max_upload_bytes": 17 * 4 * 200 * 2},
    ],
    ids=["one upload a round", "three segments", "three segments beside the clients", "split by its bytes"],
)
def test_uploads_of_many_steps_train_the_server_bit_for_bit_as_one_upload_per_step(exact, settings, tmp_path):
    rows = adasplit(tmp_path, **settings)
    assert equal_states(final_state(tmp_path), final_state(exact[0]))
    assert equal_states(masks(tmp_path), masks(exact[0]))
    assert select(rows, "evaluation")[-1]["clients"] == select(exact[1], "evaluation")[-1]["clients"]
    assert max(row.get("num_requests", 1) for row in select(rows, "arrival")) < max(
        row["num_requests"] for row in select(exact[1], "arrival", server_round=5)
    )


@pytest.mark.slow
def test_so_they_do_where_the_servers_half_has_batch_norm(tmp_path):
    net = {"model__name": "cnn", "model__width": 0.25, "num_rounds": 3}
    adasplit(tmp_path / "exact", adasplit__exchange="exact", **net)
    adasplit(tmp_path / "segment", adasplit__segments=2, **net)
    state = final_state(tmp_path / "segment")
    assert equal_states(state, final_state(tmp_path / "exact"))
    assert float(state["blocks.2.norm.running_mean"].abs().sum()) > 0


def test_no_upload_exceeds_its_bound(tmp_path):
    bound, seen = 17 * 4 * 200 * 2, []

    def spy(instruction: Instruction) -> Report:
        report = handle(instruction)
        if instruction.action == "train":
            seen.append(sum(t.numel() * 4 for k, t in report.companions.items() if k == "values"))
        return report

    adasplit(tmp_path, spy, adasplit__max_upload_bytes=bound, adasplit__segments=1)
    assert 0 < max(seen) <= bound


def test_a_long_test_comes_in_pieces_within_the_bound_and_finds_what_it_finds_at_once(tmp_path):
    bound, seen = 17 * 4 * 200, []

    def spy(instruction: Instruction) -> Report:
        report = handle(instruction)
        if instruction.action == "evaluate":
            seen.append(len(report.companions["labels"]) * 4 * 200)
        return report

    settings = {"num_rounds": 2, **TWO_TESTS_OF_40, "evaluation__own_classes": True}
    whole = select(adasplit(tmp_path / "whole", **settings), "evaluation")
    pieces = select(adasplit(tmp_path / "pieces", spy, adasplit__max_upload_bytes=bound, **settings), "evaluation")
    assert 0 < max(seen) <= bound
    assert len(seen) == 2 * 3 * len(pieces)  # 40 samples of two clients each, 17 at a time
    assert len(pieces) == len(whole)
    for mine, theirs in zip(pieces, whole, strict=True):
        assert mine["clients"] == theirs["clients"]
        assert mine["num_examples"] == theirs["num_examples"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["upload_bytes"] >= theirs["upload_bytes"] > 0  # all pieces are counted


@pytest.mark.parametrize("fault", ["too long", "another test", "dies", "signed by another"])
def test_a_client_whose_test_goes_wrong_in_the_middle_is_left_out_and_the_others_are_not(fault, tmp_path):
    num_asked = {0: 0, 1: 0}

    def faulty(instruction: Instruction) -> Report:
        report = handle(instruction)
        if instruction.action != "evaluate":
            return report
        num_asked[instruction.partition_id] += 1
        if instruction.partition_id == 0 or instruction.settings["test-start"] == 0:
            return report
        if fault == "dies":
            raise RuntimeError("the battery is empty")
        if fault == "too long":
            everything = {**instruction.settings, "test-start": 0, "test-stop": 10**6}
            return handle(replace(instruction, settings=everything))
        return replace(report, **({"partition_id": 0} if fault == "signed by another" else {"num_examples": 10**6}))

    rows = adasplit(tmp_path, faulty, num_rounds=2, **TWO_TESTS_OF_40, adasplit__max_upload_bytes=17 * 4 * 200)
    assert [set(row["clients"]) for row in select(rows, "evaluation")] == [{"0"}, {"0"}]
    assert num_asked == {0: 2 * 3, 1: 2 * 2}  # in two evaluations; after its fault it is asked no further
    warnings = [row["message"] for row in select(rows, "warning")]
    expected = {
        "too long": "at most 1 steps of at most 17 samples, got 1 of up to 40",
        "another test": "became one of 1000000",
        "dies": "RuntimeError: the battery is empty",
        "signed by another": "answer signed by client 0",
    }[fault]
    assert all("1 of 2 tests are missing: client 1: " in message and expected in message for message in warnings)
    assert len(warnings) == 2


def test_frozen_uploads_cost_one_more_pass_and_fewest_requests(exact, tmp_path):
    rows = adasplit(tmp_path, adasplit__exchange="frozen")
    frozen, step_by_step = (select(r, "arrival", server_round=5) for r in (rows, exact[1]))
    assert all("num_requests" not in row for row in frozen)
    for mine, theirs in zip(
        sorted(frozen, key=lambda r: r["partition_id"]),
        sorted(step_by_step, key=lambda r: r["partition_id"]),
        strict=True,
    ):
        # 64 x 200 multiplications a sample forward
        assert mine["train_macs"] - theirs["train_macs"] == 64 * 200 * mine["num_examples"]
    assert select(rows, "evaluation")[-1]["accuracy"] > 0.7


@pytest.mark.slow
@pytest.mark.parametrize(("kappa", "eta", "local"), [(0.5, 1.0, 3), (0.5, 0.5, 3), (0.7, 0.5, 4)])
def test_traffic_is_one_minus_kappa_times_eta_half_the_density_of_split_learnings(kappa, eta, local, tmp_path):
    """Equal shares of iid data; counted bytes, as the authors count."""
    common = {"num_clients": 4, "num_rounds": 6, "data__partition": "iid", "data__max_train": 320}
    mine = adasplit(tmp_path / "a", adasplit__kappa=kappa, adasplit__eta=eta, **common)
    theirs = adasplit(tmp_path / "b", **{**common, "strategy": "sl-basic", "num_rounds": 1})
    sent = [row for row in select(mine, "arrival") if row.get("counted_bytes")]
    split = 6 * sum(row["counted_bytes"] for row in select(theirs, "arrival"))
    dense = sum(row["dense_bytes"] for row in sent)  # as if the density were 1
    assert sum(row["counted_bytes"] for row in sent) < 0.7 * dense
    assert dense / split == pytest.approx((6 - local) / 6 * eta / 2, rel=0.15)
    assert {row["server_round"] for row in sent} == set(range(local + 1, 7))


def test_a_test_on_the_server_and_one_on_the_client_agree(exact, tmp_path):
    rows = adasplit(tmp_path, adasplit__evaluate="client", adasplit__exchange="exact")
    here, there = (select(r, "evaluation")[-1] for r in (rows, exact[1]))
    assert here["clients"] == there["clients"]
    assert here["download_bytes"] > 0
    assert there["download_bytes"] == 0
    assert there["upload_bytes"] > here["upload_bytes"] == 0


def test_averaged_halves_are_sent_counted_and_taken_over(tmp_path):
    seen = []

    def spy(instruction: Instruction) -> Report:
        if instruction.action == "train" and instruction.server_round == 5 and instruction.state:
            seen.append(instruction.state)
        return handle(instruction)

    rows = adasplit(tmp_path, spy, adasplit__client_sync="average", adasplit__segments=1)
    half = 4 * (64 * 200 + 200)
    assert {row["download_bytes"] for row in select(rows, "arrival", server_round=5)} == {half}
    assert all(row["upload_bytes"] > half for row in select(rows, "arrival", server_round=4))
    assert len(seen) == 3
    before = torch.load(tmp_path / "checkpoints" / "round-000004.pt", weights_only=True)["state"]
    assert all(torch.equal(state[key], before[key]) for state in seen for key in state)
    assert set(seen[0]) == {"blocks.0.linear.weight", "blocks.0.linear.bias"}


@pytest.mark.slow
def test_a_handed_on_half_is_the_one_of_the_client_before_at_every_step(tmp_path):
    last: dict[str, torch.Tensor] = {}
    num_checked = 0

    def spy(instruction: Instruction) -> Report:
        nonlocal num_checked
        report = handle(instruction)
        if instruction.action == "train":
            if instruction.state:
                assert equal_states(dict(instruction.state), last)
                num_checked += 1
            if report.state:
                last.clear()
                last.update(report.state)
        return report

    adasplit(tmp_path, spy, adasplit__client_sync="handoff", adasplit__exchange="exact")
    assert num_checked > 10


@pytest.mark.slow
def test_a_servers_gradient_that_is_switched_on_comes_down_and_changes_what_clients_learn(exact, tmp_path):
    rows = adasplit(tmp_path, adasplit__server_gradient=True, adasplit__exchange="exact")
    assert all(row["download_bytes"] > 0 for row in select(rows, "arrival", server_round=5))
    assert not equal_states(masks(tmp_path), masks(exact[0]))
    assert select(rows, "evaluation")[-1]["accuracy"] > 0.7


def test_clients_that_may_not_train_keep_their_random_half(tmp_path):
    rows = adasplit(tmp_path, adasplit__train_client=False)
    assert {row.get("loss") for row in select(rows, "arrival")} == {None}


@pytest.mark.slow
def test_clients_without_some_classes_take_part(tmp_path):
    rows = adasplit(tmp_path, data__partition="pathological:2", num_clients=5, evaluation__own_classes=True)
    assert {row["status"] for row in select(rows, "arrival")} == {"merged"}
    assert select(rows, "evaluation")[-1]["accuracy"] > 0.8


def test_a_client_that_dies_between_grant_and_upload_loses_its_grant_and_the_bandit_imputes(tmp_path):
    def dying(instruction: Instruction) -> Report:
        if instruction.action == "train" and instruction.partition_id == 1 and instruction.server_round == 4:
            raise RuntimeError("the battery is empty")
        return handle(instruction)

    rows = adasplit(tmp_path, dying, adasplit__segments=1, adasplit__pipeline=False)
    failed = select(rows, "arrival", status="failed")
    assert [(row["partition_id"], row["server_round"]) for row in failed] == [(1, 4)]
    assert [row["num_merged"] for row in select(rows, "merge")] == [3, 2, 3]
    arms = load_checkpoint(tmp_path / "checkpoints" / "round-000004.pt")[1]["talk"]
    assert set(arms["losses"]) == {"0", "2"}  # what the next decision learns: nothing of client 1
    arms = load_checkpoint(tmp_path)[1]["talk"]["orchestrator"]["arms"]
    assert arms["1"][2] == 100.0  # the last two losses were imputed: (100 + 100) / 2
    assert arms["0"][2] < 10


class ServerKilledError(BaseException):
    """Stands for SIGKILL: nothing of the server's runs on."""


@pytest.mark.slow
def test_clients_finish_the_local_phase_when_the_server_dies_and_do_not_repeat_it(exact, tmp_path):
    def kill_then(instruction: Instruction) -> Report:
        handle(instruction)  # the client works on; its answer finds nobody
        if instruction.action == "train" and instruction.partition_id == 1:
            raise ServerKilledError
        raise RuntimeError("the answer is lost")

    settings = {"adasplit__exchange": "exact"}
    with pytest.raises(ServerKilledError):
        adasplit(tmp_path / "first", kill_then, **settings)
    rows = adasplit(tmp_path / "second", resume=str(tmp_path / "first"), **settings)
    macs = {row["partition_id"]: row["train_macs"] for row in select(rows, "arrival", server_round=3)}
    assert macs[0] == macs[1] == 0
    assert macs[2] > 0
    assert equal_states(final_state(tmp_path / "second"), final_state(exact[0]))


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", [True, False])
def test_a_run_killed_in_the_global_phase_goes_on_with_masks_optimisers_bandit_and_waiting_uploads(pipeline, tmp_path):
    settings = {"adasplit__eta": 0.4, "adasplit__segments": 3, "num_rounds": 6, "adasplit__pipeline": pipeline}
    whole = adasplit(tmp_path / "whole", **settings)

    def killed(instruction: Instruction) -> Report:
        if instruction.server_round == 5 and instruction.settings.get("start", 0):
            raise ServerKilledError  # in the middle of a round
        return handle(instruction)

    with pytest.raises(ServerKilledError):
        adasplit(tmp_path / "first", killed, **settings)
    rows = adasplit(tmp_path / "second", resume=str(tmp_path / "first"), **settings)
    assert equal_states(final_state(tmp_path / "second"), final_state(tmp_path / "whole"))
    assert equal_states(masks(tmp_path / "second"), masks(tmp_path / "whole"))
    assert without_timings(rows)[-6:] == without_timings(whole)[-6:]


@pytest.mark.parametrize("is_killed", [False, True])
def test_no_thread_of_the_server_outlives_a_run_however_it_ends(is_killed, monkeypatch, tmp_path):
    num_started = 0
    start = ThreadPoolExecutor.submit

    def submit(pool: ThreadPoolExecutor, *work: Any) -> Any:
        nonlocal num_started
        num_started += pool._thread_name_prefix == "replay"
        return start(pool, *work)

    def kill(instruction: Instruction) -> Report:
        if is_killed and num_started and instruction.action == "train":
            raise ServerKilledError
        return handle(instruction)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    with pytest.raises(ServerKilledError) if is_killed else nullcontext():
        adasplit(tmp_path, kill, adasplit__segments=2, num_rounds=2)
    assert num_started
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("replay")]


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({}, "round_steps: got nothing, expected a number of steps"),
        ({"round_steps": -1.0}, "round_steps: got -1"),
        ({"round_steps": 1e9}, "round_steps: got 1e+09"),
        ({"round_steps": 2.5}, "round_steps: got 2.5"),
    ],
)
def test_a_client_that_does_not_say_how_many_steps_it_makes_is_turned_away_and_the_run_goes_on(
    metrics, reason, tmp_path
):
    def vague(instruction: Instruction) -> Report:
        report = handle(instruction)
        if (instruction.partition_id, instruction.server_round) != (1, 4) or instruction.action != "train":
            return report
        kept = {key: value for key, value in report.metrics.items() if key != "round_steps"}
        return replace(report, metrics={**kept, **metrics})

    rows = adasplit(tmp_path, vague, adasplit__segments=1)
    (row,) = select(rows, "arrival", status="rejected")
    assert (row["partition_id"], row["server_round"]) == (1, 4)
    assert reason in row["reason"]
    assert select(rows, "end")[0]["status"] == "completed"


def test_frozen_uploads_in_pieces_bear_unequal_clients_and_one_that_dies(tmp_path):
    """Two batches an upload; who has no more is not asked for more, and a checkpoint waits for the replay."""

    def dies(instruction: Instruction) -> Report:
        if (instruction.partition_id, instruction.server_round) == (2, 4) and instruction.action == "train":
            raise RuntimeError("the battery is empty")
        return handle(instruction)

    settings = {"adasplit__exchange": "frozen", "adasplit__max_upload_bytes": 17 * 4 * 200 * 2}
    rows = adasplit(tmp_path, dies, **settings, data__partition="quantity:1")
    assert {(row["partition_id"], row["server_round"]) for row in select(rows, "arrival", status="failed")} == {(2, 4)}
    assert not select(rows, "arrival", status="rejected")
    assert len({client["num_examples"] for client in rows[1]["clients"]}) == 3
    assert select(rows, "end")[0]["status"] == "completed"


def test_the_servers_half_is_clipped_too(tmp_path):
    """With plain SGD and clipping no step moves the server's half by more than the rate times the norm."""
    plain = {"train__optimizer": "sgd", "train__momentum": 0.0, "train__weight_decay": 0.0, "train__learning_rate": 0.1}
    rows = adasplit(
        tmp_path, **plain, train__schedule="constant", train__max_grad_norm=1e-3, adasplit__mask__kind="none"
    )
    first, last = (load_checkpoint(tmp_path / "checkpoints" / f"round-00000{n}.pt")[0].state for n in (1, 5))
    moved = sum(float((last[key] - first[key]).square().sum()) for key in last if key.startswith("heads")) ** 0.5
    num_steps = sum(-(-client["num_examples"] // 16) for client in rows[1]["clients"]) * 2
    assert 0 < moved <= num_steps * 0.1 * 1e-3 * 1.01


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"adasplit__kappa": -0.1}, r"kappa: got -0.1, expected in \[0, 1\)"),
        ({"adasplit__kappa": 1.0}, "the server learns nothing"),
        ({"adasplit__eta": 0.0}, r"eta: got 0.0, expected in \(0, 1\]"),
        ({"adasplit__eta": 1.2}, r"eta: got 1.2, expected in \(0, 1\]"),
        ({"adasplit__cut": "0"}, "expected 1 to 2"),
        ({"adasplit__cut": "3"}, "expected 1 to 2"),
        ({"adasplit__cut": "heads.0"}, "nothing is left for the server"),
        ({"adasplit__client_sync": "handoff"}, "exchange: got 'segment', expected 'exact' with this client-sync"),
        ({"adasplit__server_gradient": True}, "expected 'exact' with this server-gradient"),
        ({"adasplit__max_upload_bytes": 1000}, "one batch takes up to 13600; raise it"),
        ({"adasplit__mask__kind": "fuzzy"}, "kind: got 'fuzzy'"),
        ({"loop__quorum": 2}, "loop.quorum.*rounds wait for everybody"),
        ({"compression__kind": "dgc"}, "compression.kind: not with strategy 'adasplit'"),
        ({"evaluation__own_statistics": True}, "own-statistics=true.*statistics of the client's own images already"),
        ({"model__name": "resnet8", "model__exits": True}, "exits=False"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(settings, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        adasplit(tmp_path, **settings)


@pytest.mark.parametrize(("kappa", "warns"), [(0.0, False), (0.3, True), (0.5, False)])
def test_a_share_of_less_than_a_round_says_that_there_is_no_local_phase(kappa, warns, tmp_path):
    rows = adasplit(tmp_path, adasplit__kappa=kappa, num_rounds=2)
    messages = [row["message"] for row in select(rows, "warning")]
    assert len(messages) == warns
    assert all("no local phase; set it to 0.5 or more" in message for message in messages)
    num_global = 2 if kappa < 0.5 else 1
    assert {row["server_round"] for row in select(rows, "arrival") if row["upload_bytes"]} == {
        *range(3 - num_global, 3)
    }
    assert len(select(rows, "merge")) == 2


def test_settings_that_do_nothing_beside_others_are_named_and_others_are_not(tmp_path):
    idle = {"adasplit__exchange": "frozen", "adasplit__segments": 7, "adasplit__mask__hard_penalty": 1e-3}
    rows = adasplit(tmp_path, **idle, adasplit__mask__penalty=1e-3, num_rounds=1, adasplit__kappa=0.0)
    assert [row["message"] for row in select(rows, "warning")] == [
        "adasplit.segments=7 with adasplit.exchange=frozen: has no effect",
        "adasplit.mask.hard-penalty=0.001 with adasplit.mask.kind=soft: has no effect",
    ]


def test_a_resumed_run_may_not_move_the_end_of_the_local_phase(tmp_path):
    adasplit(tmp_path / "first", num_rounds=4)
    with pytest.raises(ConfigError, match="the local phase would have 6 rounds, it had 2"):
        adasplit(tmp_path / "second", num_rounds=10, resume=str(tmp_path / "first"))


def test_a_diverging_server_ends_the_run_with_the_remedy(tmp_path, monkeypatch):
    from strategies.split.server import ServerDivergedError

    monkeypatch.setattr("strategies.answers.MAX_ENTRY", 3.4e38)  # no answer this large gets so far otherwise

    def wild(instruction: Instruction) -> Report:
        report = handle(instruction)
        big = {k: t * (3e38 / t.max()) if k == "values" else t for k, t in report.companions.items()}
        report.companions.update(big)  # type: ignore[attr-defined]
        return report

    with pytest.raises(ServerDivergedError, match=r"lower train\.learning-rate"):
        adasplit(tmp_path, wild, adasplit__mask__kind="none")
