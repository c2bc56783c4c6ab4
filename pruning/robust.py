"""Merging under attack: updates clipped to a norm, and coordinate-wise trimmed mean and median *under masks*.

Of a mean, one client that lies decides the value. Trimmed mean and median (Yin et al. 2018, arXiv 1803.01498,
definitions 1 and 2) take, for every entry, the middle of what its holders sent; here the holders of an entry are those
whose sub-model has it, so that each entry has its own number of them. Both ignore weights: a client's word for its
number of examples is no better than its weights. Clipping bounds how far one client can move the model (Sun et al.
2019, arXiv 1911.07963, section 4.2) and is all that protects entries that one or two clients hold.

The price is memory: the answers of one round are kept until it closes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pruning.extract import State
from pruning.groups import Layout
from pruning.merge import AggregateResult, MaskedMean, MergeError, MergeRule, holders_mean
from pruning.rows import Kept, gather
from pruning.spec import SubModelSpec

CENTRES = ("mean", "trimmed-mean", "median")
CHUNK_ENTRIES = 1 << 22
"""Values sorted at once: bounds what merging needs beside the answers themselves."""


class RobustMean(MaskedMean):
    """A ``MaskedMean`` whose sums are replaced by a robust centre of the holders' values; every merge rule applies.

    Parameters
    ----------
    previous, layout, dtype : as of ``MaskedMean``.
    centre : ``mean`` (of clipped updates), ``trimmed-mean`` or ``median`` over the holders of each entry.
    trim_ratio : share of the holders that is left out at each end, in [0, 0.5); rounded up, but never all of them.
    clip_norm : an update (what a client sent minus what it was sent), as far as it is to move the model (``later``), is
        shortened to this L2 norm; 0 for no bound.
    clip_factor : and to this multiple of the median norm of the round; 0 for no bound.
    """

    def __init__(
        self,
        previous: State,
        layout: Layout,
        *,
        centre: str = "median",
        trim_ratio: float = 0.2,
        clip_norm: float = 0.0,
        clip_factor: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(previous, layout, dtype=dtype)
        if centre not in CENTRES or not 0 <= trim_ratio < 0.5 or clip_norm < 0 or clip_factor < 0:
            raise MergeError(
                f"merge: centre {centre!r}, trim ratio {trim_ratio}, clip norm {clip_norm}, clip factor {clip_factor}: "
                f"expected one of {', '.join(CENTRES)}, a ratio in [0, 0.5), and bounds >= 0"
            )
        self.centre, self.trim_ratio, self.clip_norm, self.clip_factor = centre, trim_ratio, clip_norm, clip_factor
        self._answers: list[tuple[dict[str, Tensor], Mapping[str, Kept], float, dict[str, float]]] = []

    def add(self, sub_state: State, spec: SubModelSpec, weight: float, *, part: SubModelSpec | None = None) -> None:
        """Add one client's reply as ``MaskedMean`` does.

        Where the middle counts, every weight but 0 is the same: also in the shares of a rule that divides by everybody,
        or who claims a large one could hold still whatever is not part of its own answer.
        """
        is_alike = self.centre != "mean" and math.isfinite(weight) and weight > 0
        super().add(sub_state, spec, 1.0 if is_alike else weight, part=part)

    def add_partial(self, other: MaskedMean) -> None:
        """Not possible: the middle of all cannot be had from the middles of parts."""
        raise MergeError("merge: robust merges cannot be composed; merge at one place, or clip only and use MaskedMean")

    def finalize(self, mixing_rate: float = 1.0, rule: MergeRule = holders_mean) -> AggregateResult:
        """Close the merge: centre times coverage takes the place of the weighted sum."""
        bound = self.clip_norm or math.inf
        norms = [
            math.sqrt(sum(self.later.get(key, 1.0) ** 2 * square for key, square in squares.items()))
            for *_, squares in self._answers
        ]
        if self.clip_factor and self._answers:
            bound = min(bound, self.clip_factor * statistics.median(norms))
        clipped = [
            (self._clipped(entries, kept, bound / norm) if norm > bound else entries, kept)
            for (entries, kept, *_), norm in zip(self._answers, norms, strict=True)
        ]
        self._sums = {}
        if self.centre == "mean":
            for (entries, kept), (_, _, weight, _) in zip(clipped, self._answers, strict=True):
                super()._take(entries, kept, weight)
        else:
            self._fold_coverage()
            for key in {key for entries, _ in clipped for key in entries}:
                values = [(entries[key], kept[key]) for entries, kept in clipped if key in entries]
                coverage = torch.from_numpy(self._coverage[key]).to(self.dtype)
                self._sums[key] = self._centre_of(values, self.previous[key].shape) * coverage
        return super().finalize(mixing_rate, rule)

    def _take(self, entries: State, positions: Mapping[str, Kept], weight: float) -> None:
        """Keep checked entries until the round closes."""
        squares = {
            key: float(
                (entry.to(self.dtype) - gather(self.previous[key], positions[key]).to(self.dtype)).square().sum()
            )
            for key, entry in entries.items()
        }
        self._answers.append(({k: t.clone() for k, t in entries.items()}, positions, weight, squares))

    def _clipped(self, entries: State, positions: Mapping[str, Kept], factor: float) -> State:
        """The update shortened: ``previous + factor * (entries - previous)``."""
        before = {key: gather(self.previous[key], positions[key]) for key in entries}
        return {key: before[key] + factor * (entry - before[key]) for key, entry in entries.items()}

    def _centre_of(self, values: list[tuple[Tensor, Kept]], shape: torch.Size) -> Tensor:
        """Centre of every entry over its holders, of ``shape``; 0 where there are none."""
        if not shape:
            return self._middle(torch.stack([value.to(self.dtype) for value, _ in values]))
        result = torch.zeros(shape, dtype=self.dtype)
        step = max(1, CHUNK_ENTRIES // max(1, len(values) * math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            part = torch.full((len(values), stop - start, *shape[1:]), math.nan, dtype=self.dtype)
            for row, (value, kept) in zip(part, values, strict=True):
                first = np.arange(shape[0]) if kept[0] is None else kept[0]
                low, high = np.searchsorted(first, [start, stop])
                axes = [first[low:high] - start, *kept[1:]]
                where = np.ix_(*(np.arange(n) if a is None else a for a, n in zip(axes, row.shape, strict=True)))
                row.numpy()[where] = value[low:high].to(self.dtype).numpy()
            result[start:stop] = self._middle(part)
        return result

    def _middle(self, values: Tensor) -> Tensor:
        """Trimmed mean or median over the first axis [num_answers, ...], NaN for who does not hold the entry."""
        ordered = values.sort(dim=0).values  # NaN comes last
        holders = (~values.isnan()).sum(dim=0, keepdim=True)
        if self.centre == "median":
            low, high = ((holders - 1).clamp(min=0) // 2), (holders // 2).clamp(max=len(values) - 1)
            middle = ordered.gather(0, low) / 2 + ordered.gather(0, high) / 2
            return middle[0].nan_to_num(0.0)
        trimmed = torch.minimum(torch.ceil(self.trim_ratio * holders - 1e-9).long(), (holders - 1).clamp(min=0) // 2)
        index = torch.arange(len(values)).reshape(-1, *[1] * (values.dim() - 1))
        is_kept = (index >= trimmed) & (index < holders - trimmed)
        return torch.where(is_kept, ordered, 0.0).sum(dim=0) / (holders - 2 * trimmed).clamp(min=1)[0]
