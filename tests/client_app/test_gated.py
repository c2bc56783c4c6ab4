"""Training with gates: loss, what moves and what does not, what goes back."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from client_app.data import Examples, client_examples
from client_app.evaluation import evaluate, reestimate_batch_norm
from client_app.handler import fit, handle
from client_app.objectives import Objective, ObjectiveError, Task, make_objective
from pruning.extract import extract, shapes_of
from pruning.gates import BITMAP, PLAN, PREFIX, SALIENCE, attach, check_bitmap, gates_of, num_winners
from pruning.groups import Axis, Group, Layout
from pruning.ops import trace_ops
from pruning.spec import FULL
from wire.message import CompressionConfig, Instruction, ModelConfig, TrainConfig
from wire.training import make_optimizer
from zoo import get_model

WIDTHS = {"stage2": 64, "stage3": 128}


def task_of(present: float = 0.5, train: TrainConfig | None = None, memory: Any = None, **settings: Any) -> Task:
    """The CNN, at ``present`` density, on 24 random images of 8 x 8."""
    torch.manual_seed(0)
    model, layout = get_model("cnn", 10, 1, 8, gates=True)
    gates_of(model).set_density(present)
    with torch.device("meta"):
        full, _ = get_model("cnn", 10, 1, 8, gates=True)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (24, 1, 8, 8), generator=generator).to(torch.uint8)
    examples = Examples(x, torch.arange(24) % 10, torch.zeros(1), torch.ones(1))
    return Task(
        model.train(),
        layout,
        train or TrainConfig(batch_size=8),
        settings,
        torch.bincount(examples.y, minlength=10),
        FULL,
        full,
        memory=memory or {},
        examples=examples,
        learning_rate=0.05,
    )


def one_step(task: Task, objective: Objective, optimizer: Any = None) -> Any:
    assert task.examples is not None
    x, y = task.examples.batch(slice(0, 8))
    optimizer = optimizer or make_optimizer(task.train, task.model.parameters(), 0.05)
    loss, _ = objective.loss(x, y)
    optimizer.zero_grad()
    loss.backward()
    objective.correct()
    objective.step(optimizer)
    return optimizer


def losers_of(task: Task, group: str) -> torch.Tensor:
    winners = task.model.gates[group].winners
    return ~winners.union(WIDTHS[group])


def rows_of(task: Task, group: str) -> dict[str, torch.Tensor]:
    """Everything that the units of a group own among the parameters, units first; a copy."""
    parameters = dict(task.model.named_parameters())
    axes = [axis for axis in task.layout.by_name[group].axes if axis.key in parameters]
    own = {axis.key + str(axis.dim): parameters[axis.key].detach().movedim(axis.dim, 0).clone() for axis in axes}
    gate = task.model.gates[group]
    return {**own, "gate.weight": gate.weight.detach().clone(), "gate.bias": gate.bias.detach().clone()}


@pytest.mark.parametrize("share", ["sample", "group", "batch"])
def test_the_loss_is_cross_entropy_of_the_masked_network(share):
    compact, masked = (task_of(share=share, compact=flag, **{"num-groups": 2}) for flag in (True, False))
    x, y = compact.examples.batch(slice(0, 8))
    found, logits = make_objective("gated", compact).loss(x, y)
    expected, _ = make_objective("gated", masked).loss(x, y)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, functional.cross_entropy(logits, y))


def test_sparsity_adds_the_mean_l1_norm_of_the_gates():
    plain, sparse = task_of(share="batch"), task_of(share="batch", sparsity=0.1)
    x, y = plain.examples.batch(slice(0, 8))
    gap = make_objective("gated", sparse).loss(x, y)[0] - make_objective("gated", plain).loss(x, y)[0]
    norms = [gate.winners.gates.sum(1).mean() for _, gate in gates_of(plain.model).pairs()]
    assert float(gap.detach()) == pytest.approx(0.1 * float(sum(norms).detach()), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_units_that_nobody_selected_do_not_move_neither_by_momentum_nor_by_weight_decay(optimizer):
    train = TrainConfig(batch_size=8, momentum=0.9, weight_decay=0.1, optimizer=optimizer)
    task = task_of(0.25, train, share="batch")
    objective = make_objective("gated", task)
    state = None
    for _ in range(3):
        before = {group: rows_of(task, group) for group in WIDTHS}
        state = one_step(task, objective, state)
        for group in WIDTHS:
            losers, after = losers_of(task, group), rows_of(task, group)
            assert losers.any()
            for key, rows in after.items():
                assert torch.equal(rows[losers], before[group][key][losers]), key
                assert (rows[~losers] != before[group][key][~losers]).any(), key


def test_what_the_optimiser_remembers_of_unselected_units_stays_too():
    task = task_of(0.25, TrainConfig(batch_size=8, weight_decay=0.1), share="batch")
    objective = make_objective("gated", task)
    optimizer = one_step(task, objective)
    weight = task.model.blocks[2].conv.weight
    buffer = optimizer.state[weight]["momentum_buffer"]
    assert not buffer[losers_of(task, "stage3")].any(), "the first step remembers nothing of them"
    buffer.fill_(1.0)
    one_step(task, objective, optimizer)
    assert (buffer[losers_of(task, "stage3")] == 1.0).all()


def test_without_the_mask_weight_decay_moves_everything():
    task = task_of(0.25, TrainConfig(batch_size=8, weight_decay=0.1), share="batch", **{"optimizer-mask": False})
    before = rows_of(task, "stage3")
    one_step(task, make_objective("gated", task))
    losers = losers_of(task, "stage3")
    assert (rows_of(task, "stage3")["blocks.2.conv.weight0"][losers] != before["blocks.2.conv.weight0"][losers]).all()


def test_without_anything_that_moves_zero_gradients_the_mask_changes_nothing():
    train = TrainConfig(batch_size=8, momentum=0.0, weight_decay=0.0)
    tasks = [task_of(0.5, train, share="batch", **{"optimizer-mask": flag}) for flag in (True, False)]
    for task in tasks:
        one_step(task, make_objective("gated", task))
    states = [task.model.state_dict() for task in tasks]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", ["gated+proximal", "gated+variates"])
def test_corrections_do_not_move_unselected_units(name):
    task = task_of(0.25, TrainConfig(batch_size=8, weight_decay=0.0), share="batch", mu=1.0)
    task = replace(task, companions={"variate:blocks.2.conv.weight": torch.ones_like(task.model.blocks[2].conv.weight)})
    before = rows_of(task, "stage3")
    one_step(task, make_objective(name, task))
    losers, after = losers_of(task, "stage3"), rows_of(task, "stage3")
    assert torch.equal(after["blocks.2.conv.weight0"][losers], before["blocks.2.conv.weight0"][losers])


def trained(task: Task, name: str = "gated") -> tuple[Objective, Any]:
    objective = make_objective(name, task)
    fitted = fit(task, objective, task.examples)
    return objective, objective.finish(fitted.num_steps)


def test_the_salient_part_goes_back_with_its_bitmap():
    task = task_of(share="group", **{"upload-density": 0.25, "num-groups": 2})
    _, findings = trained(task)
    spec = findings.narrowed
    assert {name: len(units) for name, units in spec.units.items()} == {"stage2": 16, "stage3": 32}
    expected = extract(task.model.state_dict(), task.layout, spec)
    assert findings.state.keys() == expected.keys()
    assert all(torch.equal(findings.state[key], tensor) for key, tensor in expected.items())
    check_bitmap(findings.companions[BITMAP], task.layout, spec)
    salience = findings.companions[SALIENCE].split(list(WIDTHS.values()))
    for name, scores in zip(WIDTHS, salience, strict=True):
        sent = list(spec.units[name])
        assert scores[sent].min() >= scores[[u for u in range(WIDTHS[name]) if u not in sent]].max()


def test_everything_goes_back_at_upload_density_1():
    _, findings = trained(task_of(share="batch"))
    assert findings.narrowed is None
    assert BITMAP not in findings.companions


def test_work_is_counted_from_what_was_executed():
    """24 images, forward and backward: whole layers as they are, gated ones by the share of their winners."""
    task = task_of(0.5, share="batch", **{"num-groups": 2})
    products = {p.key: p.train_macs for p in trace_ops(copy.deepcopy(task.model), torch.zeros(1, 1, 8, 8)).products}
    _, findings = trained(task)
    ratio = {"blocks.1.conv.weight": 0.5, "blocks.2.conv.weight": 0.25, "heads.0.linear.weight": 0.5}
    assert findings.train_macs == pytest.approx(24 * sum(macs * ratio.get(key, 1) for key, macs in products.items()))
    _, whole = trained(task_of(0.5, share="batch", compact=False))
    assert whole.train_macs == pytest.approx(24 * sum(products.values()))


def test_personal_gates_stay_on_the_client_and_are_found_again():
    first = task_of(share="batch", personal=True)
    _, findings = trained(first)
    own = {PREFIX + name: tensor for name, tensor in findings.memory["gates"].items()}
    assert not own.keys() & findings.state.keys()
    assert own.keys() == {f"gates.{group}.{part}" for group in WIDTHS for part in ("weight", "bias")}
    later = task_of(share="batch", personal=True, memory=dict(findings.memory))
    for gate in later.model.gates.values():  # the server sends none
        gate.weight = torch.nn.Parameter(torch.empty_like(gate.weight, device="meta"))
        gate.bias = torch.nn.Parameter(torch.empty_like(gate.bias, device="meta"))
    make_objective("gated", later)
    assert torch.equal(later.model.gates["stage2"].weight, own["gates.stage2.weight"])


def test_a_client_without_the_gates_that_it_should_have_says_so():
    task = task_of(share="batch", personal=True)
    task.model.gates["stage2"].weight = torch.nn.Parameter(torch.empty(64, 32, device="meta"))
    with pytest.raises(ObjectiveError, match="remembers none"):
        make_objective("gated", task)


def test_layers_are_measured_when_asked_at_the_density_that_is_aimed_at():
    task = task_of(1.0, share="batch", measure=True, density=0.5)
    _, findings = trained(task)
    assert findings.companions[PLAN].shape == (2, 2)
    assert (findings.companions[PLAN] > 0).all()
    assert int(task.model.gates["stage2"].num_winners) == 64, "the round itself is trained as the server asked"


def test_a_model_without_gates_is_refused():
    task = task_of()
    with pytest.raises(ValueError, match="build it with gates=True"):
        make_objective("gated", replace(task, model=get_model("cnn", 10, 1, 8)[0]))


@pytest.mark.parametrize(("upload", "compression"), [("salient", "none"), ("salient", "dgc"), ("changed", "none")])
@pytest.mark.parametrize("wants_delta", [False, True])
def test_a_whole_request_trains_and_answers(make_instruction, wants_delta, compression, upload):
    """Through the handler: narrowed values, differences, compressed differences."""
    torch.manual_seed(0)
    model, _ = get_model("cnn", 10, 1, 8, gates=True)
    gates_of(model).set_density(0.5)
    instruction: Instruction = make_instruction(
        objective="gated",
        settings={"share": "group", "upload-density": 0.5, "upload": upload},
        job={"model": ModelConfig("cnn", gates=True), "compression": CompressionConfig(compression)},
        state=model.state_dict(),
        wants_delta=wants_delta or compression == "dgc",
    )
    report = handle(instruction)
    assert report.narrowed is not None
    assert {n: len(u) for n, u in report.narrowed.units.items()} == {n: num_winners(w, 0.5) for n, w in WIDTHS.items()}
    assert report.train_macs > 0
    if compression == "none":
        shapes = dict(
            shapes_of(extract(model.state_dict(), get_model("cnn", 10, 1, 8, gates=True)[1], report.narrowed))
        )
        assert {key: tuple(tensor.shape) for key, tensor in report.state.items()} == shapes


def test_evaluation_predicts_through_the_gates(make_instruction):
    torch.manual_seed(0)
    model, _ = get_model("cnn", 10, 1, 8, gates=True)
    accuracies = set()
    for density in (1.0, 0.125):
        gates_of(model).set_density(density)
        report = handle(
            make_instruction(
                action="evaluate",
                objective="gated",
                settings={"share": "sample"},
                job={"model": ModelConfig("cnn", gates=True)},
                state=model.state_dict(),
            )
        )
        accuracies.add(report.metrics["loss"])
    assert len(accuracies) == 2


class Chain(nn.Module):
    """Layers whose names are those of the gates on them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [batch, 10]."""
        hidden = self.conv2(self.conv1(x).relu()).relu()
        return self.fc(hidden.mean((2, 3)))


def test_a_layer_called_like_its_gate_is_sent_also_where_gates_are_personal():
    groups = [
        Group("conv1", 16, (Axis("conv1.weight", 0), Axis("conv1.bias", 0), Axis("conv2.weight", 1))),
        Group("conv2", 16, (Axis("conv2.weight", 0), Axis("conv2.bias", 0), Axis("fc.weight", 1))),
    ]
    model, layout = attach(Chain(), Layout(tuple(groups)), (1, 8, 8))
    task = replace(task_of(share="batch", personal=True), model=model, layout=layout, full=copy.deepcopy(model))
    _, findings = trained(task)
    assert model.state_dict().keys() - findings.state.keys() == {"gates.conv2.weight", "gates.conv2.bias"}


@pytest.mark.parametrize("share", ["batch", "group"])
def test_statistics_of_its_own_are_those_of_the_network_that_is_tested_winners_shared_alike(share, make_instruction):
    torch.manual_seed(0)
    model, _ = get_model("cnn", 10, 1, 8, gates=True)
    gates_of(model).set_density(0.125)
    instruction = make_instruction(
        action="evaluate",
        objective="gated",
        settings={"share": share, "own-statistics": True},
        job={"model": ModelConfig("cnn", gates=True)},
        state=copy.deepcopy(model.state_dict()),
    )
    found = handle(instruction).metrics
    gates_of(model).configure(share, compact=True)
    train, test = client_examples(instruction.job.data, 4, 0)
    reestimate_batch_norm(model, train)
    assert found["loss"] == pytest.approx(evaluate(model, test)["loss"], rel=1e-5)
    merged = handle(replace(instruction, settings={"share": share})).metrics
    assert merged["loss"] != pytest.approx(found["loss"], rel=1e-3)
