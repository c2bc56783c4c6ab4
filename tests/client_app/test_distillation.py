"""Objectives of models with exits, against formulas written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from client_app.data import client_examples
from client_app.handler import handle
from client_app.objectives import ObjectiveError, Task, make_objective
from client_app.objectives.distillation import divergence, exit_weights
from pruning.extract import extract
from pruning.spec import FULL, SubModelSpec
from tests.client_app.conftest import MakeInstruction
from wire.message import ModelConfig, TrainConfig
from zoo import get_model


class Recited(nn.Module):
    """Answers with fixed logits, so that a loss can be computed by hand."""

    def __init__(self, *logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.ParameterList(logits)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.logits)


def task_of(model: nn.Module, smoothing: float = 0.0, **chosen: Any) -> Task:
    named = {key.replace("_", "-"): value for key, value in chosen.items()}
    layout = get_model("resnet8", 10, 1, 8)[1]
    return Task(model, layout, TrainConfig(label_smoothing=smoothing), named, torch.ones(3), FULL, model)


def loss_by_hand(kind: str, logits: list[Tensor], y: Tensor, weight: float, temperature: float, linear: bool) -> Tensor:
    """The three losses entry by entry, without torch's loss functions."""
    num_exits = len(logits)

    def probabilities(z: Tensor, t: float = 1.0) -> Tensor:
        e = (z / t - (z / t).amax(1, keepdim=True)).exp()
        return e / e.sum(1, keepdim=True)

    total = torch.zeros((), dtype=torch.float64)
    for e, z in enumerate(logits):
        term = -sum(probabilities(z)[i, label].log() for i, label in enumerate(y.tolist())) / len(y)
        teachers = {
            "exits": [],
            "deepest-teaches": [num_exits - 1] if e < num_exits - 1 else [],
            "mutual": [j for j in range(num_exits) if j != e],
        }[kind]
        for j in teachers:
            p, q = probabilities(logits[j].detach(), temperature), probabilities(z, temperature)
            distance = (p * (p / q).log()).sum() / len(y) * temperature**2
            term = term + weight * distance / len(teachers)
        share = (e + 1) / sum(range(1, num_exits + 1)) if linear else 1.0
        total = total + share * term
    return total


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["exits", "deepest-teaches", "mutual"]),
    num_exits=st.integers(1, 4),
    weight=st.sampled_from([0.0, 0.3, 2.0]),
    temperature=st.sampled_from([1.0, 3.0]),
    linear=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_losses_and_gradients_are_those_of_the_formulas(kind, num_exits, weight, temperature, linear, seed):
    rng = torch.Generator().manual_seed(seed)
    logits = [torch.randn(5, 3, generator=rng, dtype=torch.float64) for _ in range(num_exits)]
    y = torch.randint(3, (5,), generator=rng)
    model = Recited(*logits)
    task = task_of(
        model,
        distillation_weight=weight,
        temperature=temperature,
        exit_weights="linear" if linear else "equal",
    )
    loss, last = make_objective(kind, task).loss(torch.zeros(5), y)
    loss.backward()
    by_hand = [z.clone().requires_grad_() for z in logits]
    expected = loss_by_hand(kind, by_hand, y, weight, temperature, linear)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert torch.equal(last, logits[-1])
    for parameter, z in zip(model.logits, by_hand, strict=True):
        torch.testing.assert_close(parameter.grad, z.grad)


def test_the_teacher_is_not_taught_by_its_pupils():
    teacher, pupil = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    divergence(teacher, pupil, 2.0).backward()
    assert teacher.grad is None
    assert pupil.grad is not None
    assert float(divergence(pupil, pupil).detach()) == pytest.approx(0, abs=1e-6)


def test_defaults_are_those_of_the_papers():
    logits = [torch.randn(4, 3, dtype=torch.float64) for _ in range(3)]
    y = torch.tensor([0, 1, 2, 0])
    for kind, temperature in (("deepest-teaches", 3.0), ("mutual", 1.0)):
        loss, _ = make_objective(kind, task_of(Recited(*logits))).loss(torch.zeros(4), y)
        torch.testing.assert_close(loss.detach(), loss_by_hand(kind, logits, y, 1.0, temperature, False))


