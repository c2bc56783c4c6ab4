"""What a client minimises, against formulas written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from client_app.objective import Loss, ObjectiveError, Task, make_objective
from pruning.spec import FULL
from wire.message import TrainConfig
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
