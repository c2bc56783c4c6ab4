"""DepthFL: depths by exits, joint training of exits at full depth, the merge by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from client_app.handler import handle
from strategies import FedAvg
from strategies.schedule import gaussian_ramp_up
from strategies.setting import Order
from tests.marks import slow_but
from tests.runs import equal_states, final_state, select, tiny_run
from wire.flat import ConfigError
from wire.message import Instruction, Report

CNN: dict[str, Any] = {
    "strategy": "depthfl",
    "model.name": "cnn",
    "model.width": 0.25,
    "num-clients": 3,
    "num-rounds": 1,
    "data.max-train": 120,
    "depthfl.assignment": "cycle",
}


def test_a_client_trains_all_exits_up_to_its_own_and_a_merge_is_the_mean_over_holders(tmp_path):
    """Three clients with three, two and one exits; every entry by hand."""
    replies: dict[int, Report] = {}
    asked: dict[int, Instruction] = {}

    def spy(instruction: Instruction) -> Report:
        asked[instruction.partition_id] = instruction
        replies[instruction.partition_id] = handle(instruction)
        return replies[instruction.partition_id]

    tiny_run(tmp_path / "run", spy, **CNN)
    assert [asked[pid].spec.depth for pid in range(3)] == [None, 2, 1]
    merged = final_state(tmp_path / "run")
    n = [replies[pid].num_examples for pid in range(3)]
    for key, tensor in merged.items():
        if not tensor.is_floating_point():
            continue
        holders = [pid for pid in range(3) if key in replies[pid].state]
        block = int(key.split(".")[1])
        assert holders == list(range(3 - block)), key
        expected = sum(n[pid] * replies[pid].state[key].double() for pid in holders) / sum(n[pid] for pid in holders)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("model", slow_but(("mlp",), ("mlp", "cnn")))
def test_everybody_at_full_depth_without_distillation_is_joint_training_of_the_exits(model, tmp_path, monkeypatch):
    settings = {
        "model.name": model,
        "model.width": 0.25,
        "model.exits": True,
        "num-clients": 3,
        "num-rounds": 2,
        "data.max-train": 120,
    }
    deepest = "3" if model == "cnn" else "2"
    plain = {"depthfl.exits": deepest, "depthfl.distillation-weight": 0.0, "depthfl.predict": "deepest"}
    rows = tiny_run(tmp_path / "depthfl", strategy="depthfl", **settings, **plain)

    def plan(self: FedAvg, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        return {pid: Order(objective="exits") for pid in clients}

    monkeypatch.setattr(FedAvg, "plan", plan)
    joint = tiny_run(tmp_path / "joint", strategy="fedavg", **settings)
    assert equal_states(final_state(tmp_path / "depthfl"), final_state(tmp_path / "joint"))
    accuracies = [[row["accuracy"] for row in select(log, "evaluation")] for log in (rows, joint)]
    assert accuracies[0] == accuracies[1]
    monkeypatch.undo()
    tiny_run(tmp_path / "deepest-only", strategy="fedavg", **settings)
    assert not equal_states(final_state(tmp_path / "depthfl"), final_state(tmp_path / "deepest-only"))


def test_the_weight_of_distillation_ramps_up_over_the_first_rounds(tmp_path):
    weights: dict[int, float] = {}

    def spy(instruction: Instruction) -> Report:
        weights[instruction.server_round] = float(instruction.settings["distillation-weight"])
        return handle(instruction)

    ramp = {"depthfl.ramp-up-rounds": 2, "depthfl.distillation-weight": 0.5}
    tiny_run(tmp_path / "run", spy, **{**CNN, **ramp, "num-rounds": 4})
    assert weights == {1: 0.5 * gaussian_ramp_up(1, 2), 2: 0.5 * gaussian_ramp_up(2, 2), 3: 0.5, 4: 0.5}


def test_the_ramp_is_gaussian_and_ends_at_one():
    assert gaussian_ramp_up(1, 300) == pytest.approx(0.006737947)
    assert gaussian_ramp_up(151, 300) == pytest.approx(0.2865048)
    assert gaussian_ramp_up(301, 300) == gaussian_ramp_up(999, 300) == 1.0
    assert gaussian_ramp_up(1, 0) == 1.0


def test_every_exit_is_in_the_family_and_tested_and_the_ensemble_is_what_counts(tmp_path):
    rows = tiny_run(tmp_path / "run", **CNN)
    row = select(rows, "evaluation")[-1]
    members = {member["name"]: member for member in row["family"]}
    assert list(members) == ["exit 2", "exit 1", "base"]
    assert len(row["exits"]) == 3
    assert members["exit 1"]["accuracy"] == pytest.approx(row["exits"][0])
    deepest = tiny_run(tmp_path / "deepest", **{**CNN, "depthfl.predict": "deepest"})
    other = select(deepest, "evaluation")[-1]
    assert other["exits"] == row["exits"]
    assert other["accuracy"] == pytest.approx(row["exits"][-1])


def test_exits_that_nobody_trains_stand_for_nothing(tmp_path):
    row = select(tiny_run(tmp_path / "run", **{**CNN, "depthfl.exits": "2,1"}), "evaluation")[-1]
    assert row["depth"] == 2
    assert len(row["exits"]) == 2
    assert [member["name"] for member in row["family"]] == ["exit 1", "base"]


def test_clients_test_their_own_depth_with_what_they_predict_with(tmp_path):
    asked = []

    def spy(instruction: Instruction) -> Report:
        if instruction.action == "evaluate":
            asked.append((instruction.spec.depth, instruction.settings["predict"]))
        return handle(instruction)

    rows = tiny_run(tmp_path / "run", spy, **{**CNN, "evaluation.where": "federated"})
    assert asked == [(None, "ensemble"), (2, "ensemble"), (1, "ensemble")] * 2
    assert select(rows, "evaluation", where="federated")


@pytest.mark.parametrize("exits", ["3,1", "1, 3"])
def test_levels_may_be_chosen(exits, tmp_path):
    rows = tiny_run(tmp_path / "run", **{**CNN, "depthfl.exits": exits})
    depths = {row["partition_id"]: row["depth"] for row in select(rows, "arrival")}
    assert depths == {0: None, 1: 1, 2: None}


def test_a_model_without_exits_is_refused_at_start_with_the_remedy(tmp_path):
    for model, found in (("cnn", 1), ("vit_tiny", 0)):
        with pytest.raises(
            ConfigError, match=rf"strategy=depthfl with model\.name={model}: .* {found} exits.*exits=true"
        ):
            tiny_run(tmp_path / model, **{**CNN, "model.name": model, "model.exits": False, "model.width": 1.0})
        assert not (tmp_path / model / "checkpoints").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("exits", "4", r"depthfl\.exits=4: 'cnn' has 3 exits; ask for at most as many"),
        ("exits", "0", r"depthfl\.exits: got '0'"),
        ("exits", "", r"depthfl\.exits: got ''"),
        ("exits", "deep", r"depthfl\.exits: got 'deep'"),
        ("predict", "ensamble", "did you mean 'ensemble'"),
        ("assignment", "cicle", "did you mean 'cycle'"),
        ("temperature", 0.0, "temperature: got"),
        ("distillation-weight", -1.0, "distillation-weight: got"),
        ("ramp-up-rounds", -1, "ramp-up-rounds: got"),
    ],
)
def test_bad_settings_are_refused(key, value, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path / "run", **{**CNN, f"depthfl.{key}": value})


def test_a_shallow_client_trains_and_sends_less(tmp_path):
    rows = tiny_run(tmp_path / "run", **CNN)
    by_client = {row["partition_id"]: row for row in select(rows, "arrival")}
    for key in ("train_macs", "upload_bytes", "download_bytes", "peak_memory_bytes"):
        values = [by_client[pid][key] for pid in range(3)]
        assert values == sorted(values, reverse=True)
        assert len(set(values)) == 3
    held = [sum(width > 0 for width in by_client[pid]["widths"].values()) for pid in range(3)]
    assert held[2] < held[1] < held[0] == len(by_client[0]["widths"]), "a block that a client does not hold has width 0"
