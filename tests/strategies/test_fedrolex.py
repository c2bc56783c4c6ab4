"""FedRolex: which units, round by round; what is covered over a cycle; the merge by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client_app.handler import handle
from pruning.extract import embed
from pruning.groups import Layout
from tests.runs import final_state, select, tiny_run
from wire.flat import ConfigError
from wire.message import Instruction, ModelConfig, Report
from zoo import get_model

HALVES: dict[str, Any] = {
    "fedrolex.rates": "0.5",
    "fedrolex.mask-missing-labels": False,
    "num-clients": 1,
    "data.max-train": 100,
    "evaluation.every": 1000,
}


class Echo:
    """A client that only adds one to whatever it holds: what has grown is what was held."""

    def __init__(self) -> None:
        self.specs: dict[int, dict[int, Any]] = {}

    def __call__(self, instruction: Instruction) -> Report:
        self.specs.setdefault(instruction.server_round, {})[instruction.partition_id] = instruction.spec
        state = {key: tensor + 1 for key, tensor in instruction.state.items()}
        return Report(instruction.dispatch, instruction.partition_id, state, 10, train_macs=1.0)


def small_model(config: ModelConfig, num_classes: int, shape: tuple[int, ...]) -> tuple[torch.nn.Module, Layout]:
    """The perceptron with 8 and 8 hidden neurons, whatever the run's model is."""
    return get_model(config.name, num_classes, shape[0], shape[1], hidden=(8, 8))


def held_counts(folder: Path, num_rounds: int, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, Any]:
    """How often every entry of a small perceptron (8 and 8 hidden neurons) was held and merged.

    What the event log says about coverage to date is held against it.
    """
    monkeypatch.setattr("server_app.run.build_model", small_model)
    torch.manual_seed(0)
    before = get_model("mlp", 10, 1, 8, hidden=(8, 8))[0].state_dict()
    rows = tiny_run(folder, Echo(), num_rounds=num_rounds, **settings)
    assert len(select(rows, "merge")) == num_rounds
    counts = {key: (tensor - before[key]).round() for key, tensor in final_state(folder).items()}
    last = select(rows, "merge")[-1]
    for key, count in counts.items():
        assert last["coverage_least"][key] == float(count.min()) / num_rounds
        assert last["coverage_most"][key] == float(count.max()) / num_rounds
    return counts


def test_over_a_cycle_every_unit_is_held_equally_often_and_heterofls_are_not(tmp_path, monkeypatch):
    """The paper's windows: eight rounds of half the units. In HeteroFL the same units are held every time."""
    counts = held_counts(tmp_path / "rolling", 8, monkeypatch, strategy="fedrolex", **HALVES)
    for key in ("blocks.0.linear.weight", "blocks.0.linear.bias", "blocks.1.linear.bias", "heads.0.weight"):
        assert (counts[key] == 4).all(), key
    square = counts["blocks.1.linear.weight"]
    assert (square.sum(0) == 16).all()
    assert (square.sum(1) == 16).all()
    assert (square.diagonal() == 4).all()
    assert square[0, 4] == 0, "entries far from the diagonal are not held by windows that move in step"
    for strategy, settings in (
        ("fedrolex", {**HALVES, "fedrolex.extraction": "static"}),
        ("heterofl", {**HALVES, "heterofl.rates": "0.5", "heterofl.mask-missing-labels": False}),
    ):
        counts = held_counts(tmp_path / f"{strategy}-prefix", 8, monkeypatch, strategy=strategy, **settings)
        assert (counts["blocks.0.linear.bias"] == torch.tensor([8.0] * 4 + [0.0] * 4)).all()


def test_over_a_cycle_of_staggered_windows_every_entry_is_held_equally_often(tmp_path, monkeypatch):
    settings = {**HALVES, "fedrolex.extraction": "staggered"}
    counts = held_counts(tmp_path / "run", 4, monkeypatch, strategy="fedrolex", **settings)
    for key in ("blocks.0.linear.weight", "blocks.0.linear.bias", "blocks.1.linear.bias", "heads.0.weight"):
        assert (counts[key] == 2).all(), key
    assert (counts["blocks.1.linear.weight"] == 1).all()


def test_what_adaptcls_slow_client_has_lost_it_never_holds_again(tmp_path, monkeypatch):
    """Two clients: what the slow one lost is held by one of them, what it kept by both, round after round."""
    monkeypatch.setattr("server_app.run.build_model", small_model)
    echo = Echo()
    settings = {"adaptcl.round-to": 1, "adaptcl.rates.regrow": False, "num-clients": 2, "evaluation.every": 1000}
    rows = tiny_run(tmp_path / "run", slow_by_model(echo), strategy="adaptcl", num_rounds=12, **settings)
    kept = [frozenset(specs[1].units.get("hidden0", range(8))) for _, specs in sorted(echo.specs.items())]
    assert len(kept[-1]) < 8, "the slow client was never pruned: the test shows nothing"
    assert all(later <= earlier for earlier, later in pairwise(kept))
    last = select(rows, "merge")[-1]
    assert last["coverage_least"]["blocks.0.linear.bias"] < 1, "the coverage report shows what one of them lacks"
    assert last["coverage_most"]["blocks.0.linear.bias"] == 1


