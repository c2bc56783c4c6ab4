"""Ordered dropout: the prefix drawn is trained and nothing else; what it costs is counted to the last MAC."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.nn import functional

from client_app.data import client_examples
from client_app.handler import handle
from client_app.objectives import ObjectiveError, Task, make_objective
from client_app.objectives.distillation import divergence
from pruning.cost import measure_costs
from pruning.extract import embed, extract, resize
from pruning.groups import Layout
from pruning.select import select_prefix
from pruning.spec import FULL, SubModelSpec
from wire.message import DataConfig, TrainConfig
from wire.spec import spec_to_json
from zoo import get_model

X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 4, 5])


def prefix(layout: Layout, ratio: float) -> SubModelSpec:
    return select_prefix(layout, {group.name: int(ratio * group.size) for group in layout.prunable})


def task_of(ratios: list[float], model: str = "cnn", **chosen: Any) -> tuple[Task, list[SubModelSpec]]:
    """A task on the widest of ``ratios``, and all of them as specs."""
    torch.manual_seed(0)
    full, layout = get_model(model, 10, 1, 8, width=0.25)
    with torch.device("meta"):
        blueprint, _ = get_model(model, 10, 1, 8, width=0.25)
    specs = [prefix(layout, ratio) for ratio in ratios]
    mine = resize(full, layout, specs[0]).train()
    named = {key.replace("_", "-"): value for key, value in chosen.items()}
    named["levels"] = json.dumps([spec_to_json(spec) for spec in specs])
    examples, _ = client_examples(DataConfig(max_train=100), 4, 0)
    generator = torch.Generator().manual_seed(3)
    counts = torch.ones(10, dtype=torch.int64)
    task = Task(mine, layout, TrainConfig(), named, counts, specs[0], blueprint, examples=examples, generator=generator)
    return task, specs


def drawn_after(task: Task, num_levels: int) -> int:
    """The level that the next batch will draw."""
    ahead = torch.Generator()
    ahead.set_state(task.generator.get_state())
    return int(torch.randint(num_levels, (1,), generator=ahead))


def alone(task: Task, spec: SubModelSpec) -> torch.nn.Module:
    """The sub-model of ``spec`` as a network of its own, with the task's weights."""
    whole, layout = get_model("cnn", 10, 1, 8, width=0.25)
    state, _ = embed(task.model.state_dict(), layout, task.spec, whole.state_dict())
    small = resize(whole, layout, spec).train()
    small.load_state_dict(extract(state, layout, spec))
    return small


def in_places_of(task: Task, spec: SubModelSpec, key: str, gradient: torch.Tensor) -> torch.Tensor:
    """A gradient of a sub-model at its places in the full model, zero elsewhere."""
    shapes = {name: torch.zeros(tensor.shape) for name, tensor in task.full.state_dict().items()}
    groups = tuple(
        type(g)(g.name, g.size, axes, g.exact)
        for g in task.layout.groups
        if (axes := tuple(axis for axis in g.axes if axis.key == key))
    )
    named = {group.name for group in groups}
    kept = SubModelSpec(tuple(item for item in spec.kept if item[0] in named))
    return embed({key: gradient}, Layout(groups), kept, {key: shapes[key]})[0][key]


@pytest.mark.parametrize("ratios", [[1.0, 0.5, 0.25], [0.5, 0.25]])
def test_a_batch_trains_exactly_the_prefix_drawn(ratios):
    """Every gradient equals that of the prefix as a network of its own, and is zero everywhere else."""
    task, specs = task_of(ratios)
    objective = make_objective("ordered-dropout", task)
    seen = set()
    for _ in range(12):
        level = drawn_after(task, len(specs))
        seen.add(level)
        task.model.zero_grad()
        value, logits = objective.loss(X, Y)
        value.backward()
        own = alone(task, specs[level])
        expected = functional.cross_entropy(own(X), Y)
        expected.backward()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        assert logits.shape == (6, 10)
        for (key, mine), theirs in zip(task.model.named_parameters(), own.parameters(), strict=True):
            gradient = torch.zeros_like(mine) if mine.grad is None else mine.grad
            assert theirs.grad is not None
            torch.testing.assert_close(
                in_places_of(task, task.spec, key, gradient),
                in_places_of(task, specs[level], key, theirs.grad),
                rtol=1e-4,
                atol=1e-6,
            )
    assert seen == set(range(len(specs))), "not every width was drawn: the test shows less than it says"