def test_nobody_is_taught_with_weight_zero():
    logits = [torch.randn(4, 3) for _ in range(3)]
    y = torch.tensor([0, 1, 2, 0])
    losses = [
        make_objective(kind, task_of(Recited(*logits), distillation_weight=0.0)).loss(torch.zeros(4), y)[0]
        for kind in ("exits", "deepest-teaches", "mutual")
    ]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_linear_weights_sum_to_one_and_grow_with_depth():
    assert exit_weights("linear", 4) == [0.1, 0.2, 0.3, 0.4]
    assert exit_weights("equal", 3) == [1.0, 1.0, 1.0]


def test_label_smoothing_reaches_every_exit():
    logits = [torch.randn(4, 3) for _ in range(2)]
    y = torch.tensor([0, 1, 2, 0])
    loss, _ = make_objective("exits", task_of(Recited(*logits), smoothing=0.1)).loss(torch.zeros(4), y)
    expected = sum(nn.functional.cross_entropy(z, y, label_smoothing=0.1) for z in logits)
    torch.testing.assert_close(loss.detach(), expected)


def test_the_ensemble_is_the_mean_of_all_exits_logits():
    logits = [torch.randn(4, 3) for _ in range(3)]
    objective = make_objective("mutual", task_of(Recited(*logits), predict="ensemble"))
    assert objective.predict is not None
    torch.testing.assert_close(objective.predict(torch.zeros(4)), (logits[0] + logits[1] + logits[2]) / 3)
    deepest = make_objective("mutual", task_of(Recited(*logits)))
    assert deepest.predict is not None
    assert torch.equal(deepest.predict(torch.zeros(4)), logits[2])


@pytest.mark.parametrize("kind", ["exits", "deepest-teaches", "mutual"])
def test_a_model_without_exits_is_refused_with_the_remedy(kind):
    model = get_model("resnet8", 10, 1, 8)[0]
    with pytest.raises(ObjectiveError, match=r"set model\.exits=true"):
        make_objective(kind, task_of(model)).loss(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", 0.0, "temperature: got 0.0, expected a number > 0"),
        ("temperature", float("nan"), "temperature: got nan"),
        ("distillation_weight", -1.0, "distillation-weight: got -1.0, expected a number >= 0"),
        ("exit_weights", "cubic", "exit-weights: got 'cubic', expected 'equal' or 'linear'"),
        ("predict", "loudest", "predict: got 'loudest', expected 'deepest' or 'ensemble'"),
    ],
)
def test_settings_out_of_range_are_refused_before_training(name, value, message):
    with pytest.raises(ObjectiveError, match=message):
        make_objective("mutual", task_of(Recited(torch.zeros(2, 3)), **{name: value}))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", ["exits", "deepest-teaches", "mutual"])
def test_a_client_trains_every_exit_it_holds_and_answers_with_all_of_them(kind, depth, make_instruction):
    instruction = with_exits(make_instruction, SubModelSpec(depth=depth), objective=kind)
    report = handle(instruction)
    assert report.state.keys() == instruction.state.keys()
    heads = [key for key in report.state if key.startswith("heads.") and key.endswith("linear.weight")]
    assert len(heads) == depth
    assert all(not torch.equal(report.state[key], instruction.state[key]) for key in heads)


def test_a_client_with_one_exit_minimises_plain_cross_entropy(make_instruction):
    answers = [
        handle(with_exits(make_instruction, SubModelSpec(depth=1), objective=kind)).state
        for kind in ("cross-entropy", "exits", "mutual", "deepest-teaches")
    ]
    assert all(torch.equal(answers[0][key], other[key]) for other in answers[1:] for key in other)


@pytest.mark.parametrize("predict", ["deepest", "ensemble"])
def test_a_client_is_tested_on_what_it_predicts_with(predict, make_instruction):
    chosen = {"predict": predict}
    instruction = with_exits(make_instruction, FULL, objective="exits", action="evaluate", settings=chosen)
    model = get_model("resnet8", 10, 1, 8, exits=True)[0].eval()
    model.load_state_dict(instruction.state)
    _, test = client_examples(instruction.job.data, 4, 0)
    x, y = test.batch(slice(None))
    with torch.no_grad():
        outputs = model(x)
    logits = torch.stack(outputs).mean(0) if predict == "ensemble" else outputs[-1]
    assert handle(instruction).metrics["accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))


def with_exits(make_instruction: MakeInstruction, spec: SubModelSpec, **changes: Any) -> Any:
    torch.manual_seed(0)
    full, layout = get_model("resnet8", 10, 1, 8, exits=True)
    instruction = make_instruction("resnet8", job={"model": ModelConfig("resnet8", exits=True)})
    return replace(instruction, state=extract(full.state_dict(), layout, spec), spec=spec, **changes)
