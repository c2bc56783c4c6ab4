"""Uploads of units: a client sends those that score best, and a bitmap that says which these are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pruning.gates.net import gated_groups, select_winners
from pruning.gates.sites import GateError, num_winners
from pruning.groups import Layout
from pruning.importance import UnitScores
from pruning.spec import SubModelSpec

BITMAP = "gates.bitmap"
"""Name under which the bitmap travels."""


def upload_spec(layout: Layout, spec: SubModelSpec, scores: UnitScores, density: float) -> SubModelSpec:
    """The part of ``spec`` with the best units of every gated group; ties go to the lower unit.

    Parameters
    ----------
    spec : what the client holds.
    scores : of all units of a group, whoever holds them; a group that it lacks is sent whole.
    density : share of a group's units that is sent, in (0, 1].
    """
    kept = {}
    for group in gated_groups(layout):
        if group.name not in scores:
            continue
        held = spec.arrays.get(group.name, np.arange(group.size))
        best = np.argsort(-scores[group.name][held], kind="stable")[: num_winners(group.size, density)]
        kept[group.name] = held[np.sort(best)]
    return select_winners(layout, kept, spec)


def to_bitmap(layout: Layout, spec: SubModelSpec) -> Tensor:
    """One bit per unit of every gated group, in the order of the layout: uint8 [ceil(units / 8)]."""
    bits = np.concatenate([np.isin(np.arange(g.size), _units(spec, g.name, g.size)) for g in gated_groups(layout)])
    return torch.from_numpy(np.packbits(bits))


def check_bitmap(bitmap: Tensor | None, layout: Layout, spec: SubModelSpec) -> None:
    """Raise ``GateError`` unless the bitmap of an upload names the units whose tensors it holds."""
    expected = to_bitmap(layout, spec)
    if bitmap is None or bitmap.dtype != torch.uint8 or bitmap.shape != expected.shape:
        got = "none" if bitmap is None else f"{bitmap.dtype} {tuple(bitmap.shape)}"
        raise GateError(f"upload: its bitmap should be uint8 {tuple(expected.shape)}, got {got}")
    num_wrong = int(np.unpackbits((bitmap ^ expected).numpy()).sum())
    if num_wrong:
        raise GateError(f"upload: its bitmap and its tensors disagree about {num_wrong} units")


def _units(spec: SubModelSpec, name: str, size: int) -> np.ndarray:
    return spec.arrays.get(name, np.arange(size))
