"""Corrections against client drift, against formulas written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from client_app.handler import handle
from client_app.model import sub_model
from client_app.objectives import Findings, Fitted, Objective, ObjectiveError, Task, make_objective
from client_app.objectives.drift import proximal
from client_app.store import ClientStore
from pruning.extract import embed, extract, resize
from pruning.spec import FULL, SubModelSpec
from wire.message import DataConfig, TrainConfig
from wire.training import VARIATE, step_sums
from zoo import get_model

BATCH = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3, 4, 5])
HALF = SubModelSpec.of({"stage1": range(4), "stage2": range(0, 16, 2)})
WIDE_HALF = SubModelSpec.of({"stage1": range(16), "stage2": range(0, 64, 2)})
RATE = 0.1


def task_of(spec: SubModelSpec = FULL, train: TrainConfig | None = None, **changes: Any) -> Task:
    torch.manual_seed(0)
    full, layout = get_model("cnn", 10, 1, 8, width=0.25)
    model = full if spec == FULL else resize(full, layout, spec)
    counts = torch.tensor([5] * 10)
    config = train or TrainConfig(momentum=0.0, weight_decay=0.0)
    return replace(Task(model.train(), layout, config, {}, counts, spec, full, learning_rate=RATE), **changes)


def train(task: Task, name: str, num_steps: int) -> tuple[dict[str, torch.Tensor], Findings, list[dict]]:
    """Plain steps as the handler makes them; returns the weights, the findings and the gradients before correction."""
    objective = make_objective(name, task)
    c = task.train
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=task.learning_rate, momentum=c.momentum)
    raw = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        objective.loss(*BATCH)[0].backward()
        raw.append({k: p.grad.clone() for k, p in objective.model.named_parameters()})
        objective.correct()
        optimizer.step()
    weights = {k: p.detach().clone() for k, p in objective.model.named_parameters()}
    return weights, objective.finish(num_steps), raw


def parameters_of(task: Task) -> dict[str, torch.Tensor]:
    return {k: p.detach().clone() for k, p in task.model.named_parameters()}


def test_a_proximal_gradient_is_that_of_the_papers_loss():
    """Two steps, so that the model has left its anchor; autograd on CE + mu/2 ||w - x||^2 as the oracle."""
    task = task_of(settings={"mu": 0.7})
    x = parameters_of(task)
    objective = make_objective("cross-entropy+proximal", task)
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=RATE)
    for _ in range(2):
        optimizer.zero_grad()
        objective.loss(*BATCH)[0].backward()
        objective.correct()
        corrected = {k: p.grad.clone() for k, p in task.model.named_parameters()}
        twin = task_of()
        twin.model.load_state_dict(task.model.state_dict())
        penalty = sum(((p - x[k]) ** 2).sum() for k, p in twin.model.named_parameters())
        (make_objective("cross-entropy", twin).loss(*BATCH)[0] + 0.35 * penalty).backward()
        for k, p in twin.model.named_parameters():
            torch.testing.assert_close(corrected[k], p.grad, rtol=1e-4, atol=1e-6)
        optimizer.step()


def test_mu_0_leaves_the_objective_as_it_is():
    task = task_of(settings={"mu": 0.0})
    inner = make_objective("cross-entropy", task)
    assert proximal(task, inner) is inner


def test_first_variates_are_the_mean_gradient_of_the_round():
    """c = c_i = 0: nothing is corrected, and c_i+ = (x - y) / (K eta) is the mean of the gradients, option II."""
    plain, _, _ = train(task_of(), "cross-entropy", 4)
    weights, findings, raw = train(task_of(), "cross-entropy+variates", 4)
    assert all(torch.equal(weights[k], plain[k]) for k in plain)
    for key in plain:
        mean = sum(gradients[key] for gradients in raw) / 4
        torch.testing.assert_close(findings.companions[VARIATE + key], mean, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(findings.memory["variates"][key], mean, rtol=1e-3, atol=1e-6)
    assert findings.companions.keys() == {VARIATE + key for key in plain}, "buffers have no variates"


def test_gradients_are_corrected_by_c_minus_ci_and_ci_moves_as_in_the_paper():
    task = task_of()
    x = parameters_of(task)
    generator = torch.Generator().manual_seed(5)
    c, own = ({k: 0.01 * torch.randn(t.shape, generator=generator) for k, t in x.items()} for _ in range(2))
    memory = {"variates": {k: t.clone() for k, t in own.items()}}
    task = replace(task, companions={VARIATE + k: t for k, t in c.items()}, memory=memory)
    y, findings, raw = train(task, "cross-entropy+variates", 3)
    for k in x:
        by_hand = x[k] - RATE * sum(gradients[k] - own[k] + c[k] for gradients in raw)
        torch.testing.assert_close(y[k], by_hand, rtol=1e-4, atol=1e-6)
        new = own[k] - c[k] + (x[k] - y[k]) / (3 * RATE)
        torch.testing.assert_close(findings.memory["variates"][k], new, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(findings.companions[VARIATE + k], new - own[k], rtol=1e-4, atol=1e-6)
        assert torch.equal(memory["variates"][k], own[k]), "what was remembered before is not touched"


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_under_momentum_a_constant_gradient_is_still_its_own_variate(momentum):
    """With K in place of the optimiser's distance, c_i would be up to 1 / (1 - momentum) times too large."""
    task = task_of(train=TrainConfig(momentum=momentum, weight_decay=0.0))
    objective = make_objective("cross-entropy+variates", task)
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=RATE, momentum=momentum)
    for _ in range(6):
        for p in objective.model.parameters():
            p.grad = torch.full_like(p, 0.25)
        objective.correct()
        optimizer.step()
    for tensor in objective.finish(6).companions.values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 0.25), rtol=1e-4, atol=1e-5)


