"""Changes that a client does not send: they wait, and go with those that follow (error feedback)."""

from __future__ import annotations

import torch
from torch import Tensor

from client_app.objectives.base import ObjectiveError, Task
from pruning.extract import mesh, selection, shapes_of
from pruning.merge import is_finite
from pruning.spec import SubModelSpec
from wire.message import State, state_bytes


class Unsent:
    """What a client that trains the whole model and sends a part of it has not sent yet.

    With x the weights that were received, y the trained ones and e what waits, ``a = e + y - x`` is due: units are sent
    as ``x + a``, and ``e+ = a`` in those that are not, 0 in those that are (Stich et al. 2018, arXiv 1809.07599,
    algorithm 1, by units instead of entries). An entry that two units share goes with both. Buffers do not wait, and
    what no unit owns always goes.

    Parameters
    ----------
    task : with the received weights in its model; ``Task.memory`` has what waits, of the last answer that was merged.
    """

    def __init__(self, task: Task) -> None:
        owned = {axis.key for group in task.layout.prunable for axis in group.axes}
        self._task = task
        self._start = {name: p.detach().clone() for name, p in task.model.named_parameters() if name in owned}
        self._waiting: State = task.memory.get("unsent", {})

    @property
    def kept_bytes(self) -> int:
        """Of the tensors that are kept through training."""
        return state_bytes(self._start)

    def add_to(self, trained: State) -> tuple[State, State]:
        """``x + a`` and ``a``, on the CPU as ``trained`` is; of what that lacks (own gates) nothing is due.

        Raises
        ------
        ObjectiveError
            If a change is not finite: it would wait for ever, unseen.
        """
        nothing = torch.zeros(())
        start = {name: tensor.cpu() for name, tensor in self._start.items()}
        due = {
            name: (trained[name] - x) + self._waiting.get(name, nothing) if name in trained else torch.zeros_like(x)
            for name, x in start.items()
        }
        for name, tensor in due.items():
            if not is_finite(tensor):
                raise ObjectiveError(f"gated: training made {name!r} NaN or infinite; lower the learning rate")
        return {name: start[name] + due[name] if name in start else y for name, y in trained.items()}, due

    def rest(self, due: State, sent: SubModelSpec) -> dict[str, Tensor]:
        """What waits of ``due`` after ``sent`` went; parameters of which nothing waits are missing."""
        places = selection(self._task.layout, sent, shapes_of(self._task.full.state_dict())).positions
        waiting = {name: tensor.clone() for name, tensor in due.items()}
        for name, tensor in waiting.items():
            tensor[mesh(places[name], tuple(tensor.shape))] = 0
        return {name: tensor for name, tensor in waiting.items() if tensor.any()}
