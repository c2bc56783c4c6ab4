"""What an objective may do beside minimising: remember, send companions, correct gradients, train a part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from client_app import objectives
from client_app.handler import TrainingError, handle
from client_app.objectives import Findings, Objective, Task
from client_app.objectives.cross_entropy import cross_entropy
from pruning.cost import measure_costs
from pruning.extract import extract, resize
from pruning.spec import SubModelSpec
from strategies.answers import ReportError, check_narrowed
from wire.message import CompressionConfig, payload_bytes, state_bytes
from zoo import get_model

NARROW = SubModelSpec.of({"hidden0": range(50), "hidden1": range(0, 200, 2)})


def counting(task: Task) -> Objective:
    """Adds up what it was sent over all rounds, and tells the server."""
    total = task.memory.get("total", torch.zeros(2)) + task.companions["step"]

    def finish(num_steps: int) -> Findings:
        return Findings({"total": total}, {"total": total}, {"steps_told": float(num_steps)})

    return replace(cross_entropy(task), finish=finish)


def frozen_rows(task: Task) -> Objective:
    """Lets no gradient through."""

    def correct() -> None:
        for parameter in task.model.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()

    return replace(cross_entropy(task), correct=correct)


def narrowing(task: Task) -> Objective:
    """Trains a part of what was sent."""
    small = resize(task.model, task.layout, NARROW)

    def loss(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = small(x)
        return nn.functional.cross_entropy(logits, y), logits

    return Objective(small, loss, finish=lambda num_steps: Findings(narrowed=NARROW, train_macs=7.0))


def constant(task: Task) -> Objective:
    """Predicts class 3, whatever it sees."""
    return replace(cross_entropy(task), predict=lambda x: nn.functional.one_hot(torch.full((len(x),), 3), 10).float())


@pytest.fixture(autouse=True)
def known(monkeypatch):
    made = {f.__name__: f for f in (counting, frozen_rows, narrowing, constant)}
    monkeypatch.setattr(objectives, "OBJECTIVES", made)


def test_what_is_remembered_comes_back_with_the_answer_that_was_merged(make_instruction, tmp_path):
    def ask(dispatch: int, last: int) -> dict[str, torch.Tensor]:
        step = {"step": torch.tensor([1.0, 10.0 * dispatch])}
        return handle(
            make_instruction(
                "mlp",
                job={"store_dir": str(tmp_path)},
                objective="counting",
                companions=step,
                dispatch=dispatch,
                last_dispatch=last,
            )
        ).companions

    assert ask(1, -1)["total"].tolist() == [1, 10]
    assert ask(2, 1)["total"].tolist() == [2, 30]
    assert ask(3, 1)["total"].tolist() == [2, 40], "answer 2 was lost on its way and is forgotten with it"


def test_an_objective_shares_the_clients_memory_with_compression(make_instruction, tmp_path):
    compressed = {"store_dir": str(tmp_path), "compression": CompressionConfig("dgc", 0.1)}
    step = {"step": torch.ones(2)}
    for dispatch in (0, 1):
        report = handle(
            make_instruction(
                "mlp",
                job=compressed,
                wants_delta=True,
                objective="counting",
                companions=step,
                dispatch=dispatch,
                last_dispatch=dispatch - 1,
            )
        )
        assert report.companions["total"].tolist() == [dispatch + 1] * 2


def test_companions_count_as_bytes_and_the_number_of_steps_is_told(make_instruction):
    instruction = make_instruction("mlp", objective="counting", companions={"step": torch.ones(2)})
    report = handle(instruction)
    assert payload_bytes(instruction) == state_bytes(instruction.state) + 8
    assert payload_bytes(report) == state_bytes(report.state) + 8
    assert report.num_steps == report.metrics["steps_told"] == 2, "64 examples in batches of 32"


def test_gradients_are_corrected_before_the_step(make_instruction):
    instruction = make_instruction("mlp", objective="frozen_rows", train={"weight_decay": 0.0})
    report = handle(instruction)
    assert all(torch.equal(report.state[key], tensor) for key, tensor in instruction.state.items())


@pytest.mark.parametrize("wants_delta", [False, True])
def test_an_objective_that_trains_a_part_reports_that_part(make_instruction, wants_delta):
    _, layout = get_model("mlp", 10, 1, 8)
    instruction = make_instruction("mlp", objective="narrowing", wants_delta=wants_delta)
    report = handle(instruction)
    assert report.narrowed == NARROW
    assert report.train_macs == 7.0
    start = extract(instruction.state, layout, NARROW)
    assert {k: t.shape for k, t in report.state.items()} == {k: t.shape for k, t in start.items()}
    whole = handle(make_instruction("mlp", objective="narrowing")).state
    for key, tensor in report.state.items():
        assert torch.equal(tensor, whole[key] - start[key] if wants_delta else whole[key])


def test_evaluation_asks_the_objective_to_predict(make_instruction):
    instruction = make_instruction("mlp", action="evaluate", objective="constant")
    from client_app.data import client_examples

    _, test = client_examples(instruction.job.data, 4, 0)
    assert handle(instruction).metrics["accuracy"] == pytest.approx(float((test.y == 3).float().mean()))


def test_a_part_that_is_none_of_what_was_sent_is_turned_away(make_instruction):
    _, layout = get_model("mlp", 10, 1, 8)
    report = handle(make_instruction("mlp", objective="narrowing"))
    assert check_narrowed(report, SubModelSpec(), layout) == NARROW
    assert check_narrowed(replace(report, narrowed=None), NARROW, layout) == NARROW
    with pytest.raises(ReportError, match="not part of the spec that was sent"):
        check_narrowed(report, SubModelSpec.of({"hidden0": range(10)}), layout)


def test_nothing_is_remembered_of_training_that_failed(make_instruction, tmp_path):
    instruction = make_instruction(
        "mlp",
        job={"store_dir": str(tmp_path)},
        objective="counting",
        companions={"step": torch.ones(2)},
        train={"learning_rate": 1e12, "local_epochs": 3},
    )
    with pytest.raises(TrainingError):
        handle(instruction)
    assert not list(tmp_path.iterdir())


def test_measured_macs_are_those_of_the_sub_model_unless_the_objective_knows_better(make_instruction):
    model, layout = get_model("mlp", 10, 1, 8)
    cost = measure_costs(model, layout, torch.zeros(2, 1, 8, 8)).of(SubModelSpec())
    assert handle(make_instruction("mlp", objective="frozen_rows")).train_macs == 64 * cost.train_macs
