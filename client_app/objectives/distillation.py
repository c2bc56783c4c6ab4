"""Objectives of models with exits: all exits learn the labels, and may learn from each other.

Such a model answers with a list of logits, deepest last. With E exits, z_e the logits of exit e, T the temperature,
w the distillation weight, and D(t || s) = T^2 KL(softmax(t / T) || softmax(s / T)), the mean over the batch::

    exits            sum_e a_e CE(z_e, y)
    deepest-teaches  sum_e a_e [CE(z_e, y) + w D(stop(z_E) || z_e)], without D for e = E      (ScaleFL, Co-S2P)
    mutual           sum_e a_e [CE(z_e, y) + w / (E - 1) sum_{j != e} D(stop(z_j) || z_e)]    (DepthFL)

Settings, all optional: ``distillation-weight`` w (0: nobody is taught), ``temperature`` T, ``exit-weights``
(``equal``: a_e = 1; ``linear``: a_e = e / (1 + ... + E), so that deeper exits count more) and ``predict``
(``deepest`` exit, or the ``ensemble``: the mean of all exits' logits). A weight that ramps up is the server's to
compute, for it depends on the round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from client_app.objectives.base import Objective, ObjectiveError, Task, last_logits

Lesson = Callable[[Sequence[Tensor], int], Tensor | None]
"""(logits of all exits, which exit learns) -> what it learns from the others, a scalar; None if nothing."""


def exits(task: Task) -> Objective:
    """Every exit learns the labels; none learns from another."""
    return _with_exits(task, lambda logits, learner: None)


def deepest_teaches(task: Task) -> Objective:
    """The deepest exit that a client holds teaches its shallower ones."""
    temperature = _number(task, "temperature", 3.0)

    def lesson(logits: Sequence[Tensor], learner: int) -> Tensor | None:
        return None if learner == len(logits) - 1 else divergence(logits[-1], logits[learner], temperature)

    return _with_exits(task, lesson)


def mutual(task: Task) -> Objective:
    """Every exit learns from every other, deeper or not (DepthFL)."""
    temperature = _number(task, "temperature", 1.0)

    def lesson(logits: Sequence[Tensor], learner: int) -> Tensor | None:
        others = [divergence(z, logits[learner], temperature) for j, z in enumerate(logits) if j != learner]
        return torch.stack(others).mean() if others else None

    return _with_exits(task, lesson)


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch (Hinton et al. 2015).

    Logits are [batch, num_classes]; the teacher gets no gradient. The factor keeps gradients as large as at T = 1.
    """
    target = functional.softmax(teacher.detach() / temperature, dim=1)
    return temperature**2 * functional.kl_div(
        functional.log_softmax(student / temperature, dim=1), target, reduction="batchmean"
    )


def exit_logits(output: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """Logits of all exits, deepest last.

    Raises
    ------
    ObjectiveError
        If the model has no exits.
    """
    if isinstance(output, Tensor):
        raise ObjectiveError("objective: the model has one output, expected a list of exits; set model.exits=true")
    return output


def ensemble(output: Tensor | Sequence[Tensor]) -> Tensor:
    """Mean of all exits' logits [batch, num_classes] (DepthFL's prediction)."""
    return torch.stack(list(exit_logits(output))).mean(0)


def predict_with(name: str) -> Callable[[Tensor | Sequence[Tensor]], Tensor]:
    """What a model with exits predicts with: its ``deepest`` exit or the ``ensemble`` of all.

    Raises
    ------
    ObjectiveError
        For any other name.
    """
    if name not in ("deepest", "ensemble"):
        raise ObjectiveError(f"objective: predict: got {name!r}, expected 'deepest' or 'ensemble'")
    return ensemble if name == "ensemble" else last_logits


def exit_weights(kind: str, num_exits: int) -> list[float]:
    """a_e of every exit: ``equal`` or ``linear``.

    Raises
    ------
    ObjectiveError
        For any other kind.
    """
    if kind == "equal":
        return [1.0] * num_exits
    if kind == "linear":
        return [2 * e / (num_exits * (num_exits + 1)) for e in range(1, num_exits + 1)]
    raise ObjectiveError(f"objective: exit-weights: got {kind!r}, expected 'equal' or 'linear'")


def _with_exits(task: Task, lesson: Lesson) -> Objective:
    weight = _number(task, "distillation-weight", 1.0, may_be_zero=True)
    kind, predict = str(task.settings.get("exit-weights", "equal")), str(task.settings.get("predict", "deepest"))
    exit_weights(kind, 1)
    combine = predict_with(predict)
    smoothing = task.train.label_smoothing

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = exit_logits(task.model(x))
        terms = []
        for index, share in enumerate(exit_weights(kind, len(logits))):
            term = functional.cross_entropy(logits[index], y, label_smoothing=smoothing)
            taught = lesson(logits, index) if weight else None
            terms.append(share * (term if taught is None else term + weight * taught))
        return torch.stack(terms).sum(), combine(logits)

    return Objective(task.model, loss, predict=lambda x: combine(task.model(x)))


def _number(task: Task, name: str, default: float, may_be_zero: bool = False) -> float:
    value = float(task.settings.get(name, default))
    if value > 0 or (may_be_zero and value == 0):
        return value
    raise ObjectiveError(f"objective: {name}: got {value}, expected a number {'>=' if may_be_zero else '>'} 0")
