"""FedMP: what agents are told, what clients get, and residuals in the merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from client_app.handler import handle
from pruning.bandit import BanditParams, reward
from pruning.extract import embed
from pruning.importance import score_units
from server_app.checkpoint import load_checkpoint
from tests.runs import final_state, select, tiny_run
from wire.flat import ConfigError
from wire.message import Instruction, Report
from zoo import get_model


def own_state(folder: Path, server_round: int) -> dict[str, Any]:
    return load_checkpoint(folder / "checkpoints" / f"round-{server_round:06d}.pt")[1]


def test_a_merge_completes_every_sub_model_by_its_residual(tmp_path):
    replies: list[tuple[Instruction, Report]] = []

    def spy(instruction: Instruction) -> Report:
        report = handle(instruction)
        replies.append((instruction, report))
        return report

    tiny_run(tmp_path, spy, strategy="fedmp", num_rounds=2, data__partition="dirichlet:0.5", data__min_size=20)
    _, layout = get_model("mlp", 10, 1, 8)
    before = load_checkpoint(tmp_path / "checkpoints" / "round-000001.pt")[0].state
    last = [(i, r) for i, r in replies if i.server_round == 2]
    total = sum(report.num_examples for _, report in last)
    assert len({instruction.spec for instruction, _ in last}) == 4
    for key, tensor in final_state(tmp_path).items():
        completed = [embed(r.state, layout, i.spec, before)[0][key].double() * r.num_examples for i, r in last]
        torch.testing.assert_close(tensor.double(), sum(completed) / total, atol=1e-6, rtol=1e-5)


def test_every_round_prunes_the_model_as_it_is_by_its_l1_norms(tmp_path):
    asked: dict[int, list[Instruction]] = {1: [], 2: [], 3: []}

    def spy(instruction: Instruction) -> Report:
        asked[instruction.server_round].append(instruction)
        return handle(instruction)

    tiny_run(tmp_path, spy, strategy="fedmp", num_rounds=3, train__learning_rate=0.2)
    _, layout = get_model("mlp", 10, 1, 8)
    for server_round in (2, 3):
        state = load_checkpoint(tmp_path / "checkpoints" / f"round-{server_round - 1:06d}.pt")[0].state
        scores = score_units(state, layout, "l1")
        rates = own_state(tmp_path, server_round)["asked"]
        for instruction in asked[server_round]:
            for name, units in instruction.spec.units.items():
                kept = -(-200 * (1 - rates[str(instruction.partition_id)]) // 1)
                assert len(units) == pytest.approx(kept, abs=1)
                worst = min(scores[name][list(units)])
                assert all(score <= worst for unit, score in enumerate(scores[name]) if unit not in units)


def test_agents_learn_the_reward_of_the_rate_that_was_tried(tmp_path):
    rows = tiny_run(tmp_path, strategy="fedmp", num_rounds=3)
    arrivals = {(r["server_round"], r["partition_id"]): r for r in select(rows, "arrival")}
    assert all(not trials for _, trials in own_state(tmp_path, 1)["agents"].values()), "a first loss fell from nowhere"
    agents = own_state(tmp_path, 3)["agents"]
    for pid in range(4):
        expected = []
        for server_round in (2, 3):
            decrease = arrivals[server_round - 1, pid]["loss"] - arrivals[server_round, pid]["loss"]
            mean_s = sum(arrivals[server_round, p]["update_time_s"] for p in range(4)) / 4
            time_s = arrivals[server_round, pid]["update_time_s"]
            rate = own_state(tmp_path, server_round)["asked"][str(pid)]
            expected.append((rate, reward(decrease, time_s, mean_s, BanditParams())))
        assert [tuple(trial) for trial in agents[str(pid)][1]] == [pytest.approx(pair) for pair in expected]


def test_a_client_that_fails_teaches_nothing_and_goes_on(tmp_path):
    def flaky(instruction: Instruction) -> Report:
        if (instruction.server_round, instruction.partition_id) == (2, 1):
            raise RuntimeError("gone")
        return handle(instruction)

    rows = tiny_run(tmp_path, flaky, strategy="fedmp", num_rounds=3)
    assert [row["num_merged"] for row in select(rows, "merge")] == [4, 3, 4]
    agents = own_state(tmp_path, 3)["agents"]
    assert {pid: len(trials) for pid, (_, trials) in agents.items()} == {"0": 2, "1": 1, "2": 2, "3": 2}


def test_an_answer_that_misses_the_deadline_is_a_trial_too(tmp_path):
    whole = tiny_run(tmp_path / "whole", strategy="fedmp", num_rounds=1)
    deadline_s = 1.01 * min(row["update_time_s"] for row in select(whole, "arrival"))
    rows = tiny_run(tmp_path / "run", strategy="fedmp", num_rounds=6, loop__deadline_s=deadline_s)
    late = {row["partition_id"] for row in select(rows, "arrival", status="late")}
    assert late
    agents = own_state(tmp_path / "run", 6)["agents"]
    num_answers = {pid: len(select(rows, "arrival", partition_id=pid)) for pid in late}
    assert max(num_answers.values()) > 2
    for pid, number in num_answers.items():
        assert len(agents[str(pid)][1] if number > 1 else []) == number - 1, "a first loss fell from nowhere"


def test_an_agent_that_is_asked_again_before_the_merge_learns_of_the_rate_it_had_tried(tmp_path):
    asked: dict[int, tuple[int, float]] = {}

    def spy(instruction: Instruction) -> Report:
        widths = len(instruction.spec.units["hidden0"])
        asked[instruction.dispatch] = instruction.partition_id, 1 - widths / 200
        return handle(instruction)

    loop: dict[str, Any] = {"loop.ask": "on-arrival", "loop.quorum": 4, "loop.max-staleness": -1}
    rows = tiny_run(tmp_path, spy, strategy="fedmp", num_rounds=6, **loop)
    per_round = [[r["partition_id"] for r in select(rows, "arrival", server_round=n)] for n in range(1, 7)]
    assert any(len(set(pids)) < len(pids) for pids in per_round), "nobody answered twice: the test shows nothing"
    for pid, (_, trials) in own_state(tmp_path, 6)["agents"].items():
        tried = [rate for client, rate in asked.values() if client == int(pid)]
        learned = [rate for rate, _ in trials]
        assert learned == pytest.approx(tried[1 : 1 + len(learned)], abs=1 / 200)


def test_rates_stay_below_the_largest(tmp_path):
    rows = tiny_run(tmp_path, strategy="fedmp", num_rounds=4, fedmp__bandit__max_pruning_rate=0.3)
    assert {row["widths"]["hidden0"] >= 140 for row in select(rows, "arrival")} == {True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fedmp.bandit.max-pruning-rate": 1.0}, r"fedmp\.bandit\.max-pruning-rate: got 1\.0"),
        ({"fedmp.importance": "l3"}, r"fedmp\.importance: got 'l3'"),
    ],
)
def test_settings_that_are_none_are_refused(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, strategy="fedmp", **settings)
