"""A client deploys the exit that was right most often on its own data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from client_app.handler import handle
from client_app.objectives import ObjectiveError, make_objective
from client_app.objectives.exit_choice import best_exit
from client_app.store import ClientStore
from tests.client_app.test_objectives import BATCH, task_of
from tests.vits import small
from wire.message import ModelConfig


@pytest.mark.parametrize(
    ("accuracy", "num_exits", "chosen"),
    [
        ([0.2, 0.5, 0.4], 3, 1),
        ([0.2, 0.5, 0.5], 3, 2),
        ([], 3, 2),
        ([0.9, 0.5, 0.4, 0.3], 2, 0),
        ([0.1, 0.5], 4, 1),
    ],
)
def test_the_best_exit_is_the_most_accurate_the_deeper_of_equals_the_deepest_if_unknown(accuracy, num_exits, chosen):
    assert best_exit(accuracy, num_exits) == chosen


def test_each_exit_is_judged_once_per_example_before_training_on_it():
    torch.manual_seed(0)
    model, layout = small(10, 1, 8, exits=True)
    examples = list(range(9))
    task = replace(task_of(), model=model.train(), layout=layout, examples=examples)
    objective = make_objective("deepest-teaches+exit-choice", task)
    x, y = BATCH
    with torch.no_grad():
        expected = [float((z.argmax(1) == y).float().mean()) for z in model(x)]
    objective.loss(x, y)
    objective.loss(x[:3], y[:3])
    objective.loss(x, (y + 1) % 10)  # the second pass over the nine examples no longer counts
    found = objective.finish(3)
    half = [int((z[:3].argmax(1) == y[:3]).sum()) for z in model(x)]
    counts = [(6 * e + h) / 9 for e, h in zip(expected, half, strict=True)]
    assert found.memory["exit_accuracy"] == pytest.approx(counts)
    assert [found.metrics[f"exit_{i}_accuracy"] for i in (1, 2, 3, 4)] == pytest.approx(counts)


def test_the_test_is_by_the_exit_that_was_best(make_instruction, tmp_path):
    model, _ = small(10, 1, 8, exits=True)
    instruction = make_instruction("mlp", job={"model": ModelConfig("tests.vits:small", exits=True)})
    job = replace(instruction.job, store_dir=str(tmp_path))
    test = replace(
        instruction,
        job=job,
        state=model.state_dict(),
        objective="deepest-teaches+exit-choice",
        action="evaluate",
        last_dispatch=0,
    )
    losses = []
    for index in range(4):
        accuracy = [1.0 if i == index else 0.0 for i in range(4)]
        ClientStore(str(tmp_path), 0).save(0, -1, {"objective": {"exit_accuracy": accuracy}})
        losses.append(handle(test).metrics["loss"])
    assert len(set(losses)) == 4
    deepest = handle(replace(test, last_dispatch=-1)).metrics["loss"]
    assert deepest == losses[3]


def test_a_model_without_exits_is_refused_with_the_remedy():
    objective = make_objective("cross-entropy+exit-choice", replace(task_of(), examples=[0] * 6))
    with pytest.raises(ObjectiveError, match=r"set model\.exits=true"):
        objective.loss(*BATCH)
