"""What clients saw of their gates, averaged over clients: rows of the event log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pruning.gates import MARGIN, OVERLAPS, PLAN, SALIENCE, STATISTICS, STATISTICS_OF
from wire.message import State


class GateRowError(ValueError):
    """What a client says of its gates has another form than its gates; the answer is turned away."""


def check_evidence(companions: State, sizes: Sequence[int]) -> None:
    """Raise ``GateRowError`` unless salience and statistics fit groups of ``sizes`` units."""
    salience = companions.get(SALIENCE)
    if salience is None or tuple(salience.shape) != (sum(sizes),) or not salience.is_floating_point():
        got = "none" if salience is None else f"{salience.dtype} {tuple(salience.shape)}"
        raise GateRowError(f"report: its salience should be real with shape ({sum(sizes)},), got {got}")
    expected = {STATISTICS_OF: (len(sizes), len(STATISTICS))}
    for name, shape in expected.items():
        if name in companions and tuple(companions[name].shape) != shape:
            raise GateRowError(f"report: {name!r} should have shape {shape}, got {tuple(companions[name].shape)}")
    overlaps = companions.get(OVERLAPS)
    if overlaps is not None and (overlaps.dim() != 2 or overlaps.shape[0] != overlaps.shape[1]):
        raise GateRowError(f"report: {OVERLAPS!r} should be a square, got {tuple(overlaps.shape)}")
    times = companions.get(PLAN)
    if times is not None and tuple(times.shape) != (len(sizes), 2):
        raise GateRowError(f"report: {PLAN!r} should have shape {(len(sizes), 2)}, got {tuple(times.shape)}")


class GateRows:
    """Collects one round's evidence."""

    def __init__(self) -> None:
        self._statistics: list[Tensor] = []
        self._overlaps: list[Tensor] = []

    def note(self, companions: State) -> None:
        """Take in one checked answer."""
        if STATISTICS_OF in companions:
            self._statistics.append(companions[STATISTICS_OF].double())
        if OVERLAPS in companions:
            self._overlaps.append(companions[OVERLAPS].double())

    def close(self, groups: Sequence[str]) -> dict[str, Any]:
        """The round's means: ``layers`` (group -> statistics, of the layers that anybody gated), ``overlaps``."""
        statistics, overlaps = self._statistics, self._overlaps
        self._statistics, self._overlaps = [], []
        row: dict[str, Any] = {"layers": {}, "overlaps": []}
        if statistics:
            table = torch.stack(statistics)  # [clients, layers, statistics]; negative: not gated there
            is_gated = (table[:, :, :1] >= 0).double()
            means = (table * is_gated).sum(0) / is_gated.sum(0).clamp(min=1)
            row["layers"] = {
                name: dict(zip(STATISTICS, (round(float(v), 6) for v in means[i]), strict=True))
                for i, name in enumerate(groups)
                if float(is_gated[:, i].sum())
            }
        same = [item for item in overlaps if item.shape == overlaps[0].shape]
        if same:
            table = torch.stack(same)  # [clients, classes, classes]; zero for a pair that the client does not have
            means = table.sum(0) / (table > 0).sum(0).clamp(min=1)
            row["overlaps"] = [[round(float(v), 4) for v in line] for line in means]
        return row


def plan_row(times: Tensor, groups: Sequence[str]) -> dict[str, Any]:
    """What a client measured on its device: group -> seconds of one training pass whole and gated."""
    layers = {
        name: {"dense_s": dense_s, "gated_s": gated_s}
        for name, (dense_s, gated_s) in zip(groups, times.tolist(), strict=True)
        if dense_s >= 0
    }
    return {"layers": layers}


def slower_gated(times: Sequence[Tensor], groups: Sequence[str]) -> set[str]:
    """The groups in which gating costs the measured clients more time than it saves them, all together."""
    if not times:
        return set()
    dense_s, gated_s = torch.stack(list(times)).double().clamp(min=0).sum(0).unbind(1)
    return {name for name, slow in zip(groups, (gated_s > MARGIN * dense_s).tolist(), strict=True) if slow}
