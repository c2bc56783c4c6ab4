"""Control variates of a gated model: they follow the steps that moved an entry, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from client_app.objectives import make_objective
from pruning.gates import gates_of
from tests.client_app.test_gated import task_of
from wire.message import TrainConfig
from wire.training import VARIATE, make_optimizer, step_sums

NUM_STEPS, RATE, C, OWN = 3, 0.05, 0.5, 0.125


def scaffold_task(share="batch", density=0.25, momentum=0.0, **settings):
    """c = .5 and c_i = .125 in every entry of every parameter; no step but those of the gradient."""
    task = task_of(density, TrainConfig(batch_size=8, momentum=momentum, weight_decay=0.0), share=share, **settings)
    parameters = dict(task.model.named_parameters())
    own = {name: torch.full(p.shape, OWN) for name, p in parameters.items()}
    companions = {VARIATE + name: torch.full(p.shape, C) for name, p in parameters.items()}
    return replace(task, companions=companions, memory={"variates": own})


def train(task):
    """Three steps; the gradients before their correction, and which entries were selected, step by step."""
    objective = make_objective("gated+variates", task)
    parameters = dict(task.model.named_parameters())
    optimizer = make_optimizer(task.train, parameters.values(), RATE)
    gradients, selected = [], []
    for step in range(NUM_STEPS):
        x, y = task.examples.batch(slice(8 * step, 8 * step + 8))
        optimizer.zero_grad()
        objective.loss(x, y)[0].backward()
        gradients.append(
            {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}
        )
        selected.append({name: selected_entries(task, name, p) for name, p in parameters.items()})
        objective.correct()
        objective.step(optimizer)
    return objective, gradients, selected


def selected_entries(task, name, parameter):
    """Bool, of the parameter's shape: whether all units that an entry lies on were selected in the last pass."""
    found = torch.ones(parameter.shape, dtype=torch.bool)
    for site, gate in gates_of(task.model).pairs():
        moved = gate.winners.union(site.size)
        for axis in task.layout.by_name[site.group].axes:
            if axis.key == name:
                found &= moved.view([-1 if d == axis.dim else 1 for d in range(parameter.dim())])
        if name in (f"gates.{site.group}.weight", f"gates.{site.group}.bias"):
            found &= moved.view([-1, *[1] * (parameter.dim() - 1)])
    return found


@pytest.mark.parametrize("share", ["batch", "group", "sample"])
def test_a_variate_becomes_the_mean_gradient_of_the_steps_that_moved_its_entry_and_else_stays(share):
    """Option II without momentum: c_i+ = c_i - c + (x - y) / (n eta), the mean of n gradients; n differs by entry."""
    task = scaffold_task(share, density=0.125)
    objective, gradients, selected = train(task)
    findings = objective.finish(NUM_STEPS)
    counts = set()
    for name, own in findings.memory["variates"].items():
        moved = torch.stack([step[name] for step in selected])
        n = moved.sum(0)
        mean = (torch.stack([step[name] for step in gradients]) * moved).sum(0) / n.clamp(min=1)
        torch.testing.assert_close(own, torch.where(n > 0, mean, OWN), rtol=1e-3, atol=2e-4, msg=name)
        change = findings.companions[VARIATE + name]
        assert not change[n == 0].any(), name
        torch.testing.assert_close(OWN + change, own)
        counts |= set(n.unique().tolist())
    assert counts == {0, 1, 2, 3}, "the test shows nothing of some number of steps"


def test_under_momentum_a_variate_knows_how_far_the_steps_that_moved_its_entry_go():
    task = scaffold_task(momentum=0.9)
    start = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    objective, _, selected = train(task)
    findings = objective.finish(NUM_STEPS)
    for name, parameter in task.model.named_parameters():
        n = torch.stack([step[name] for step in selected]).sum(0)
        reach = torch.tensor([1.0, 1.0, 1 + 1.9, 1 + 1.9 + 2.71])[n] * RATE  # velocities of a constant gradient
        expected = torch.where(n > 0, (start[name] - parameter.detach()) / reach - C, 0.0)
        torch.testing.assert_close(findings.companions[VARIATE + name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_what_is_sent_of_a_narrowed_answer_is_the_same_change():
    whole, part = (scaffold_task(**{"upload-density": density}) for density in (1.0, 0.25))
    answers = []
    for task in (whole, part):
        objective, *_ = train(task)
        answers.append(objective.finish(NUM_STEPS))
    units = list(answers[1].narrowed.units["stage3"])
    name = VARIATE + "blocks.2.norm.weight"
    assert torch.equal(answers[1].companions[name], answers[0].companions[name][units])


@pytest.mark.parametrize("density", [0.25, 1.0])
def test_without_the_mask_or_without_losers_every_step_moves_everything(density):
    task = scaffold_task(density=density, **{"optimizer-mask": density == 1.0})
    objective, gradients, _ = train(task)
    assert not objective.steps_of()
    findings = objective.finish(NUM_STEPS)
    for name, own in findings.memory["variates"].items():
        mean = torch.stack([step[name] for step in gradients]).mean(0)
        torch.testing.assert_close(own, mean, rtol=1e-3, atol=2e-4, msg=name)


def test_the_distances_of_fewer_steps_are_those_of_shorter_rounds():
    for momentum, nesterov, pull in ((0.0, False, 0.0), (0.9, False, 0.0), (0.9, True, 0.1)):
        shorter = [step_sums(n, momentum, nesterov, pull)[-1] for n in range(5)]
        assert step_sums(4, momentum, nesterov, pull) == shorter
