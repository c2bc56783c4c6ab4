"""What a client minimises, against formulas written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from client_app import objectives
from client_app.objectives import Loss, Objective, ObjectiveError, Task, make_objective
from client_app.objectives.distillation import divergence
from client_app.objectives.sparsity import sparsity_penalty
from pruning.extract import embed, extract, resize
from pruning.groups import Layout
from pruning.spec import FULL, SubModelSpec
from wire.message import TrainConfig
from wire.spec import spec_to_json
from zoo import get_model


def task_of(train: TrainConfig | None = None, settings: dict | None = None, counts: list[int] | None = None) -> Task:
    torch.manual_seed(0)
    model, layout = get_model("cnn", 10, 1, 8, width=0.25)
    return Task(
        model.train(), layout, train or TrainConfig(), settings or {}, torch.tensor(counts or [5] * 10), FULL, model
    )


def loss_of(task: Task, name: str = "cross-entropy") -> Loss:
    return make_objective(name, task).loss


BATCH = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3, 4, 5])


def test_cross_entropy_is_torchs():
    task = task_of(TrainConfig(label_smoothing=0.1))
    loss, logits = loss_of(task)(*BATCH)
    assert torch.equal(loss, functional.cross_entropy(logits, BATCH[1], label_smoothing=0.1))
    assert logits.shape == (6, 10)


def test_masked_logits_of_missing_classes_are_zero_and_get_no_gradient():
    counts = [3, 3, 3, 3, 3, 3, 0, 0, 0, 0]
    task = task_of(settings={"mask-missing-labels": True}, counts=counts)
    loss, logits = loss_of(task)(*BATCH)
    loss.backward()
    assert torch.equal(logits[:, 6:], torch.zeros(6, 4))
    gradient = dict(task.model.named_parameters())["heads.0.linear.weight"].grad
    assert torch.equal(gradient[6:], torch.zeros_like(gradient[6:]))
    assert (gradient[:6] != 0).any(1).all()


def test_nothing_is_masked_for_a_client_that_has_all_classes_or_was_not_asked_to():
    plain = loss_of(task_of())(*BATCH)[0]
    masked = loss_of(task_of(settings={"mask-missing-labels": True}))(*BATCH)[0]
    not_asked = loss_of(task_of(counts=[5] * 6 + [0] * 4))(*BATCH)[0]
    assert torch.equal(plain, masked)
    assert torch.equal(plain, not_asked)


def test_l1_sparsity_adds_the_absolute_scales_of_heads_and_neurons():
    model, layout = get_model("vit_micro", 10, 1, 8, scales=True)
    task = Task(model, layout, TrainConfig(sparsity=0.01), {}, torch.ones(10), FULL, model)
    assert float(sparsity_penalty(task)().detach()) == sum(group.size for group in layout.prunable)


def test_l1_sparsity_adds_the_absolute_batch_norm_scales():
    plain, sparse = task_of(), task_of(TrainConfig(sparsity=0.01))
    scales = [m.weight for m in sparse.model.modules() if isinstance(m, nn.BatchNorm2d)]
    for scale in scales:
        nn.init.uniform_(scale, -1, 1, generator=torch.Generator().manual_seed(2))
    plain.model.load_state_dict(sparse.model.state_dict())
    gap = (loss_of(sparse)(*BATCH)[0] - loss_of(plain)(*BATCH)[0]).detach()
    assert float(gap) == pytest.approx(0.01 * sum(float(s.detach().abs().sum()) for s in scales), rel=1e-4)


def test_group_lasso_adds_the_norms_of_all_units():
    plain, sparse = task_of(), task_of(TrainConfig(sparsity=0.01, sparsity_norm="group-lasso"))
    gap = (loss_of(sparse)(*BATCH)[0] - loss_of(plain)(*BATCH)[0]).detach()
    filters = [m.weight for m in sparse.model.modules() if isinstance(m, nn.Conv2d)]
    expected = 0.01 * sum(float(unit.detach().norm()) for weight in filters for unit in weight)
    assert float(gap) == pytest.approx(expected, rel=1e-4)


def test_group_lasso_takes_a_head_for_one_unit():
    torch.manual_seed(0)
    model, layout = get_model("vit_micro", 10, 1, 8)
    train = TrainConfig(sparsity=0.01, sparsity_norm="group-lasso")
    found = float(sparsity_penalty(Task(model, layout, train, {}, torch.ones(10), FULL, model))().detach())
    expected = 0.0
    for block in model.blocks:
        parts = block.attention.qkv.weight.detach().chunk(3)  # queries, keys and values of four heads
        expected += sum(float(head.norm()) for part in parts for head in part.chunk(4))
        expected += float(block.fc1.weight.detach().norm(dim=1).sum())
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("norm", ["l1", "group-lasso"])
def test_training_under_a_regulariser_shrinks_what_it_punishes(norm):
    def punished(sparsity: float) -> float:
        task = task_of(TrainConfig(sparsity=sparsity, sparsity_norm=norm))
        loss = loss_of(task)
        optimizer = torch.optim.SGD(task.model.parameters(), lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            loss(*BATCH)[0].backward()
            optimizer.step()
        kind = nn.BatchNorm2d if norm == "l1" else nn.Conv2d
        return sum(float(m.weight.detach().abs().sum()) for m in task.model.modules() if isinstance(m, kind))

    assert punished(0.1) < 0.95 * punished(0.0)


def test_an_unknown_objective_names_the_nearest():
    with pytest.raises(ObjectiveError, match=r"'cross-entrophy' is not known here.*did you mean 'cross-entropy'\?"):
        loss_of(task_of(), "cross-entrophy")


def nested_task(kept: dict[str, list[int]]) -> tuple[Task, SubModelSpec]:
    core = SubModelSpec.of(kept)
    with torch.device("meta"):
        blueprint, _ = get_model("cnn", 10, 1, 8, width=0.25)
    task = task_of(settings={"core": spec_to_json(core), "temperature": 2.0})
    return replace(task, full=blueprint), core


@pytest.mark.parametrize("units", [[0, 1, 2], [1, 4, 6]], ids=["contiguous", "scattered"])
def test_nested_adds_the_cores_loss_and_its_distance_to_the_wide_models_logits(units):
    task, core = nested_task({"stage1": units})
    loss, logits = loss_of(task, "nested")(*BATCH)
    small = resize(task.model, task.layout, core).train()
    small.load_state_dict(extract(task.model.state_dict(), task.layout, core))
    core_logits = small(BATCH[0])
    teacher, student = functional.softmax(logits / 2, 1), functional.log_softmax(core_logits / 2, 1)
    distance = (teacher * (teacher.log() - student)).sum(1).mean()
    expected = functional.cross_entropy(logits, BATCH[1]) + functional.cross_entropy(core_logits, BATCH[1])
    torch.testing.assert_close(loss, expected + 4 * distance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("units", [[0, 1, 2], [1, 4, 6]], ids=["contiguous", "scattered"])
def test_the_cores_loss_reaches_the_cores_weights_and_no_others(units):
    """Gradients against those of a physically small core of its own."""
    task, core = nested_task({"stage1": units})
    plain = task_of()
    loss_of(plain)(*BATCH)[0].backward()
    loss, logits = loss_of(task, "nested")(*BATCH)
    loss.backward()
    small = resize(task_of().model, task.layout, core).train()
    core_logits = small(BATCH[0])
    (functional.cross_entropy(core_logits, BATCH[1]) + divergence(logits, core_logits, 2.0)).backward()
    start = {key: parameter.grad for key, parameter in plain.model.named_parameters()}
    added, _ = embed(
        {key: parameter.grad for key, parameter in small.named_parameters()},
        Layout(tuple(replace(g, axes=tuple(a for a in g.axes if a.key in start)) for g in task.layout.groups)),
        core,
        {key: torch.zeros_like(tensor) for key, tensor in start.items()},
    )
    for key, parameter in task.model.named_parameters():
        torch.testing.assert_close(parameter.grad, start[key] + added[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("units", [[0, 1, 2], [1, 4, 6]], ids=["contiguous", "scattered"])
def test_the_cores_pass_leaves_the_running_statistics_of_the_sub_model_alone(units):
    task, _ = nested_task({"stage1": units})
    alone = task_of()
    loss_of(task, "nested")(*BATCH)
    loss_of(alone)(*BATCH)
    theirs = alone.model.state_dict()
    for key, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, theirs[key]), key


def test_nested_reports_the_core_as_extra_work_and_a_client_that_holds_just_the_core_has_none():
    task, core = nested_task({"stage1": [0, 1]})
    (extra,) = make_objective("nested", task).extra
    assert sum(p.numel() for p in extra.parameters()) < sum(p.numel() for p in task.model.parameters())
    assert make_objective("nested", replace(task, spec=core)).extra == ()


def test_corrections_wrap_the_base_in_the_order_of_the_name(monkeypatch):
    def plus(amount: float):
        def correct(task: Task, inner: Objective) -> Objective:
            return replace(inner, loss=lambda x, y: ((inner.loss(x, y)[0] + amount) * 2, inner.loss(x, y)[1]))

        return correct

    monkeypatch.setattr(objectives, "CORRECTIONS", {"one": plus(1.0), "ten": plus(10.0)})
    bare = float(loss_of(task_of())(*BATCH)[0].detach())
    both = float(loss_of(task_of(), "cross-entropy+one+ten")(*BATCH)[0].detach())
    assert both == pytest.approx(((bare + 1) * 2 + 10) * 2)


def test_an_unknown_correction_names_the_nearest():
    with pytest.raises(ObjectiveError, match=r"correction 'sparce' is not known here.*did you mean 'sparse'\?"):
        loss_of(task_of(), "cross-entropy+sparce")


def test_a_core_that_reaches_beyond_the_sub_model_is_refused():
    task, _ = nested_task({"stage1": [0, 5]})
    with pytest.raises(ObjectiveError, match="core: it is not part of the sub-model"):
        make_objective("nested", replace(task, spec=SubModelSpec.of({"stage1": [0, 1, 2]})))