def test_every_width_is_drawn_about_equally_often():
    task, specs = task_of([1.0, 0.75, 0.5, 0.25], "mlp")
    objective = make_objective("ordered-dropout", task)
    with torch.no_grad():
        for _ in range(400):
            objective.loss(X, Y)
    macs = [whole_cost(task, spec) for spec in specs]
    total = objective.finish(400).train_macs
    assert total is not None
    assert total / 6 / 400 == pytest.approx(sum(macs) / 4, rel=0.1)


def whole_cost(task: Task, spec: SubModelSpec) -> int:
    """Training MACs per example, traced on the sub-model itself."""
    small = resize(task.full, task.layout, spec)
    return measure_costs(small, Layout(()), torch.empty(2, 1, 8, 8, device="meta")).of(FULL).train_macs


@pytest.mark.parametrize("teaches", [False, True])
def test_macs_are_those_of_the_widths_drawn_to_the_last_one(teaches):
    task, specs = task_of([1.0, 0.5, 0.25], self_distillation=teaches)
    objective = make_objective("ordered-dropout", task)
    expected = 0
    for batch in (6, 6, 4, 6, 2, 6, 6):
        level = drawn_after(task, 3)
        expected += batch * whole_cost(task, specs[level])
        expected += batch * whole_cost(task, specs[0]) if teaches and level else 0
        objective.loss(X[:batch], Y[:batch])
    assert objective.finish(7).train_macs == expected


def test_self_distillation_trains_the_full_width_on_every_batch_and_lets_it_teach():
    task, specs = task_of([1.0, 0.5, 0.25], self_distillation=True, distillation_weight=0.7, temperature=2.0)
    objective = make_objective("ordered-dropout", task)
    taught = 0
    for _ in range(8):
        level = drawn_after(task, 3)
        widest, narrow = alone(task, specs[0])(X), alone(task, specs[level])(X)
        expected = functional.cross_entropy(widest, Y)
        if level:
            expected = expected + 0.3 * functional.cross_entropy(narrow, Y) + 0.7 * divergence(widest, narrow, 2.0)
            taught += 1
        value, logits = objective.loss(X, Y)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logits, widest)
    assert 0 < taught < 8


def test_narrow_passes_leave_running_statistics_alone():
    task, _ = task_of([1.0, 0.5])
    objective = make_objective("ordered-dropout", task)
    moved = {0: 0, 1: 0}
    for _ in range(8):
        level = drawn_after(task, 2)
        before = {key: tensor.clone() for key, tensor in task.model.named_buffers()}
        objective.loss(X, Y)
        has_moved = any(not torch.equal(tensor, before[key]) for key, tensor in task.model.named_buffers())
        assert has_moved == (level == 0)
        moved[level] += 1
    assert all(moved.values())


def test_a_client_that_holds_only_the_narrowest_width_trains_it_plainly(make_instruction):
    full, layout = get_model("cnn", 10, 1, 8)
    spec = prefix(layout, 0.25)
    state = extract(make_instruction().state, layout, spec)
    levels = {"levels": json.dumps([spec_to_json(spec)])}
    plain = handle(make_instruction(spec=spec, state=state))
    dropped = handle(make_instruction(spec=spec, state=state, objective="ordered-dropout", settings=levels))
    assert dropped.train_macs == plain.train_macs
    assert all(torch.equal(dropped.state[key], plain.state[key]) for key in plain.state)
    assert full is not None


def test_memory_is_that_of_the_widest_pass_whatever_comes_first(make_instruction):
    _, layout = get_model("cnn", 10, 1, 8)
    levels = {"levels": json.dumps([spec_to_json(prefix(layout, r)) for r in (1.0, 0.5, 0.25)])}
    plain = handle(make_instruction()).peak_memory_bytes
    train = {"local_epochs": 4}
    for dispatch in range(4):  # each draws other widths first
        report = handle(make_instruction(objective="ordered-dropout", settings=levels, train=train, dispatch=dispatch))
        assert report.peak_memory_bytes == plain


def test_levels_that_are_not_part_of_the_sub_model_are_refused():
    task, specs = task_of([0.5, 0.25])
    wide = SubModelSpec()
    for levels, message in (
        ([wide, specs[1]], "the first must be the sub-model that was sent"),
        ([specs[0], wide], "number 1 is not part"),
        ([], "the first must be"),
    ):
        settings = {"levels": json.dumps([spec_to_json(spec) for spec in levels])}
        with pytest.raises(ObjectiveError, match=message):
            make_objective("ordered-dropout", Task(**{**vars(task), "settings": settings}))
