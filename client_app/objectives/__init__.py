"""What a client minimises, by name. Strategies ask for an objective; objectives know no strategy.

A name is a base and any number of corrections, ``cross-entropy+proximal``: the base makes the loss, each correction
wraps what stands before it. One file per family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from client_app.objectives.base import CostOf, Findings, Fitted, Loss, Objective, ObjectiveError, Task, last_logits
from client_app.objectives.cross_entropy import cross_entropy
from client_app.objectives.distillation import deepest_teaches, exits, mutual
from client_app.objectives.drift import proximal, variates
from client_app.objectives.exit_choice import exit_choice
from client_app.objectives.gated import gated
from client_app.objectives.magnitude import magnitude
from client_app.objectives.masks import mask_learning, mask_peak_bytes
from client_app.objectives.nested import nested
from client_app.objectives.ordered_dropout import ordered_dropout
from client_app.objectives.sparsity import sparse
from client_app.objectives.split import contrastive, contrastive_peak_bytes, split, split_peak_bytes
from pruning.capability import Training
from pruning.spec import FULL
from wire.flat import nearest

Kind = TypeVar("Kind")

OBJECTIVES: Mapping[str, Callable[[Task], Objective]] = {
    "contrastive": contrastive,
    "cross-entropy": cross_entropy,
    "deepest-teaches": deepest_teaches,
    "exits": exits,
    "gated": gated,
    "mask-learning": mask_learning,
    "mutual": mutual,
    "nested": nested,
    "ordered-dropout": ordered_dropout,
    "split": split,
}
"""Every base by the name that instructions use."""

CORRECTIONS: Mapping[str, Callable[[Task, Objective], Objective]] = {
    "magnitude": magnitude,
    "proximal": proximal,
    "exit-choice": exit_choice,
    "sparse": sparse,
    "variates": variates,
}
"""Every correction by the name that instructions use; ``train.sparsity`` adds ``sparse`` by itself."""

PEAKS: Mapping[str, Callable[[Task, Training, CostOf], int]] = {
    "contrastive": contrastive_peak_bytes,
    "mask-learning": mask_peak_bytes,
    "split": split_peak_bytes,
}
"""Base -> estimated peak of its training, bytes, where it trains something else than the task's model, or in phases."""


def make_objective(name: str, task: Task) -> Objective:
    """The named objective.

    Raises
    ------
    ObjectiveError
        If there is no base or correction of that name.
    """
    base, *corrections = name.split("+")
    if task.train.sparsity:
        corrections.append("sparse")
    objective = _find(base, OBJECTIVES, "objective")(task)
    for correction in corrections:
        objective = _find(correction, CORRECTIONS, "correction")(task, objective)
    return objective


def needed_bytes(name: str, task: Task, training: Training, cost_of: CostOf) -> int:
    """Estimated peak of training with the named objective's base, bytes.

    Parameters
    ----------
    name : base and corrections, which need little beside it.
    task : of one request.
    training : the largest batch, and what the optimiser keeps.
    cost_of : what the sub-model of a spec costs.
    """
    if (peak := PEAKS.get(name.split("+")[0])) is not None:
        return peak(task, training, cost_of)
    return cost_of(task.spec).of(FULL).peak_memory_bytes(training.batch_size, training.optimizer_slots)


def _find(name: str, known: Mapping[str, Kind], what: str) -> Kind:
    if name not in known:
        raise ObjectiveError(
            f"objective: {what} {name!r} is not known here; this client has {', '.join(known)}{nearest(name, known)}"
        )
    return known[name]


__all__ = [
    "CORRECTIONS",
    "OBJECTIVES",
    "CostOf",
    "Findings",
    "Fitted",
    "Loss",
    "Objective",
    "ObjectiveError",
    "Task",
    "last_logits",
    "make_objective",
    "needed_bytes",
]
