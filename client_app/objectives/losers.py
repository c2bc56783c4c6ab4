"""The optimiser's mask: units that nobody in a batch selected do not move, neither by momentum nor by weight decay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from client_app.objectives.base import Task
from pruning.gates import PREFIX, Gate, Gates, key_of
from wire.sgd import Optimizer


@dataclass(frozen=True)
class _Place:
    """Where a gate's units lie in one parameter: ``repeat`` positions each along ``dim``."""

    name: str
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
            axes = [axis for axis in task.layout.by_name[site.group].axes if axis.key in parameters]
            places = [_Place(axis.key, parameters[axis.key], axis.dim, axis.repeat) for axis in axes]
            self._places.append((gate, places))
        self._names = [f"{PREFIX}{key_of(site.group)}" for site, _ in gates.pairs()]
        self._seen: list[list[Tensor | None]] = []  # of every step, who was selected at every gate

    def step(self, optimizer: Optimizer) -> None:
        """Step, and put back what must not have moved."""
        kept: list[tuple[Tensor, int, Tensor, Tensor | None]] = []
        selected = [_selected(gate) for gate, _ in self._places]
        self._seen.append(selected)
        chosen = [
            (gate, places, (~mask).nonzero().flatten())
            for (gate, places), mask in zip(self._places, selected, strict=True)
            if mask is not None
        ]
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

    def steps_of(self) -> dict[str, Tensor]:
        """Parameter name -> steps that moved each of its entries, int64, one long where all positions are alike.

        An entry that lies on units of two gates moved where both were selected. Parameters of which every step moved
        everything are missing.
        """
        found: dict[str, list[tuple[int, int, Tensor]]] = {}  # name -> (axis, number of axes, moved [steps, size])
        for index, (name, (gate, places)) in enumerate(zip(self._names, self._places, strict=True)):
            masks = [step[index] for step in self._seen]
            if all(mask is None for mask in masks):
                continue
            everybody = torch.ones_like(gate.units, dtype=torch.bool)
            # sums of float32 are exact up to 2 ** 24 steps
            moved = torch.stack([everybody if mask is None else mask for mask in masks]).float()
            for place in places:
                entry = (place.dim, place.parameter.dim(), moved.repeat_interleave(place.repeat, 1))
                found.setdefault(place.name, []).append(entry)
            units = torch.ones(len(moved), len(gate.bias), device=moved.device).index_copy(1, gate.units, moved)
            found[f"{name}.weight"], found[f"{name}.bias"] = [(0, 2, units)], [(0, 1, units)]
        return {name: _count(parts) for name, parts in found.items()}


def _count(parts: list[tuple[int, int, Tensor]]) -> Tensor:
    """Steps in which all gates of an entry selected it; ``parts`` as in ``Losers.steps_of``."""
    (dim, num_dims, moved), *others = parts
    if not others:
        shape = [1] * num_dims
        shape[dim] = moved.shape[1]
        return moved.sum(0).long().view(shape)
    ((other, _, theirs),) = others
    shape = [1] * num_dims
    shape[dim], shape[other] = moved.shape[1], theirs.shape[1]
    pairs = moved.T @ theirs
    return (pairs if dim < other else pairs.T).long().view(shape)


def _selected(gate: Gate) -> Tensor | None:
    """Which held units anybody selected in the last pass, bool [H]; None if all of them."""
    if gate.winners is None or gate.winners.is_everybody:
        return None
    selected = gate.winners.union(len(gate.units))
    return None if bool(selected.all()) else selected


def _rows(gate: Gate, places: list[_Place], losers: Tensor) -> list[tuple[nn.Parameter, int, Tensor]]:
    """Every (parameter, axis, positions) that the losing units own; their predictors, which are whole, included."""
    owned = [(place.parameter, place.dim, place.positions(losers)) for place in places]
    units = gate.units[losers]
    return [*owned, (gate.weight, 0, units), (gate.bias, 0, units)]


def _memories(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """What the optimiser remembers of every entry of a parameter."""
    state = optimizer.state.get(parameter, {})
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape]
