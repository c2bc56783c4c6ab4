"""The one masked mean: unequal sub-models merged entry by entry, streaming.

With w_c the weight and M_c the entries of client c, every rule is a function of three sums per entry: the weighted sum
``S = sum_c w_c M_c theta_c``, the coverage ``C = sum_c w_c M_c`` and the total ``W = sum_c w_c``. The coverage of an
entry depends only on the units of its axes, so it is a sum of outer products of unit masks: a small matrix product
per entry instead of a tensor as large as the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pruning.extract import Selection, State, check_state, relative, selection, shapes_of
from pruning.groups import Layout
from pruning.rows import Kept, add_at, gather
from pruning.spec import SubModelSpec

FLUSH_SPECS = 64
"""Distinct specs whose coverage is folded in at once: bounds memory, keeps the matrix products large."""


class MergeError(ValueError):
    """A reply cannot be merged: weight or values are unusable. Nothing was added."""


@dataclass(frozen=True)
class AggregateResult:
    """What a merge returns.

    Attributes
    ----------
    state : full state dict.
    coverage : key -> weight each entry received; broadcasts against the entry (axes that nobody prunes have size 1).
    holders : the same with every client counted once.
    total_weight : sum of the weights of all clients merged.
    num_merged : number of clients merged.
    """

    state: dict[str, Tensor]
    coverage: dict[str, Tensor]
    holders: dict[str, Tensor]
    total_weight: float
    num_merged: int

    @property
    def n_star(self) -> int:
        """The smallest number of holders over all entries (Co-S2P's N*)."""
        return int(min((float(tensor.min()) for tensor in self.holders.values()), default=0.0))

    @property
    def uncovered_ratio(self) -> float:
        """Share of entries that nobody held."""
        entries = {key: self.state[key].numel() for key in self.holders}
        missed = sum(float((h == 0).float().mean()) * entries[key] for key, h in self.holders.items())
        return missed / max(1, sum(entries.values()))

    def mean_holders(self) -> dict[str, float]:
        """Key -> mean number of holders of its entries."""
        return {key: float(tensor.mean()) for key, tensor in self.holders.items()}


MergeRule = Callable[[Tensor, Tensor, float, Tensor], Tensor]
"""(S, C, W, previous) -> merged entries where C > 0. S is the rule's to reuse: merging allocates nothing more."""


def holders_mean(total: Tensor, coverage: Tensor, weight: float, previous: Tensor) -> Tensor:
    """S / C: the mean over those who hold the entry (HeteroFL; AdaptCL's by-unit)."""
    return total.div_(coverage)


def everybody_mean(total: Tensor, coverage: Tensor, weight: float, previous: Tensor) -> Tensor:
    """S / W: who does not hold the entry counts as zero (AdaptCL's by-worker)."""
    return total.div_(weight)


def residual_mean(total: Tensor, coverage: Tensor, weight: float, previous: Tensor) -> Tensor:
    """(S + (W - C) previous) / W: who does not hold the entry counts as the server's value."""
    return total.add_((weight - coverage) * previous).div_(weight)


def coverage_mean(threshold: float) -> MergeRule:
    """S / C where at least ``threshold`` of the weight holds the entry, S / W elsewhere."""

    def rule(total: Tensor, coverage: Tensor, weight: float, previous: Tensor) -> Tensor:
        enough = threshold * weight * (1 - 1e-6)  # rounding must not decide a tie: it depends on the order of arrival
        return total.div_(torch.where(coverage >= enough, coverage, torch.full_like(coverage, weight)))

    return rule


class MaskedMean:
    """Weighted mean of sub-models under their masks; memory does not grow with the number of clients.

    Parameters
    ----------
    previous : full state dict before the merge; an entry nobody covers keeps its value bit for bit. Integer buffers
        are never averaged and keep theirs always.
    layout : what can be pruned in it.
    dtype : of the sums.

    Attributes
    ----------
    later : key -> what the merged update of an entry will be multiplied with after ``finalize``, 1 where missing; of
        use to rules that bound how far one client moves the model.
    """

    def __init__(self, previous: State, layout: Layout, *, dtype: torch.dtype = torch.float32) -> None:
        self.previous, self.layout, self.dtype = previous, layout, dtype
        self.later: Mapping[str, float] = {}
        self.shapes = shapes_of(previous)
        self.total_weight, self.num_merged = 0.0, 0
        self._sums: dict[str, Tensor] = {}
        self._coverage: dict[str, np.ndarray] = {}
        self._holders: dict[str, np.ndarray] = {}
        self._pending: dict[SubModelSpec, tuple[float, int]] = {}

    def add(self, sub_state: State, spec: SubModelSpec, weight: float, *, part: SubModelSpec | None = None) -> None:
        """Add one client's reply.

        Parameters
        ----------
        sub_state : its entries under ``spec``; may leave out integer buffers.
        weight : finite and >= 0; 0 changes nothing.
        part : what of ``spec`` is to be merged (the labels that a client has); ``sub_state`` holds all of ``spec``.

        Raises
        ------
        MergeError
            If the weight or an entry is not finite, or ``part`` is not a part of ``spec``.
        SpecError, StateError
            If ``part`` does not fit the model; if an entry is missing, unexpected or of another shape.
        """
        if not math.isfinite(weight) or weight < 0:
            raise MergeError(f"merge: weight must be finite and >= 0, got {weight}")
        sent = self.check(sub_state, spec)
        if part is not None:
            part.check(self.layout)
            if not part.is_subset_of(spec, self.layout):
                raise MergeError("merge: what is to be merged is not part of the spec that was sent")
        if weight == 0:
            return
        held = spec if part is None else part
        chosen = sent if part is None else selection(self.layout, held, self.shapes)
        entries = {
            key: sub_state[key] if part is None else gather(sub_state[key], relative(sent.positions[key], kept))
            for key, kept in chosen.positions.items()
            if self.previous[key].is_floating_point()
        }
        self._take(entries, chosen.positions, weight)
        before_weight, before_count = self._pending.get(held, (0.0, 0))
        self._pending[held] = (before_weight + weight, before_count + 1)
        self.total_weight += weight
        self.num_merged += 1
        if len(self._pending) >= FLUSH_SPECS:
            self._fold_coverage()

    def check(self, sub_state: State, spec: SubModelSpec) -> Selection:
        """Raise what ``add`` raises of a reply that cannot be merged; return where its entries lie.

        For rules that compute with a reply before they know its weight.
        """
        sent = selection(self.layout, spec, self.shapes)
        check_state(self._with_integers(sub_state, sent), sent, self.previous)
        for key, tensor in sub_state.items():
            if not is_finite(tensor):
                raise MergeError(f"merge: {key!r} holds NaN or infinity")
        return sent

    def _take(self, entries: State, positions: Mapping[str, Kept], weight: float) -> None:
        """Add checked entries, which lie at ``positions``, to the sums."""
        for key, entry in entries.items():
            if key not in self._sums:
                self._sums[key] = torch.zeros(self.previous[key].shape, dtype=self.dtype)
            add_at(self._sums[key], positions[key], entry.to(self.dtype), weight)

    def add_partial(self, other: MaskedMean) -> None:
        """Add everything another masked mean over the same model has collected (hierarchical merging)."""
        other._fold_coverage()
        for key, total in other._sums.items():
            self._sums[key] = self._sums[key] + total if key in self._sums else total.clone()
        for mine, theirs in ((self._coverage, other._coverage), (self._holders, other._holders)):
            for key, share in theirs.items():
                mine[key] = mine[key] + share if key in mine else share.copy()
        self.total_weight += other.total_weight
        self.num_merged += other.num_merged

    def finalize(self, mixing_rate: float = 1.0, rule: MergeRule = holders_mean) -> AggregateResult:
        """Close the merge: ``previous + mixing_rate * (rule - previous)`` where covered, ``previous`` elsewhere."""
        self._fold_coverage()
        state: dict[str, Tensor] = {}
        coverage: dict[str, Tensor] = {}
        holders: dict[str, Tensor] = {}
        for key, before in self.previous.items():
            if not before.is_floating_point():
                state[key] = before
                continue
            covered = self._coverage.get(key)
            share = torch.zeros([1] * before.dim()) if covered is None else torch.from_numpy(covered)
            coverage[key] = share
            holders[key] = torch.zeros_like(share) if covered is None else torch.from_numpy(self._holders[key])
            if covered is None or key not in self._sums:
                state[key] = before
                continue
            state[key] = self._merge_entry(before, self._sums[key], share.to(self.dtype), mixing_rate, rule)
        return AggregateResult(state, coverage, holders, self.total_weight, self.num_merged)

    def _merge_entry(self, before: Tensor, total: Tensor, share: Tensor, mixing_rate: float, rule: MergeRule) -> Tensor:
        is_held = share > 0
        base = before.to(self.dtype)
        divisor_safe = torch.where(is_held, share, torch.ones_like(share))  # what nobody held is replaced below
        merged = rule(total, divisor_safe, self.total_weight, base)
        if mixing_rate != 1.0:
            merged = base + mixing_rate * (merged - base)
        if is_held.numpy().all():
            return merged.to(before.dtype)
        return torch.where(is_held, merged.to(before.dtype), before)

    def _with_integers(self, sub_state: State, sent: Selection) -> State:
        """Let a reply leave out the integer buffers, which are never merged."""
        absent = {
            key: gather(self.previous[key], kept)
            for key, kept in sent.positions.items()
            if key not in sub_state and not self.previous[key].is_floating_point()
        }
        return {**sub_state, **absent} if absent else sub_state

    def _fold_coverage(self) -> None:
        """Fold the pending specs' unit masks into the coverage: sum_c w_c outer(mask_c0, mask_c1, ...)."""
        if not self._pending:
            return
        chosen = [selection(self.layout, spec, self.shapes) for spec in self._pending]
        weights = np.array([weight for weight, _ in self._pending.values()], dtype=np.float64)
        counts = np.array([count for _, count in self._pending.values()], dtype=np.float64)
        for key, shape in self.shapes:
            if not self.previous[key].is_floating_point():
                continue
            holding = [i for i, item in enumerate(chosen) if key in item.positions]
            if not holding:
                continue
            masks = _axis_masks([chosen[i].positions[key] for i in holding], shape)
            for store, amounts in ((self._coverage, weights), (self._holders, counts)):
                share = _outer_sum(amounts[holding], masks)
                store[key] = share if key not in store else store[key] + share
        self._pending.clear()


def is_finite(tensor: Tensor) -> bool:
    """Whether every entry is finite; one pass without a temporary in the common case."""
    if not tensor.is_floating_point():
        return True
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _axis_masks(kept: list[tuple[np.ndarray | None, ...]], shape: tuple[int, ...]) -> list[np.ndarray]:
    """Per axis a [num_specs, size] mask, or [num_specs, 1] ones where no spec prunes the axis."""
    masks = []
    for dim, size in enumerate(shape):
        if all(item[dim] is None for item in kept):
            masks.append(np.ones((len(kept), 1)))
            continue
        mask = np.zeros((len(kept), size))
        for row, item in enumerate(kept):
            mask[row, slice(None) if item[dim] is None else item[dim]] = 1.0
        masks.append(mask)
    return masks


def _outer_sum(amounts: np.ndarray, masks: list[np.ndarray]) -> np.ndarray:
    """sum_s amounts[s] * outer(masks[0][s], masks[1][s], ...); one matrix product for two wide axes."""
    if not masks:
        return np.array(amounts.sum())
    wide = [dim for dim, mask in enumerate(masks) if mask.shape[1] > 1]
    if len(wide) <= 2:
        left = (amounts[:, None] * masks[wide[0]]) if wide else amounts[:, None]
        right = masks[wide[1]] if len(wide) == 2 else np.ones((len(amounts), 1))
        product = left.T @ right
        sizes = [masks[dim].shape[1] for dim in range(len(masks))]
        return product.reshape(sizes)
    letters = "abcdefgh"[: len(masks)]
    terms = ",".join(f"s{letter}" for letter in letters)
    return np.einsum(f"s,{terms}->{letters}", amounts, *masks, optimize=True)
