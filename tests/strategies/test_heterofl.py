"""HeteroFL: levels by capability, in a cycle, drawn anew; label masks narrow the merge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from client_app.data import client_examples, load_images
from client_app.handler import handle
from client_app.model import build_model
from pruning.extract import embed, extract
from strategies.heterofl import HeteroFLConfig
from strategies.labels import with_present_classes
from tests.runs import final_state, select, tiny_run
from wire.flat import ConfigError
from wire.message import DataConfig, Instruction, Report
from zoo import get_model

LEVELS: dict[str, Any] = {"strategy": "heterofl", "heterofl.rates": "1,0.5,0.25", "num-clients": 6, "num-rounds": 1}


def levels_of(strategy: str) -> dict[str, Any]:
    """The same levels for a method that has them under its own name."""
    own = {key.replace("heterofl", strategy): value for key, value in LEVELS.items()}
    return own | {"strategy": strategy}


def widths_by_client(rows: list[dict[str, Any]], server_round: int = 1) -> list[int]:
    """Width of the first hidden layer of each client."""
    return [
        row["widths"]["hidden0"]
        for row in sorted(select(rows, "arrival", server_round=server_round), key=lambda row: row["partition_id"])
    ]


def test_faster_devices_get_wider_levels_in_equal_parts(tmp_path):
    rows = tiny_run(tmp_path / "run", **LEVELS)
    flops = [client["train_flops"] for client in rows[1]["clients"]]
    widths = widths_by_client(rows)
    assert sorted(widths) == [50, 50, 100, 100, 200, 200]
    assert [widths[pid] for pid in np.argsort([-f for f in flops], kind="stable")] == sorted(widths, reverse=True)


@pytest.mark.parametrize("fleet", ["linear:5", "none"])
def test_a_cycle_gives_client_i_level_i_modulo_levels_and_so_does_a_fleet_nobody_knows(fleet, tmp_path):
    assignment = "cycle" if fleet != "none" else "capability"
    rows = tiny_run(tmp_path / "run", **{**LEVELS, "heterofl.assignment": assignment, "fleet.name": fleet})
    assert widths_by_client(rows) == [200, 100, 50, 200, 100, 50]


def test_dynamic_levels_are_drawn_anew_each_round(tmp_path):
    rows = tiny_run(tmp_path / "run", **{**LEVELS, "heterofl.assignment": "dynamic", "num-rounds": 5})
    drawn = [tuple(widths_by_client(rows, server_round)) for server_round in range(1, 6)]
    assert len(set(drawn)) > 2
    assert {width for widths in drawn for width in widths} == {200, 100, 50}


def test_the_order_of_rates_does_not_matter(tmp_path):
    first = tiny_run(tmp_path / "a", **LEVELS)
    second = tiny_run(tmp_path / "b", **{**LEVELS, "heterofl.rates": "0.25,1,0.5"})
    assert widths_by_client(first) == widths_by_client(second)


@pytest.mark.parametrize("rates", ["", "1,", "0", "1.5", "half", "1;0.5", "nan"])
def test_rates_that_are_none_are_refused(rates):
    with pytest.raises(ConfigError, match="rates: got"):
        HeteroFLConfig(rates=rates)


def test_every_level_below_one_is_in_the_family(tmp_path):
    rows = tiny_run(tmp_path / "run", **LEVELS)
    assert [member["name"] for member in select(rows, "evaluation")[-1]["family"]] == ["0.5", "0.25", "base"]


@pytest.mark.parametrize("strategy", ["heterofl", "fedrolex"])
def test_a_merge_is_the_mean_over_those_who_hold_an_entry_and_have_its_class(strategy, tmp_path):
    """Equations 1 to 3 with label masks, entry by entry in float64, on clients that have two or three classes each."""
    replies: list[tuple[Instruction, Report]] = []

    def spy(instruction: Instruction) -> Report:
        report = handle(instruction)
        if instruction.action == "train":
            replies.append((instruction, report))
        return report

    rows = tiny_run(tmp_path / "run", spy, **levels_of(strategy), data__partition="pathological:2")
    _, layout = get_model("mlp", 10, 1, 8)
    torch.manual_seed(0)
    before = get_model("mlp", 10, 1, 8)[0].state_dict()
    total = {key: torch.zeros(tensor.shape, dtype=torch.float64) for key, tensor in before.items()}
    weight = {key: torch.zeros(tensor.shape, dtype=torch.float64) for key, tensor in before.items()}
    for instruction, report in replies:
        state, held = embed(report.state, layout, instruction.spec, before)
        missing = torch.tensor(report.label_counts) == 0
        assert missing.any()
        assert torch.equal(
            missing,
            ~torch.isin(
                torch.arange(10),
                client_examples(DataConfig(max_train=400, partition="pathological:2"), 6, instruction.partition_id)[
                    0
                ].y.unique(),
            ),
        )
        for key in ("heads.0.weight", "heads.0.bias"):
            held[key][missing] = False
        for key in total:
            total[key] += report.num_examples * held[key] * state[key].double()
            weight[key] += report.num_examples * held[key]
    for key, tensor in final_state(tmp_path / "run").items():
        expected = torch.where(weight[key] > 0, total[key] / weight[key].clamp(min=1e-9), before[key].double())
        assert torch.allclose(tensor.double(), expected, atol=1e-6), key
    assert select(rows, "merge")[0]["n_star"] < 6


@pytest.mark.parametrize("strategy", ["heterofl", "fedrolex"])
def test_a_merge_by_labels_of_a_model_without_classes_is_refused_with_the_remedy(strategy, tmp_path, monkeypatch):
    def without_classes(*arguments: Any):
        model, layout = build_model(*arguments)
        return model, layout.without(["classes"])

    monkeypatch.setattr("server_app.run.build_model", without_classes)
    with pytest.raises(ConfigError, match=rf"no group 'classes'.*set {strategy}\.mask-missing-labels=false"):
        tiny_run(tmp_path / "run", **levels_of(strategy))
    assert not (tmp_path / "run" / "checkpoints").exists()
    rows = tiny_run(tmp_path / "unmasked", **levels_of(strategy), **{f"{strategy}.mask-missing-labels": False})
    assert select(rows, "merge")


def test_narrowing_keeps_to_the_spec_that_was_sent():
    _, layout = get_model("mlp", 10, 1, 8)
    spec = select_half(layout)
    narrowed = with_present_classes(spec, Report(0, 0, {}, 5, (3, 0, 0, 2, 0, 0, 0, 0, 0, 0)))
    assert narrowed is not None
    assert narrowed.is_subset_of(spec, layout)
    assert narrowed.units["classes"] == (0, 3)
    assert {k: v for k, v in narrowed.units.items() if k != "classes"} == spec.units
    assert with_present_classes(spec, Report(0, 0, {}, 5)) is None


def select_half(layout):
    from pruning.select import select_prefix

    return select_prefix(layout, {group.name: group.size // 2 for group in layout.prunable})


def test_static_prefixes_hold_the_upper_left_corner():
    model, layout = get_model("mlp", 10, 1, 8)
    state = extract(model.state_dict(), layout, select_half(layout))
    assert torch.equal(state["blocks.1.linear.weight"], model.state_dict()["blocks.1.linear.weight"][:100, :100])
    assert load_images(DataConfig()).num_classes == 10
