"""What Co-S2P computes on the server: budgets, weights of answers, and who covers what nobody held."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from pruning.capability import (
    Capability,
    CapabilityError,
    Training,
    groups_within,
    solve_memory,
    solve_rate,
    widths_at,
)
from pruning.extract import is_statistic
from pruning.groups import Group, Layout
from pruning.spec import FULL, SubModelSpec
from strategies.levels import level_of
from strategies.setting import Setting
from wire.flat import ConfigError, refuse
from wire.message import State
from wire.training import optimizer_slots

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Budget:
    """What a device can spend: a rate in (0, 1], bytes of memory, or a share of the memory it has."""

    rate: float = 0.0
    memory_bytes: float = 0.0
    device_share: float = 0.0


def parse_budgets(text: str) -> tuple[Budget, ...]:
    """``"1,0.5"``, ``"2GiB,600MB"`` or ``"device:0.5"`` -> budgets, largest first.

    Raises
    ------
    ConfigError
        If a part is none of these, or rates and bytes are mixed.
    """
    found = []
    for part in text.split(","):
        number = re.fullmatch(r"\s*(device:)?([0-9]*\.?[0-9]+(?:[eE]-?[0-9]+)?)\s*([KMG]i?B)?\s*", part)
        value = float(number[2]) if number else 0.0
        if number and number[3] and not number[1] and value > 0:
            found.append(Budget(memory_bytes=value * UNITS[number[3].upper()]))
        elif number and not number[3] and 0 < value <= 1:
            found.append(Budget(device_share=value) if number[1] else Budget(rate=value))
        else:
            raise ConfigError(f"budgets: got {part!r}, expected rates in (0, 1], bytes such as 800MB, or device:SHARE")
    if len({(b.rate > 0, b.memory_bytes > 0) for b in found}) > 1 or (found[0].device_share and len(found) > 1):
        raise ConfigError(f"budgets: got {text!r}, expected only rates, only bytes, or one device:SHARE")
    return tuple(sorted(found, key=lambda b: (-b.rate, -b.memory_bytes)))


def budgets_of(text: str, setting: Setting, assignment: str) -> list[Budget]:
    """The budget of every client of a run."""
    budgets, num_clients = parse_budgets(text), setting.job.num_clients
    if budgets[0].device_share:
        refuse(
            setting.durations is None,
            f"cos2p.budgets={text} with fleet.name=none",
            "device:SHARE needs a simulated fleet; give rates or bytes",
        )
        assert setting.durations is not None
        devices = setting.durations.fleet.devices
        return [Budget(memory_bytes=budgets[0].device_share * device.memory_bytes) for device in devices]
    return [budgets[level_of(setting, assignment, len(budgets), pid, 1)] for pid in range(num_clients)]


def solve_budget(
    budget: Budget, setting: Setting, groups: Sequence[Group], preset: str, learns_masks: bool, least_depth: int = 0
) -> Capability:
    """Depth and width of one budget; a rate under ``fit`` is that share of the full model's training memory.

    Raises
    ------
    CapabilityError
        If it is too small.
    """
    train, cost = setting.job.train, setting.cost
    if budget.rate and preset == "paper":
        found = solve_rate(setting.layout, budget.rate)
        if found.depth >= least_depth:
            return found
        return Capability(least_depth, least_depth / len(setting.layout.blocks), budget.rate**2)
    training = Training(train.batch_size, optimizer_slots(train), learns_masks)
    memory = budget.memory_bytes
    if budget.rate:
        memory = budget.rate * cost.of(FULL).peak_memory_bytes(training.batch_size, training.optimizer_slots)
    way = "fit" if least_depth else preset
    return solve_memory(setting.layout, cost, groups, memory, training, preset=way, least_depth=least_depth)


def solve_budgets(
    budgets: Sequence[Budget], setting: Setting, groups: Sequence[Group], preset: str, learns_masks: bool
) -> list[Capability]:
    """Every client's depth and width.

    Raises
    ------
    ConfigError
        If a budget is too small for any sub-model, with the client.
    """
    found: dict[Budget, Capability] = {}
    for pid, budget in enumerate(budgets):
        try:
            found[budget] = found.get(budget) or solve_budget(budget, setting, groups, preset, learns_masks)
        except CapabilityError as error:
            raise ConfigError(f"config: cos2p.budgets: client {pid}: {error}") from error
    return [found[budget] for budget in budgets]


def full_depth_capabilities(
    budgets: Sequence[Budget], setting: Setting, groups: Sequence[Group], full_depth: int
) -> dict[int, Capability]:
    """Who could hold every block, at a smaller width, and how: those who rotate, and learn no mask in their turn."""
    found: dict[Budget, Capability] = {}
    for budget in set(budgets):
        with suppress(CapabilityError):
            found[budget] = solve_budget(budget, setting, groups, "paper", False, full_depth)
    return {pid: found[budget] for pid, budget in enumerate(budgets) if budget in found}


def l1_distance(first: State, second: State) -> float:
    """Sum of |first - second| over what is trained; BatchNorm's statistics are not, and have a scale of their own."""
    return sum(float((first[key] - second[key]).abs().sum()) for key in _trained(second))