def test_both_corrections_together_follow_their_common_recursion():
    task = task_of(settings={"mu": 0.5})
    x = parameters_of(task)
    c = {k: torch.full(t.shape, 0.02) for k, t in x.items()}
    y, findings, _ = train(
        replace(task, companions={VARIATE + k: t for k, t in c.items()}), "cross-entropy+proximal+variates", 3
    )
    distance = step_sums(3, pull=0.5 * RATE)[-1]
    for k in x:
        expected = (x[k] - y[k]) / (distance * RATE) - c[k]
        torch.testing.assert_close(findings.companions[VARIATE + k], expected, rtol=1e-4, atol=1e-6)


def test_variates_follow_the_sub_model_and_remember_what_it_leaves():
    """A client trains all, then a half, then all again: what the half lacks keeps its variate."""
    first = train(task_of(), "cross-entropy+variates", 2)[1].memory
    half = task_of(HALF, memory=first)
    x = parameters_of(half)
    y, findings, _ = train(half, "cross-entropy+variates", 2)
    second = findings.memory
    full_parameters = dict(half.full.named_parameters())
    before = dict(half.full.state_dict())
    for k in full_parameters:
        mask = embed(extract(before, half.layout, HALF), half.layout, HALF, before)[1][k]
        assert torch.equal(second["variates"][k][~mask], first["variates"][k][~mask])
        assert second["variates"][k].shape == full_parameters[k].shape
        assert findings.companions[VARIATE + k].shape == x[k].shape
        own = first["variates"][k][mask].view(x[k].shape)
        new = own + (x[k] - y[k]) / (2 * RATE)
        torch.testing.assert_close(second["variates"][k][mask].view(x[k].shape), new, rtol=1e-3, atol=1e-6)


class Narrowing:
    """A base that trains a half of its own choosing, and says so early, late or not at all."""

    def __init__(self, says: str) -> None:
        self.says = says

    def __call__(self, task: Task) -> Objective:
        small = resize(task.model, task.layout, HALF)
        inner = make_objective("cross-entropy", replace(task, model=small))
        early = HALF if self.says == "before" else None
        return replace(inner, narrowed=early, finish=lambda num_steps: Findings(narrowed=HALF))


def test_a_base_that_narrows_before_training_has_the_variates_of_its_part(monkeypatch):
    monkeypatch.setitem(make_objective.__globals__["OBJECTIVES"], "narrowing", Narrowing("before"))
    task = task_of()
    c = {VARIATE + k: torch.randn(t.shape) * 0.01 for k, t in parameters_of(task).items()}
    objective = make_objective("narrowing+variates", replace(task, companions=c))
    x = {k: p.detach().clone() for k, p in objective.model.named_parameters()}
    for p in objective.model.parameters():
        p.grad = torch.zeros_like(p)
    objective.correct()
    whole = {**task.model.state_dict(), **{k.removeprefix(VARIATE): t for k, t in c.items()}}
    part = extract(whole, task.layout, HALF)
    for k, p in objective.model.named_parameters():
        torch.testing.assert_close(p.grad, part[k])
    torch.optim.SGD(objective.model.parameters(), lr=RATE).step()
    findings = objective.finish(1)
    assert findings.narrowed == HALF
    assert {k: findings.companions[VARIATE + k].shape for k in x} == {k: t.shape for k, t in x.items()}
    for tensor in findings.companions.values():
        torch.testing.assert_close(tensor, torch.zeros_like(tensor), atol=1e-6, rtol=0)


def test_a_base_that_narrows_without_saying_what_is_refused(monkeypatch):
    monkeypatch.setitem(make_objective.__globals__["OBJECTIVES"], "narrowing", Narrowing("after"))
    with pytest.raises(ObjectiveError, match=r"must say which \(Objective\.narrowed\)"):
        make_objective("narrowing+variates", task_of())


