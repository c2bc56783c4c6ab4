"""Changes that a client does not send: they wait, and go with those that follow (error feedback)."""

from __future__ import annotations

import torch
from torch import Tensor

from client_app.objectives.base import Task
from pruning.extract import mesh, selection, shapes_of
from pruning.importance import UnitScores, score_units
from pruning.spec import SubModelSpec
from wire.message import State, state_bytes


class Unsent:
    """What became of the units of a client that trains the whole model and sends a part of it.

    With x the weights that were received, y the trained ones and e what waits, ``a = e + y - x`` is due: units are sent
    as ``x + a``, and ``e+ = a`` in those that are not, 0 in those that are (Stich et al. 2018, arXiv 1809.07599,
    algorithm 1, by units instead of entries). Buffers, and what no unit owns, are sent as they are.

    Parameters
    ----------
    task : with the received weights in its model; ``Task.memory`` has what waits, of the last answer that was merged.
    """

    def __init__(self, task: Task) -> None:
        owned = {axis.key for group in task.layout.prunable for axis in group.axes}
        self._task = task
        self._start = {name: p.detach().clone() for name, p in task.model.named_parameters() if name in owned}
        self._waiting: State = task.memory.get("unsent", {})
        self._due: State = {}

    @property
    def kept_bytes(self) -> int:
        """Of the tensors that are kept through training."""
        return state_bytes(self._start)

    def add_to(self, trained: State) -> State:
        """``x + a``, shapes of the full model, on the CPU as ``trained`` is; what it lacks (own gates) is never due."""
        nothing = torch.zeros(())
        start = {name: tensor.cpu() for name, tensor in self._start.items()}
        self._due = {
            name: self._waiting.get(name, nothing) + trained[name] - x if name in trained else torch.zeros_like(x)
            for name, x in start.items()
        }
        return {name: start[name] + self._due[name] if name in start else y for name, y in trained.items()}

    def scores(self) -> UnitScores:
        """How much is due of every unit: the norm of its ``a``, after ``add_to``."""
        return score_units(self._due, self._task.layout, "l2", normalize=False)

    def rest(self, sent: SubModelSpec) -> dict[str, Tensor]:
        """What waits after ``sent`` went; parameters of which nothing waits are missing."""
        places = selection(self._task.layout, sent, shapes_of(self._task.full.state_dict())).positions
        waiting = {name: due.clone() for name, due in self._due.items()}
        for name, tensor in waiting.items():
            tensor[mesh(places[name], tuple(tensor.shape))] = 0
        return {name: tensor for name, tensor in waiting.items() if tensor.any()}
