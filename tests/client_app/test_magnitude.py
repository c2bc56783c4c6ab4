"""Small weights become zero after every epoch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from client_app.batches import batches, num_batches
from client_app.handler import fit
from client_app.objectives import make_objective
from tests.client_app.test_gated import task_of
from tests.vits import small
from wire.message import TrainConfig


@pytest.mark.parametrize(
    ("num", "size"), [(24, 8), (25, 8), (26, 8), (1, 8), (7, 8), (9, 8), (16, 16), (17, 16), (5, 1), (1, 1)]
)
def test_the_number_of_batches_is_as_many_as_there_are(num, size):
    assert num_batches(num, size) == len(batches(num, size, torch.Generator()))


def test_weights_below_the_threshold_are_zero_after_every_epoch_and_biases_are_not_touched():
    task = replace(task_of(1.0, TrainConfig(batch_size=8, local_epochs=2)), settings={"threshold": 0.05})
    objective = make_objective("cross-entropy+magnitude", task)
    seen = []
    inner = objective.loss
    objective = replace(objective, loss=lambda x, y: (seen.append(zeros(task)), inner(x, y))[1])
    fitted = fit(task, objective, task.examples)
    findings = objective.finish(fitted.num_steps)
    assert seen[0] == seen[2] == 0, "nothing is pruned within the first epoch"
    assert zeros(task) > 0
    assert findings.metrics["zero_ratio"] == pytest.approx(zeros(task) / sum(p.numel() for p in weights(task)))
    smallest = min(float(p.detach().abs()[p.detach() != 0].min()) for p in weights(task))
    assert smallest >= 0.05
    assert (task.model.blocks[0].norm.bias.detach().abs() < 0.05).any()


def weights(task):
    return [parameter for parameter in task.model.parameters() if parameter.dim() > 1]


def zeros(task):
    return sum(int((p == 0).sum()) for p in weights(task))


def test_threshold_0_changes_nothing():
    states = []
    for name in ("cross-entropy", "cross-entropy+magnitude"):
        task = replace(task_of(1.0), settings={"threshold": 0.0})
        torch.manual_seed(0)
        objective = make_objective(name, task)
        objective.finish(fit(task, objective, task.examples).num_steps)
        states.append(task.model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_who_only_evaluates_prunes_nothing():
    task = replace(task_of(1.0), examples=None, settings={"threshold": 10.0})
    make_objective("cross-entropy+magnitude", task)
    assert zeros(task) == 0


def test_positions_and_the_class_token_of_a_vit_are_no_weights_and_stay():
    model, layout = small(10, 1, 8)
    task = replace(task_of(1.0), model=model, layout=layout, settings={"threshold": 10.0})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    make_objective("cross-entropy+magnitude", task).finish(1)
    for name, parameter in model.named_parameters():
        is_weight = name.endswith(".weight") and parameter.dim() > 1
        assert torch.equal(parameter, torch.zeros_like(parameter) if is_weight else before[name]), name
