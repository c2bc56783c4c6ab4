"""FIARSE: the top units by magnitude of the present model, against an oracle of its own; sizes; the merge by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from client_app.handler import handle
from pruning.cost import measure_costs
from pruning.extract import embed
from pruning.groups import Layout
from pruning.spec import SubModelSpec
from strategies.fiarse import FIARSE, FIARSEConfig
from tests.runs import final_state, select, tiny_run
from wire.flat import ConfigError
from wire.message import Instruction, Report
from zoo import get_model

THREE: dict[str, Any] = {
    "strategy": "fiarse",
    "fiarse.sizes": "1,0.5,0.25",
    "fiarse.assignment": "cycle",
    "num-clients": 3,
    "data.max-train": 120,
}


def magnitude(state: dict[str, torch.Tensor], layout: Layout, name: str, unit: int, norm: str) -> float:
    """Norm of everything that one unit owns in the state dict, entry by entry."""
    owned: list[float] = []
    for axis in layout.by_name[name].axes:
        if axis.key.endswith(("weight", "bias")):
            positions = range(axis.offset + unit * axis.repeat, axis.offset + (unit + 1) * axis.repeat)
            for position in positions:
                owned += state[axis.key].select(axis.dim, position).flatten().tolist()
    return sum(abs(v) for v in owned) if norm == "l1" else sum(v * v for v in owned) ** 0.5


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_every_request_holds_the_units_of_largest_magnitude_in_the_model_of_that_round(model, norm, tmp_path):
    asked: dict[int, Instruction] = {}
    full: dict[int, dict[str, torch.Tensor]] = {}

    def spy(instruction: Instruction) -> Report:
        if instruction.partition_id == 0:
            full[instruction.server_round] = dict(instruction.state)
        if instruction.partition_id == 1:
            asked[instruction.server_round] = instruction
        return handle(instruction)

    settings = {**THREE, "model.name": model, "model.width": 0.25, "fiarse.importance": norm, "num-rounds": 3}
    tiny_run(tmp_path / "run", spy, **settings)
    _, layout = get_model(model, 10, 1, 8, width=0.25)
    for server_round, instruction in asked.items():
        for group in layout.prunable:
            kept = instruction.spec.units[group.name]
            scores = [magnitude(full[server_round], layout, group.name, unit, norm) for unit in range(group.size)]
            worst = min(scores[unit] for unit in kept)
            best = max(scores[unit] for unit in range(group.size) if unit not in kept)
            assert worst >= best * (1 - 1e-5), (server_round, group.name)
    chosen = [instruction.spec for instruction in asked.values()]
    assert len(set(chosen)) > 1, "the same units in every round: the test shows nothing"


@pytest.mark.parametrize("scope", ["per-layer", "global"])
def test_sizes_are_shares_of_the_prunable_parameters(scope, tmp_path):
    asked: dict[int, SubModelSpec] = {}

    def spy(instruction: Instruction) -> Report:
        asked[instruction.partition_id] = instruction.spec
        return handle(instruction)

    tiny_run(tmp_path / "run", spy, **{**THREE, "fiarse.scope": scope, "num-rounds": 1})
    model, layout = get_model("mlp", 10, 1, 8)
    cost = measure_costs(model, layout, torch.zeros(2, 1, 8, 8))
    shares = [cost.retention_ratio(asked[pid]) for pid in range(3)]
    assert shares[0] == 1
    for share, size in zip(shares[1:], (0.5, 0.25), strict=True):
        assert 0.95 * size <= share <= size * (1 + 1e-9)
    assert all(set(asked[2].units[name]) <= set(asked[1].units[name]) for name in asked[1].units)


def test_one_ranking_keeps_more_of_layers_whose_units_stand_out():
    """Two layers: in the second, two units are far above the rest; a global ranking keeps them, and few others."""
    model, layout = get_model("mlp", 10, 1, 8, hidden=(8, 8))
    strategy = FIARSE.__new__(FIARSE)
    strategy.layout, strategy.cost = layout, measure_costs(model, layout, torch.zeros(2, 1, 8, 8))
    state = {key: torch.full_like(tensor, 0.1) for key, tensor in model.state_dict().items()}
    state["heads.0.weight"][:, [2, 5]] = 10.0
    strategy.config = FIARSEConfig(sizes="0.5", scope="global")
    (ranked,) = strategy._levels(state)
    strategy.config = FIARSEConfig(sizes="0.5", scope="per-layer")
    (equal,) = strategy._levels(state)
    assert {2, 5} <= set(ranked.units["hidden1"])
    assert len(ranked.units["hidden1"]) < len(equal.units["hidden1"])


def test_a_merge_is_the_mean_over_those_who_hold_an_entry(tmp_path):
    """Three clients with scattered units, entry by entry in float64."""
    replies: list[tuple[Instruction, Report]] = []

    def spy(instruction: Instruction) -> Report:
        report = handle(instruction)
        replies.append((instruction, report))
        return report

    tiny_run(tmp_path / "run", spy, **{**THREE, "fiarse.sizes": "0.5,0.25,0.1", "num-rounds": 1})
    _, layout = get_model("mlp", 10, 1, 8)
    torch.manual_seed(0)
    before = get_model("mlp", 10, 1, 8)[0].state_dict()
    held = [embed(report.state, layout, instruction.spec, before) for instruction, report in replies]
    sizes = [report.num_examples for _, report in replies]
    for key, tensor in final_state(tmp_path / "run").items():
        total = sum(n * m[key] * s[key].double() for n, (s, m) in zip(sizes, held, strict=True))
        weight = sum(n * m[key].double() for n, (_, m) in zip(sizes, held, strict=True))
        expected = torch.where(weight > 0, total / weight.clamp(min=1e-9), before[key].double())
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-5)


def test_every_size_below_the_full_one_is_in_the_family(tmp_path):
    rows = tiny_run(tmp_path / "run", **{**THREE, "num-rounds": 1})
    assert [member["name"] for member in select(rows, "evaluation")[-1]["family"]] == ["0.5", "0.25", "base"]


def test_a_client_is_tested_on_what_it_would_be_given_now(tmp_path):
    seen: dict[tuple[str, int, int], SubModelSpec] = {}

    def spy(instruction: Instruction) -> Report:
        seen[instruction.action, instruction.server_round, instruction.partition_id] = instruction.spec
        return handle(instruction)

    tiny_run(tmp_path / "run", spy, **{**THREE, "num-rounds": 3, "evaluation.where": "federated"})
    for server_round in (1, 2):
        for pid in range(3):
            assert seen["evaluate", server_round, pid] == seen["train", server_round + 1, pid]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sizes", "0", r"fiarse\.sizes: got '0'"),
        ("scope", "globl", "did you mean 'global'"),
        ("importance", "taylor", r"importance: got 'taylor'"),
        ("assignment", "x", "assignment: got"),
    ],
)
def test_bad_settings_are_refused(key, value, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path / "run", **{**THREE, f"fiarse.{key}": value})
