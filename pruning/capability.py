"""How deep and how wide a device can train: a budget turned into a depth and a width.

A budget is a rate in (0, 1], or the bytes of memory that training may take. Co-S2P's way (``paper``) keeps the first
``floor(rate * L)`` blocks at the same rate of the units; ``fit`` takes the deepest model that fits, then the widest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, prod

from pruning.cost import CostModel
from pruning.groups import Group, Layout
from pruning.spec import SubModelSpec

NUM_RATES = 256
"""Widths and rates are searched on a grid of this many steps."""


class CapabilityError(ValueError):
    """A budget is too small for any sub-model that can be trained."""


@dataclass(frozen=True)
class Capability:
    """What one device can train.

    Attributes
    ----------
    depth : blocks, an exit behind the last of them.
    depth_rate : the share of the blocks that the budget stands for, in (0, 1].
    width_rate : the share of the units of every group, in (0, 1].
    """

    depth: int
    depth_rate: float
    width_rate: float

    @property
    def rate(self) -> float:
        """One number for both: their geometric mean, which is the rate itself where they are equal."""
        return float((self.depth_rate * self.width_rate) ** 0.5)


@dataclass(frozen=True)
class Training:
    """How a client trains, for estimates of its memory.

    Attributes
    ----------
    batch_size : examples a step.
    optimizer_slots : numbers that the optimiser keeps per weight (1 with momentum).
    learns_masks : it also passes through the model at full width, with frozen weights.
    """

    batch_size: int
    optimizer_slots: int = 1
    learns_masks: bool = False


def exit_depths(layout: Layout) -> tuple[int, ...]:
    """Depths, in blocks, at which a sub-model still ends in a classifier, shallowest first.

    Where heads belong to blocks, those behind which one stands; where the head belongs to none, every depth.
    """
    return layout.exits or tuple(range(1, len(layout.blocks) + 1)) or (0,)


def inner_groups(layout: Layout, shapes: Mapping[str, Sequence[int]]) -> tuple[Group, ...]:
    """The groups that width pruning may narrow without touching a residual stream.

    A stream is written by several layers of several blocks, and normalised as a whole: narrowing it is no silencing of
    units that a client can learn. Heads, hidden neurons and the inner channels of residual blocks remain; of networks
    without residuals, everything.

    Parameters
    ----------
    shapes : of the full state dict.
    """
    return tuple(group for group in layout.prunable if not _is_stream(group, shapes))


def _is_stream(group: Group, shapes: Mapping[str, Sequence[int]]) -> bool:
    writers = {axis.key for axis in group.axes if axis.dim == 0 and len(shapes[axis.key]) > 1}
    places = {tuple(axis.key.split(".")[:2]) for axis in group.axes}
    return len(writers) > 1 and len(places) > 1


def widths_at(groups: Sequence[Group], width_rate: float) -> dict[str, int]:
    """Kept units of each group: ``round(width_rate * size)``, at least one."""
    return {group.name: max(1, floor(width_rate * group.size + 0.5)) for group in groups}


def groups_within(groups: Sequence[Group], layout: Layout, depth: int) -> tuple[Group, ...]:
    """The groups that lie in the first ``depth`` blocks."""
    kept = []
    for group in groups:
        blocks = [layout.block_of(axis.key) for axis in group.axes]
        if all(block is None or block < depth or not layout.blocks for block in blocks):
            kept.append(group)
    return tuple(kept)


def sub_model_at(layout: Layout, groups: Sequence[Group], depth: int, width_rate: float) -> SubModelSpec:
    """The first units of every group at one depth and width: what such a sub-model costs, whichever units it keeps."""
    held = groups_within(groups, layout, depth)
    widths = widths_at(held, width_rate)
    kept = {group.name: range(widths[group.name]) for group in held if widths[group.name] < group.size}
    return SubModelSpec.of(kept, None if depth == len(layout.blocks) else depth)


def peak_memory_bytes(
    layout: Layout, cost: CostModel, groups: Sequence[Group], depth: int, width_rate: float, training: Training
) -> int:
    """Estimated peak of a client that trains at this depth and width, bytes; of both phases if it learns its mask."""
    small = cost.of(sub_model_at(layout, groups, depth, width_rate))
    peak = small.peak_memory_bytes(training.batch_size, training.optimizer_slots)
    if training.learns_masks and width_rate < 1:
        whole = sub_model_at(layout, groups, depth, 1.0)
        peak = max(peak, mask_phase_bytes(layout, cost, groups_within(groups, layout, depth), whole, training))
    return peak


def mask_phase_bytes(
    layout: Layout, cost: CostModel, groups: Sequence[Group], spec: SubModelSpec, training: Training
) -> int:
    """Estimated peak, bytes, while scores are learned for the units of ``groups`` on the sub-model ``spec``.

    Its weights once, frozen; the activations that scores and normalisation need; what is trained beside the scores
    with gradients, optimiser state and a copy to go back to; four numbers a score (its own, gradient, Adam's two).
    """
    whole, trained = cost.of(spec), _beside(layout, cost, spec.depth)
    kept = training.batch_size * (whole.frozen_activation_bytes + cost.gate_bytes(groups, spec, trained))
    beside = (2 + training.optimizer_slots) * sum(trained.values())
    return whole.bytes + kept + 4 * (beside + 4 * sum(group.size for group in groups))


def _beside(layout: Layout, cost: CostModel, depth: int | None) -> dict[str, int]:
    """Size of what is trained beside the scores, at most: what is no matrix (biases stay frozen), the last exit's head.

    By keys and shapes what ``client_app.objectives.masks.freeze`` says of modules.
    """
    blocks = len(layout.blocks) if depth is None else depth
    held = [key for key in cost.trainable if (block := layout.block_of(key)) is None or block < blocks]
    exits = [int(index) for key in held if key.startswith("heads.") and (index := key.split(".")[1]).isdigit()]
    last = max(exits, default=-1)
    sizes = {key: cost.shapes[key] for key in held}
    return {k: prod(s) for k, s in sizes.items() if len(s) < 2 or s[0] == 1 or k.startswith(f"heads.{last}.")}


def solve_rate(layout: Layout, rate: float) -> Capability:
    """Depth and width at one rate: ``floor(rate * L)`` blocks, cut back to the exit before; never less than one exit.

    Raises
    ------
    CapabilityError
        If ``rate`` is outside (0, 1].
    """
    if not 0 < rate <= 1:
        raise CapabilityError(f"capability: a rate must be in (0, 1], got {rate}")
    depths = exit_depths(layout)
    wanted = floor(rate * len(layout.blocks) + 1e-9)
    depth = max((d for d in depths if d <= wanted), default=depths[0])
    return Capability(depth, rate, rate)


def solve_memory(
    layout: Layout,
    cost: CostModel,
    groups: Sequence[Group],
    budget_bytes: float,
    training: Training,
    *,
    preset: str = "fit",
    least_width: float = 0.25,
    least_depth: int = 0,
) -> Capability:
    """The largest sub-model whose training fits into ``budget_bytes``.

    Parameters
    ----------
    groups : that width may narrow, of ``inner_groups``.
    preset : ``paper`` (one rate for both, as large as fits) or ``fit`` (the deepest exit at which at least
        ``least_width`` fits, then the widest).
    least_depth : blocks that are wanted at least.

    Raises
    ------
    CapabilityError
        If not even the smallest sub-model fits.
    """
    rates = [step / NUM_RATES for step in range(1, NUM_RATES + 1)]

    def fits(found: Capability) -> bool:
        needed = peak_memory_bytes(layout, cost, groups, found.depth, found.width_rate, training)
        return needed <= budget_bytes

    depths = [depth for depth in exit_depths(layout) if depth >= least_depth]
    if preset == "paper":
        capabilities = [solve_rate(layout, rate) for rate in rates]
        largest = _largest([found for found in capabilities if found.depth in depths], fits)
        if largest is not None:
            return largest
    else:
        for depth in reversed(depths):
            share = depth / max(1, len(layout.blocks))
            largest = _largest([Capability(depth, share, rate) for rate in rates if rate >= least_width], fits)
            if largest is not None:
                return largest
    least = peak_memory_bytes(layout, cost, groups, depths[0], rates[0] if preset == "paper" else least_width, training)
    raise CapabilityError(
        f"capability: {budget_bytes / 2**20:.1f} MiB are too small for the first {depths[0]} of {len(layout.blocks)} "
        f"blocks, whose training takes {least / 2**20:.1f} MiB; leave the device out, or lower train.batch-size"
    )


def _largest(capabilities: Sequence[Capability], fits: Callable[[Capability], bool]) -> Capability | None:
    """The last of growing capabilities that fits, found by halving; the full width, without a mask phase, by itself."""
    if capabilities and fits(capabilities[-1]):
        return capabilities[-1]
    position = bisect_left(capabilities[:-1], True, key=lambda found: not fits(found))
    return capabilities[position - 1] if position else None