@pytest.mark.parametrize("correction", ["proximal", "variates"])
def test_a_base_that_trains_in_its_own_way_cannot_be_corrected(correction, monkeypatch):
    def base(task: Task) -> Objective:
        return replace(make_objective("cross-entropy", task), train=lambda examples: Fitted({}, 0, 0, 0))

    monkeypatch.setitem(make_objective.__globals__["OBJECTIVES"], "alone", base)
    with pytest.raises(ObjectiveError, match=f"{correction}: the base trains in a way of its own"):
        make_objective(f"alone+{correction}", task_of(settings={"mu": 0.1}))


def test_a_part_chosen_after_training_reports_and_remembers_only_that_part(monkeypatch):
    def base(task: Task) -> Objective:
        return replace(make_objective("cross-entropy", task), finish=lambda num_steps: Findings(narrowed=HALF))

    monkeypatch.setitem(make_objective.__globals__["OBJECTIVES"], "late", base)
    task = task_of()
    _, findings, _ = train(task, "late+variates", 2)
    _, whole, _ = train(task_of(), "cross-entropy+variates", 2)
    state = task.full.state_dict()
    for k, everything in whole.companions.items():
        name = k.removeprefix(VARIATE)
        part = extract({**state, name: everything}, task.layout, HALF)[name]
        assert torch.equal(findings.companions[k], part)
        mask = embed(extract(state, task.layout, HALF), task.layout, HALF, state)[1][name]
        assert not findings.memory["variates"][name][~mask].any()


def test_what_the_base_found_and_remembers_is_kept_beside_the_variates(monkeypatch):
    def base(task: Task) -> Objective:
        found = Findings({"mine": torch.ones(1)}, {"own": 3}, {"m": 0.5})
        return replace(make_objective("cross-entropy", task), finish=lambda num_steps: found)

    monkeypatch.setitem(make_objective.__globals__["OBJECTIVES"], "telling", base)
    _, findings, _ = train(task_of(), "telling+variates", 1)
    assert torch.equal(findings.companions["mine"], torch.ones(1))
    assert findings.memory["own"] == 3
    assert findings.metrics == {"m": 0.5}


def test_corrections_say_what_they_keep_in_memory():
    task = task_of(settings={"mu": 0.5})
    size = sum(4 * p.numel() for p in task.model.parameters())
    assert make_objective("cross-entropy+proximal", task).kept_bytes == size
    assert make_objective("cross-entropy+proximal+variates", task).kept_bytes == 3 * size


def test_a_client_finds_its_variate_again_and_forgets_that_of_a_lost_answer(make_instruction, tmp_path):
    job = {"store_dir": str(tmp_path), "data": DataConfig(max_train=320, partition="iid")}
    ask = {"objective": "cross-entropy+variates", "job": job}
    first = handle(make_instruction("mlp", **ask, dispatch=3))
    own = ClientStore(str(tmp_path), 0).load(3)["objective"]["variates"]
    assert all(torch.equal(own[k.removeprefix(VARIATE)], t) for k, t in first.companions.items())
    lost = handle(make_instruction("mlp", **ask, dispatch=7, last_dispatch=3))
    again = handle(make_instruction("mlp", **ask, dispatch=7, last_dispatch=3))
    assert all(torch.equal(lost.companions[k], again.companions[k]) for k in lost.companions)
    later = ClientStore(str(tmp_path), 0).load(7)["objective"]["variates"]
    for k, t in again.companions.items():
        torch.testing.assert_close(later[k.removeprefix(VARIATE)], own[k.removeprefix(VARIATE)] + t)


def test_a_handled_request_corrects_every_step(make_instruction):
    """A whole request with a constant c: without momentum and decay, y differs from the plain one by about K eta c."""
    plain = {"train": {"momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1e-4}, "model": "mlp"}
    bare = handle(make_instruction(**plain))
    c = {VARIATE + k: torch.full(t.shape, 0.5) for k, t in bare.state.items()}
    corrected = handle(make_instruction(**plain, objective="cross-entropy+variates", companions=c))
    assert corrected.num_steps == bare.num_steps == 2
    for k, t in bare.state.items():
        torch.testing.assert_close(corrected.state[k], t - 2 * 1e-4 * 0.5, atol=2e-6, rtol=0)
    assert corrected.peak_memory_bytes == bare.peak_memory_bytes + 2 * sum(4 * t.numel() for t in bare.state.values())


def test_a_sub_model_sends_variates_of_its_parameters_only(make_instruction):
    report = handle(make_instruction(spec=WIDE_HALF, objective="cross-entropy+variates"))
    small = sub_model(make_instruction().job.model, 10, (1, 8, 8), WIDE_HALF)[0]
    expected = {VARIATE + name: tuple(p.shape) for name, p in small.named_parameters()}
    assert {key: tuple(tensor.shape) for key, tensor in report.companions.items()} == expected
