"""The width masks of Co-S2P: who is still learning one, what it has come to, and which units clients agree on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pruning.capability import Capability, groups_within, sub_model_at
from pruning.groups import Group, Layout
from pruning.select import select_random
from pruning.spec import SubModelSpec
from wire.spec import spec_from_json, spec_to_json

KINDS = ("agreed", "learned", "random", "first")
LEARNED, NESTED = ("agreed", "learned"), ("agreed", "first")
"""Kinds that need a mask phase; and those under which a smaller sub-model is part of every larger one."""


class Masks:
    """Every client's mask, of one of the ``KINDS``.

    Parameters
    ----------
    kind : ``agreed`` (clients learn masks, and keep what most of these keep), ``learned`` (each keeps its own),
        ``random`` or ``first`` units.
    layout : of the full model.
    groups : that width narrows.
    capabilities : depth and width of every client.
    num_receptions : merged answers in which a client learns its mask.
    seed : of random masks.
    """

    def __init__(
        self,
        kind: str,
        layout: Layout,
        groups: Sequence[Group],
        capabilities: Sequence[Capability],
        num_receptions: int,
        seed: int,
    ) -> None:
        self.kind, self.layout, self.groups, self.seed = kind, layout, tuple(groups), seed
        self.capabilities, self.num_receptions = tuple(capabilities), num_receptions
        self._own: dict[int, SubModelSpec] = {}
        self._receptions: dict[int, int] = {}
        self._agreed: dict[Capability, SubModelSpec] = {}

    def is_learning(self, pid: int) -> bool:
        """Whether a client, asked now, is in its mask phase; not if there is nothing that it could leave out."""
        if self.kind not in LEARNED or self._receptions.get(pid, 0) >= self.num_receptions:
            return False
        return self._has_choice(self.capabilities[pid])

    def note(self, pid: int, learned: SubModelSpec) -> None:
        """A client has answered with the mask that it has learned."""
        self._own[pid], self._receptions[pid] = learned, self._receptions.get(pid, 0) + 1
        self._agreed.clear()

    def of(self, pid: int) -> SubModelSpec:
        """A client's sub-model; in its mask phase, what that has come to so far, and all units before."""
        capability = self.capabilities[pid]
        if not self._has_choice(capability):
            return self.whole(pid)
        if self.kind not in LEARNED:
            return self._fixed(pid, capability)
        if pid not in self._own:
            return self.whole(pid)
        if self.kind == "learned":
            return self._own[pid]
        if capability not in self._agreed:
            held = sub_model_at(self.layout, self.groups, capability.depth, capability.width_rate)
            sizes = {group.name: group.size for group in self.groups}
            self._agreed[capability] = agreed_mask(held, sizes, self._own.values())
        return self._agreed[capability]

    def whole(self, pid: int) -> SubModelSpec:
        """All units of a client's blocks: what it learns its mask on."""
        return sub_model_at(self.layout, self.groups, self.capabilities[pid].depth, 1.0)

    def _has_choice(self, capability: Capability) -> bool:
        return capability.width_rate < 1 and bool(groups_within(self.groups, self.layout, capability.depth))

    def _fixed(self, pid: int, capability: Capability) -> SubModelSpec:
        held = sub_model_at(self.layout, self.groups, capability.depth, capability.width_rate)
        if self.kind == "first":
            return held
        widths = {name: len(units) for name, units in held.units.items()}
        return replace(select_random(self.layout, widths, np.random.default_rng((self.seed, pid))), depth=held.depth)

    def export(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "masks": {str(pid): spec_to_json(spec) for pid, spec in self._own.items()},
            "receptions": {str(pid): count for pid, count in self._receptions.items()},
        }

    def restore(self, exported: Mapping[str, Any]) -> None:
        """Inverse of ``export``; other entries do not matter."""
        own = {int(pid): spec_from_json(text) for pid, text in exported["masks"].items()}
        self._own = {pid: spec for pid, spec in own.items() if spec is not None}
        self._receptions = {int(pid): count for pid, count in exported["receptions"].items()}
        self._agreed.clear()


def agreed_mask(held: SubModelSpec, sizes: Mapping[str, int], masks: Iterable[SubModelSpec]) -> SubModelSpec:
    """A sub-model as wide and deep as ``held``, of the units that most masks keep; ties go to the lower unit.

    Of one group all clients then hold the same units, a smaller sub-model part of every larger one.

    Parameters
    ----------
    sizes : group name -> its units.
    masks : that clients have learned; one that does not reach a group does not vote there.
    """
    votes = {name: np.zeros(sizes[name], dtype=np.int64) for name in held.units}
    for mask in masks:
        for name, units in mask.units.items():
            if name in votes:
                votes[name][list(units)] += 1
    kept = {name: np.argsort(-votes[name], kind="stable")[: len(units)] for name, units in held.units.items()}
    return SubModelSpec.of({name: sorted(units.tolist()) for name, units in kept.items()}, held.depth)
