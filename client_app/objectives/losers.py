"""The optimiser's mask: units that nobody in a batch selected do not move, neither by momentum nor by weight decay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from client_app.objectives.base import Task
from pruning.gates import Gate, Gates
from wire.sgd import Optimizer


@dataclass(frozen=True)
class _Place:
    """Where a gate's units lie in one parameter: ``repeat`` positions each along ``dim``."""

    parameter: nn.Parameter
    dim: int
    repeat: int

    def positions(self, units: Tensor) -> Tensor:
        if self.repeat == 1:
            return units
        return (units[:, None] * self.repeat + torch.arange(self.repeat, device=units.device)).reshape(-1)


class Losers:
    """Keeps the rows and columns of unselected units, and the optimiser's memory of them, through a step."""

    def __init__(self, task: Task, gates: Gates) -> None:
        parameters = dict(task.model.named_parameters())
        self._places: list[tuple[Gate, list[_Place]]] = []
        for site, gate in gates.pairs():
            axes = task.layout.by_name[site.group].axes
            places = [_Place(parameters[axis.key], axis.dim, axis.repeat) for axis in axes if axis.key in parameters]
            self._places.append((gate, places))

    def step(self, optimizer: Optimizer) -> None:
        """Step, and put back what must not have moved."""
        kept: list[tuple[Tensor, int, Tensor, Tensor | None]] = []
        chosen = [(gate, places, losers) for gate, places in self._places if (losers := _losers(gate)) is not None]
        for gate, places, losers in chosen:
            for parameter, dim, positions in _rows(gate, places, losers):
                for tensor in (parameter.data, *_memories(optimizer, parameter)):
                    kept.append((tensor, dim, positions, tensor.index_select(dim, positions)))
        known = {tensor.data_ptr() for tensor, *_ in kept}
        optimizer.step()
        for tensor, dim, positions, values in kept:
            assert values is not None
            tensor.index_copy_(dim, positions, values)
        for gate, places, losers in chosen:
            for parameter, dim, positions in _rows(gate, places, losers):
                for tensor in _memories(optimizer, parameter):
                    if tensor.data_ptr() not in known:  # made by this step: it remembers nothing of them
                        tensor.index_fill_(dim, positions, 0.0)


def _losers(gate: Gate) -> Tensor | None:
    """Held units that nobody selected in the last pass, int64; None if there is none."""
    if gate.winners is None or gate.winners.is_everybody:
        return None
    losers = (~gate.winners.union(len(gate.units))).nonzero().flatten()
    return losers if len(losers) else None


def _rows(gate: Gate, places: list[_Place], losers: Tensor) -> list[tuple[nn.Parameter, int, Tensor]]:
    """Every (parameter, axis, positions) that the losing units own; their predictors, which are whole, included."""
    owned = [(place.parameter, place.dim, place.positions(losers)) for place in places]
    units = gate.units[losers]
    return [*owned, (gate.weight, 0, units), (gate.bias, 0, units)]


def _memories(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """What the optimiser remembers of every entry of a parameter."""
    state = optimizer.state.get(parameter, {})
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape]