def slow_by_model(echo: Echo) -> Callable[[Instruction], Report]:
    """Work in proportion to the size of the sub-model, so that update times tell devices apart."""

    def work(instruction: Instruction) -> Report:
        return replace(echo(instruction), train_macs=1e9 * sum(t.numel() for t in instruction.state.values()))

    return work


def test_all_clients_of_a_round_roll_together_and_hold_their_share(tmp_path):
    echo = Echo()
    settings = {"fedrolex.rates": "1,0.5,0.25", "fedrolex.assignment": "cycle", "num-clients": 3}
    tiny_run(tmp_path / "run", echo, strategy="fedrolex", num_rounds=3, **settings)
    for server_round, specs in echo.specs.items():
        start = server_round - 1
        assert specs[0].kept == ()
        assert specs[1].units["hidden0"] == tuple(range(start, start + 100))
        assert specs[2].units["hidden0"] == tuple(range(start, start + 50))


def test_random_units_differ_between_clients_and_rounds_and_have_the_width_asked_for(tmp_path):
    echo = Echo()
    settings = {"fedrolex.rates": "0.5", "fedrolex.extraction": "random", "num-clients": 3}
    rows = tiny_run(tmp_path / "run", echo, strategy="fedrolex", num_rounds=3, **settings)
    drawn = [spec.units["hidden0"] for specs in echo.specs.values() for spec in specs.values()]
    assert len(set(drawn)) == 9
    assert {len(units) for units in drawn} == {100}
    assert "family" not in select(rows, "evaluation")[-1]


def test_a_merge_is_the_mean_over_those_whose_window_holds_an_entry(tmp_path):
    """Three clients, entry by entry in float64, in a round whose windows wrap around nothing yet."""
    replies: list[tuple[Instruction, Report]] = []

    def spy(instruction: Instruction) -> Report:
        report = handle(instruction)
        replies.append((instruction, report))
        return report

    settings = {"fedrolex.rates": "0.5,0.25", "fedrolex.assignment": "cycle", "fedrolex.mask-missing-labels": False}
    tiny_run(tmp_path / "run", spy, strategy="fedrolex", num_rounds=1, num_clients=3, **settings)
    _, layout = get_model("mlp", 10, 1, 8)
    torch.manual_seed(0)
    before = get_model("mlp", 10, 1, 8)[0].state_dict()
    after = final_state(tmp_path / "run")
    held = [embed(report.state, layout, instruction.spec, before) for instruction, report in replies]
    sizes = [report.num_examples for _, report in replies]
    for key, tensor in after.items():
        total = sum(n * m[key] * s[key].double() for n, (s, m) in zip(sizes, held, strict=True))
        weight = sum(n * m[key].double() for n, (_, m) in zip(sizes, held, strict=True))
        expected = torch.where(weight > 0, total / weight.clamp(min=1e-9), before[key].double())
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-5)


def test_the_family_is_the_last_rounds_window_of_every_level_below_the_full_one(tmp_path):
    rows = tiny_run(tmp_path / "run", strategy="fedrolex", num_rounds=2, **{"fedrolex.rates": "1,0.5,0.25"})
    members = select(rows, "evaluation")[-1]["family"]
    assert [member["name"] for member in members] == ["0.5", "0.25", "base"]
    assert members[0]["accuracy"] > 0.2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("extraction", "roling", "did you mean 'rolling'"),
        ("rates", "2", "retention ratios"),
        ("assignment", "x", "got"),
    ],
)
def test_bad_settings_are_refused(key, value, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path / "run", strategy="fedrolex", **{f"fedrolex.{key}": value})


def test_a_client_is_tested_on_what_it_held_last(tmp_path):
    seen = []

    def spy(instruction: Instruction) -> Report:
        seen.append((instruction.action, instruction.server_round, instruction.partition_id, instruction.spec))
        return handle(instruction)

    settings = {"fedrolex.rates": "0.5,0.25", "evaluation.where": "federated", "num-clients": 2}
    tiny_run(tmp_path / "run", spy, strategy="fedrolex", num_rounds=2, **settings)
    held = {(r, pid): spec for action, r, pid, spec in seen if action == "train"}
    tested = {(r, pid): spec for action, r, pid, spec in seen if action == "evaluate" and r}
    assert tested == held
    assert np.unique([len(spec.units["hidden0"]) for spec in held.values()]).tolist() == [50, 100]
