"""FjORD: widths up to the client's own; one width makes it FedAvg; the merge by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from client_app.handler import handle
from pruning.extract import extract
from pruning.select import select_prefix
from pruning.spec import SubModelSpec
from tests.runs import equal_states, final_state, select, tiny_run
from wire.flat import ConfigError
from wire.message import Instruction, Report
from wire.spec import spec_from_json
from zoo import get_model

THREE: dict[str, Any] = {
    "strategy": "fjord",
    "fjord.rates": "1,0.5,0.25",
    "fjord.assignment": "cycle",
    "num-clients": 3,
    "num-rounds": 1,
    "data.max-train": 120,
}


@pytest.mark.slow
@pytest.mark.parametrize("distils", [True, False])
def test_one_width_makes_it_fedavg_bit_for_bit(distils, tmp_path):
    settings = {"model.name": "resnet8", "model.width": 0.25, "num-rounds": 2, "data.max-train": 100}
    one = {"fjord.rates": "1", "fjord.self-distillation": distils}
    rows = tiny_run(tmp_path / "fjord", strategy="fjord", **settings, **one)
    plain = tiny_run(tmp_path / "fedavg", strategy="fedavg", **settings)
    assert equal_states(final_state(tmp_path / "fjord"), final_state(tmp_path / "fedavg"))
    times = [[row["update_time_s"] for row in select(log, "arrival")] for log in (rows, plain)]
    assert times[0] == times[1]


def test_a_client_is_asked_to_train_every_width_up_to_its_own(tmp_path):
    asked: dict[int, Instruction] = {}

    def spy(instruction: Instruction) -> Report:
        if instruction.action == "train":
            asked[instruction.partition_id] = instruction
        return handle(instruction)

    tiny_run(tmp_path / "run", spy, **THREE)
    for pid, widths in ((0, [200, 100, 50]), (1, [100, 50]), (2, [50])):
        layout = get_model("mlp", 10, 1, 8)[1]
        levels = [spec_from_json(item) for item in json.loads(str(asked[pid].settings["levels"]))]
        assert [spec.width(layout, "hidden0") for spec in levels if spec] == widths
        assert levels[0] == asked[pid].spec
        assert [units.units.get("hidden0", tuple(range(200))) for units in levels if units] == [
            tuple(range(width)) for width in widths
        ]


def test_the_units_between_two_widths_are_averaged_over_those_who_hold_them(tmp_path):
    """Equation 1 by hand: 50, 100 and 200 units; the first quarter has three teachers, the last half has one."""
    replies: dict[int, Report] = {}

    def spy(instruction: Instruction) -> Report:
        replies[instruction.partition_id] = handle(instruction)
        return replies[instruction.partition_id]

    tiny_run(tmp_path / "run", spy, **THREE)
    merged = final_state(tmp_path / "run")
    key = "blocks.1.linear.weight"
    one, two, three = (replies[pid].state[key].double() for pid in range(3))
    n = [replies[pid].num_examples for pid in range(3)]
    expected = one.clone()
    expected[:100, :100] = (n[0] * one[:100, :100] + n[1] * two) / (n[0] + n[1])
    expected[:50, :50] = (n[0] * one[:50, :50] + n[1] * two[:50, :50] + n[2] * three) / sum(n)
    torch.testing.assert_close(merged[key].double(), expected, rtol=1e-5, atol=1e-7)


def test_every_width_below_one_is_in_the_family(tmp_path):
    rows = tiny_run(tmp_path / "run", **THREE)
    assert [member["name"] for member in select(rows, "evaluation")[-1]["family"]] == ["0.5", "0.25", "base"]


def test_self_distillation_costs_more_time_and_is_counted(tmp_path):
    macs = {}
    for distils in (True, False):
        rows = tiny_run(tmp_path / str(distils), **{**THREE, "fjord.self-distillation": distils})
        macs[distils] = {row["partition_id"]: row["train_macs"] for row in select(rows, "arrival")}
    assert macs[True][0] > 1.3 * macs[False][0]
    assert macs[True][2] == macs[False][2], "who has one width has nobody to teach"


def test_narrow_widths_are_networks_of_their_own(tmp_path):
    """What ordered dropout is for: a client can cut its width without training, and keeps most of the accuracy."""
    settings = {"fjord.rates": "1,0.25", "num-rounds": 10, "train.learning-rate": 0.1, "fjord.assignment": "capability"}
    rows = tiny_run(tmp_path / "run", strategy="fjord", **settings)
    narrow, base = select(rows, "evaluation")[-1]["family"]
    assert base["accuracy"] > 0.8
    assert narrow["accuracy"] > base["accuracy"] - 0.1
    layout = get_model("mlp", 10, 1, 8)[1]
    assert extract(final_state(tmp_path / "run"), layout, spec_of(50))["heads.0.weight"].shape == (10, 50)


def spec_of(width: int) -> SubModelSpec:
    return select_prefix(get_model("mlp", 10, 1, 8)[1], {"hidden0": width, "hidden1": width})


@pytest.mark.parametrize(
    ("key", "value"),
    [("distillation-weight", 1.5), ("temperature", 0.0), ("rates", "0"), ("assignment", "speed")],
)
def test_bad_settings_are_refused(key, value, tmp_path):
    with pytest.raises(ConfigError, match=rf"fjord\.{key}: got"):
        tiny_run(tmp_path / "run", strategy="fjord", **{f"fjord.{key}": value})