def num_trained(state: State) -> int:
    """How many entries ``l1_distance`` sums over."""
    return sum(state[key].numel() for key in _trained(state))


def _trained(state: State) -> Iterator[str]:
    return (key for key, tensor in state.items() if tensor.is_floating_point() and not is_statistic(key))


def co_s2p_weight(step_l1: float, num_entries: int, drift_l1: float) -> float:
    """c_i = (||delta_i||_1 / n_i) / (||theta_now - theta_sent||_1 / ||delta_i||_1 + 1).

    Entries that were moved further count more, whatever the size of the sub-model that they are part of; where the
    global model has moved as far as the step is long, it counts half.

    Parameters
    ----------
    step_l1 : of what the client changed, over its own entries.
    num_entries : n_i, of its sub-model, that are trained.
    drift_l1 : how far the global model has moved on these entries since it was sent.
    """
    return step_l1 / num_entries * (step_l1 / (step_l1 + drift_l1) if step_l1 else 0.0)


def published_weight(step_l1: float, rate: float, drift_l1: float) -> float:
    """c_i = (||delta_i||_1 / rate_i) / (||theta_now - theta_sent||_1 + 1).

    As published, where staleness was always 0. Beside sums over many entries the 1 vanishes, and stale answers with it
    (docs/decisions/0077); and the sum grows faster with a sub-model than its rate, so that large ones count more
    (docs/decisions/0078).

    Parameters
    ----------
    step_l1, drift_l1 : as above.
    rate : of the sub-model, in (0, 1].
    """
    return step_l1 / rate / (drift_l1 + 1.0)


class Coverage:
    """When every unit and every block was last part of a merge.

    Parameters
    ----------
    layout : of the full model.
    groups : that width narrows; all others are part of every answer that reaches their block.
    """

    def __init__(self, layout: Layout, groups: Sequence[Group]) -> None:
        self.layout, self.groups = layout, tuple(groups)
        self.units = {group.name: np.zeros(group.size, dtype=np.int64) for group in groups}
        self.blocks = np.zeros(len(layout.blocks), dtype=np.int64)

    def note(self, spec: SubModelSpec, version: int) -> None:
        """An answer about ``spec`` is part of the merge that makes ``version``."""
        depth = len(self.blocks) if spec.depth is None else spec.depth
        self.blocks[:depth] = version
        for group in groups_within(self.groups, self.layout, depth):
            self.units[group.name][list(spec.units.get(group.name, range(group.size)))] = version

    def starved(self, since: int) -> tuple[dict[str, np.ndarray], int]:
        """Units that no merge after version ``since`` held, by group, those that have waited longest first; and the
        depth it takes to reach them all.
        """
        units = {name: np.argsort(last, kind="stable")[: (last <= since).sum()] for name, last in self.units.items()}
        missed = np.flatnonzero(self.blocks <= since)
        depths = [int(missed[-1]) + 1] if len(missed) else []
        for group in self.groups:
            if len(units[group.name]):
                depths += [b + 1 for axis in group.axes if (b := self.layout.block_of(axis.key)) is not None]
        return {name: found for name, found in units.items() if len(found)}, max(depths, default=0)

    def export(self) -> dict[str, list[int]]:
        """JSON values."""
        return {"": self.blocks.tolist(), **{name: last.tolist() for name, last in self.units.items()}}

    def restore(self, exported: Mapping[str, Sequence[int]]) -> None:
        """Inverse of ``export``."""
        self.blocks = np.array(exported[""], dtype=np.int64)
        self.units = {name: np.array(exported[name], dtype=np.int64) for name in self.units}


def covering_spec(
    layout: Layout, groups: Sequence[Group], capability: Capability, own: SubModelSpec, wanted: Mapping[str, np.ndarray]
) -> SubModelSpec:
    """A sub-model of a client's size that holds ``wanted`` units before its own: the rotation where N* is 0."""
    held = groups_within(groups, layout, capability.depth)
    widths = widths_at(held, capability.width_rate)
    kept = {}
    for group in held:
        mine = own.units.get(group.name, range(group.size))
        ranked = dict.fromkeys([*map(int, wanted.get(group.name, ())), *mine, *range(group.size)])
        if widths[group.name] < group.size:
            kept[group.name] = list(ranked)[: widths[group.name]]
    return SubModelSpec.of(kept, None if capability.depth == len(layout.blocks) else capability.depth)
