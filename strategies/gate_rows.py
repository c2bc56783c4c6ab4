"""What clients saw of their gates, averaged over clients: rows of the event log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pruning.gates import ABSENT, MARGIN, OVERLAPS, PLAN, SALIENCE, STATISTICS, STATISTICS_OF
from wire.message import State


class GateRowError(ValueError):
    """What a client says of its gates has another form than its gates; the answer is turned away."""


def check_evidence(companions: State, sizes: Sequence[int]) -> None:
    """Raise ``GateRowError`` unless salience is there and everything else fits groups of ``sizes`` units."""
    num_layers, overlaps = len(sizes), companions.get(OVERLAPS)
    num_classes = len(overlaps) if overlaps is not None and overlaps.dim() else 0
    expected = {
        SALIENCE: (sum(sizes),),
        STATISTICS_OF: (num_layers, len(STATISTICS)),
        OVERLAPS: (num_classes, num_classes),
        PLAN: (num_layers, 2),
    }
    if SALIENCE not in companions:
        raise GateRowError(f"report: {SALIENCE!r} is missing; it has {sorted(companions)}")
    for name, shape in expected.items():
        found = companions.get(name)
        if found is not None and (tuple(found.shape) != shape or not found.is_floating_point()):
            got = f"{found.dtype} {tuple(found.shape)}"
            raise GateRowError(f"report: {name!r} should be real with shape {shape}, got {got}")


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
            table = torch.stack(same)  # [clients, classes, classes]; negative for a pair that the client does not have
            num_clients = (table >= 0).sum(0)
            means = (table.clamp(min=0).sum(0) / num_clients.clamp(min=1)).masked_fill(num_clients == 0, ABSENT)
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
