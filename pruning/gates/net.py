"""Gates on a whole network: put there by its layout, told together how to share and to execute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pruning.gates.gate import Gate, group_samples
from pruning.gates.layers import (
    Execution,
    GatedConv2d,
    GatedDepthwise2d,
    GatedLinear,
    GatedNorm2d,
    Wiring,
    become,
)
from pruning.gates.sites import GateError, Site, find_sites, num_winners
from pruning.groups import Axis, Block, Group, Layout
from pruning.spec import SubModelSpec

Share = Literal["sample", "group", "batch", "client"]
SHARES: tuple[str, ...] = ("sample", "group", "batch", "client")
PREFIX = "gates."
"""What the keys of all gates in a state dict begin with."""


class Gates(nn.ModuleDict):
    """All gates of one network, by the names of their groups (dots written as dashes).

    Attributes
    ----------
    sites : what is gated, in the order of the layout.
    execution : how; set with ``configure``.
    can_group : whether the network is a chain of blocks, between which samples can be put in another order.
    blocks : paths of the chain's blocks; exits: how many of them each of the network's outputs has before it.
    """

    def __init__(self, sites: tuple[Site, ...], layout: Layout) -> None:
        super().__init__({key_of(site.group): Gate(site.inputs, site.size) for site in sites})
        self.sites, self.execution = sites, Execution()
        self.can_group = all(_block_of(layout, site) is not None for site in sites)
        self.blocks, self.exits = tuple(block.name for block in layout.blocks), layout.exits
        self._order: Tensor | None = None
        self._sorted_at: tuple[nn.Module, ...] = ()  # in a tuple, for it is no child of this one
        self._last_order: Tensor | None = None
        self._is_peeking = False

    def configure(self, share: str = "sample", compact: bool = False, num_groups: int = 4) -> Gates:
        """Say who shares winners, and whether only they are computed; returns the gates.

        Raises
        ------
        GateError
            For an unknown way to share, or a number of groups that is no power of two.
        """
        if share not in SHARES:
            raise GateError(f"gates: share must be one of {', '.join(SHARES)}, got {share!r}")
        if num_groups < 1 or num_groups & (num_groups - 1):
            raise GateError(f"gates: num-groups must be a power of two, got {num_groups}")
        if share == "group" and not self.can_group:
            raise GateError("gates: share 'group' needs a layout with blocks; use 'batch' or 'sample'")
        execution = self.execution
        execution.share, execution.is_compact, execution.num_groups = share, compact, num_groups
        return self

    def set_density(self, density: float) -> Gates:
        """Let the share ``density`` of every layer's units win."""
        for site, gate in self.pairs():
            gate.num_winners.fill_(num_winners(site.size, density))
        return self

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, the network is executed whole and masked."""
        is_compact, self.execution.is_compact = self.execution.is_compact, False
        try:
            yield
        finally:
            self.execution.is_compact = is_compact

    def leave_dense(self, groups: Iterable[str]) -> Gates:
        """Gate the named groups by nothing."""
        names = set(groups)
        for site, gate in self.pairs():
            if site.group in names:
                gate.num_winners.fill_(0)
        return self

    @property
    def device(self) -> torch.device:
        """Where the gates' entries lie."""
        return next(self.buffers()).device

    def pairs(self) -> Iterator[tuple[Site, Gate]]:
        """Sites with their gates; those that this network, cut in depth, still has."""
        for site in self.sites:
            key = key_of(site.group)
            if key in self._modules:
                gate = self._modules[key]
                assert isinstance(gate, Gate)
                yield site, gate

    # --- samples with like winners side by side ----------------------------------------------------------------------

    def on_start(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Before the network's pass."""
        self._order, self._sorted_at, self.execution.sizes = None, (), None

    def on_block(self, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before a block with gates: once, sort the batch by who would win there."""
        wants = self.execution.share == "group" and self.execution.num_groups > 1
        if self._is_peeking or self._order is not None or not wants or len(inputs[0]) < 2 or inputs[0].is_meta:
            return None
        gates = self._peek(block, inputs)
        if gates is None:
            return None
        self._sorted_at = (block,)
        self._order, self.execution.sizes = group_samples(gates, self.execution.num_groups)
        return (_reordered(inputs[0], self._order), *inputs[1:])

    def on_end(self, module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Any:
        """After the pass: outputs in the order in which the images came.

        Raises
        ------
        GateError
            If the network has several outputs, and its layout does not say behind which blocks they stand.
        """
        order, sorted_at = self._order, self._sorted_at
        self._order, self._sorted_at, self.execution.sizes = None, (), None
        self._last_order = order
        if order is None:
            return None
        back = order.argsort()
        if not isinstance(outputs, list | tuple):
            return outputs.index_select(0, back)
        if len(outputs) > len(self.exits):
            raise GateError(
                f"gates: share 'group' puts samples in another order, and of the {len(outputs)} outputs of this "
                f"{type(module).__name__} its layout places {len(self.exits)} behind blocks; use 'batch' or 'sample', "
                "or declare a layout whose blocks own the exit heads"
            )
        depth = next(i for i, path in enumerate(self.blocks) if module.get_submodule(path) in sorted_at)
        # an exit that stands before the block at which samples were sorted has answered already
        return [x if exit <= depth else x.index_select(0, back) for exit, x in zip(self.exits, outputs, strict=False)]

    def in_pass_order(self, labels: Tensor) -> Tensor:
        """What belongs to the images of the last pass, [B], in the order in which the gates saw them."""
        return labels if self._last_order is None else labels.index_select(0, self._last_order)

    @torch.no_grad()
    def _peek(self, block: nn.Module, inputs: tuple[Any, ...]) -> Tensor | None:
        """Gates that the first gated layer of ``block`` would compute; runs it up to there, as in evaluation."""
        writers = [m for m in block.modules() if isinstance(m, GatedConv2d | GatedLinear)]
        first = next((m for m in writers if m.wiring.gate is not None and m.wiring.gate.k), None)
        if first is None:
            return None
        modes = [(module, module.training) for module in block.modules()]
        handle = first.register_forward_pre_hook(_stop)
        self._is_peeking = True
        try:
            for module, _ in modes:
                module.training = False
            block(*inputs)
        except _Seen as seen:
            return first.gates_at(seen.x)
        finally:
            self._is_peeking = False
            handle.remove()
            for module, was_training in modes:
                module.training = was_training
        raise GateError("gates: the block with the first gate does not run its gated layer")


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """The samples of a batch in another order, in the memory format that they have."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, order).permute(0, 3, 1, 2)
    return x.index_select(0, order)


class _Seen(Exception):  # noqa: N818  a message, not an error
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


def _stop(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    raise _Seen(inputs[0])


def key_of(group: str) -> str:
    """Name of a group's gate: a module's name has no dots."""
    return group.replace(".", "-")


def attach(model: nn.Module, layout: Layout, image_shape: tuple[int, ...]) -> tuple[nn.Module, Layout]:
    """Put gates on a network, in place, and on its layout.

    All gates start with every unit winning. The gates are the child ``gates`` of the network; its own keys stay. Which
    units a sub-model holds travels in the integer entries ``gates.*.units``; predictors are whole in every sub-model.

    Parameters
    ----------
    model : changed in place: layers around gates are replaced by gated ones with the same tensors.
    layout : of the model.
    image_shape : of one input, [channels, height, width].

    Raises
    ------
    GateError
        If the network has nothing to gate or has gates already.
    """
    if "gates" in dict(model.named_children()):
        raise GateError(f"gates: this {type(model).__name__} has a child 'gates' already")
    sites = find_sites(model, layout, image_shape)
    device = next(model.parameters()).device
    with torch.device(device):
        gates = Gates(sites, layout)
    for path, wiring in _wirings(gates).items():
        _swap(model, path, wiring)
    model.gates = gates
    model.register_forward_pre_hook(gates.on_start)
    model.register_forward_hook(gates.on_end)
    for block in dict.fromkeys(_block_of(layout, site) for site in sites):
        if block is not None:
            model.get_submodule(block.name).register_forward_pre_hook(gates.on_block)
    return model, _layout_with(layout, sites)


def gates_of(model: nn.Module) -> Gates:
    """The gates of a network.

    Raises
    ------
    GateError
        If it has none.
    """
    gates = dict(model.named_children()).get("gates")
    if not isinstance(gates, Gates):
        raise GateError(f"gates: this {type(model).__name__} has none; build it with gates=True")
    return gates


def executed_ratios(model: nn.Module) -> dict[str, float]:
    """Weight key -> share of the layer's multiply-accumulates that the last pass executed, for every gated layer."""
    return {
        f"{path}.weight": module.wiring.executed_ratio
        for path, module in model.named_modules()
        if isinstance(getattr(module, "wiring", None), Wiring) and not isinstance(module, nn.BatchNorm2d)
    }


def gated_groups(layout: Layout) -> tuple[Group, ...]:
    """The groups of a layout that have a gate."""
    return tuple(g for g in layout.groups if any(axis.key == f"{PREFIX}{key_of(g.name)}.units" for axis in g.axes))


def select_winners(layout: Layout, kept: Mapping[str, Any], spec: SubModelSpec) -> SubModelSpec:
    """``spec`` with the gated groups narrowed to ``kept``, group name -> units; a group kept whole is left out."""
    sizes = {group.name: group.size for group in layout.groups}
    narrowed = {name: units for name, units in kept.items() if len(units) < spec.width(layout, name)}
    assert all(name in sizes for name in narrowed)
    return SubModelSpec.of({**spec.units, **narrowed}, spec.depth)


def _wirings(gates: Gates) -> dict[str, list[tuple[str, Wiring]]]:
    """Path of each layer around gates -> its role and what it has to know."""
    found: dict[str, list[tuple[str, Wiring]]] = {}
    for site, gate in gates.pairs():
        execution = gates.execution
        has_norm = bool(site.norms)
        writer = Wiring(
            execution, gate=gate, repeat=site.input_repeat, is_rectified=site.is_rectified, is_last=not has_norm
        )
        found.setdefault(site.writer, []).append(("write", writer))
        found.setdefault(site.reader, []).append(("read", Wiring(execution, source=gate, repeat=site.repeat)))
        for index, path in enumerate(site.norms):
            found.setdefault(path, []).append(("norm", Wiring(execution, gate=gate, is_last=index == 0)))
        for path in site.depthwise:
            found.setdefault(path, []).append(("depthwise", Wiring(execution, gate=gate)))
    return found


def _swap(model: nn.Module, path: str, roles: list[tuple[str, Wiring]]) -> None:
    layer = model.get_submodule(path)
    wiring = roles[0][1]
    for _, other in roles[1:]:  # one layer reads one site and writes another
        gate = other.gate if wiring.gate is None else wiring.gate
        writer = other if wiring.gate is None else wiring
        wiring = replace(writer, gate=gate, source=wiring.source or other.source)
    kind: type[nn.Module] = {
        "norm": GatedNorm2d,
        "depthwise": GatedDepthwise2d,
    }.get(roles[0][0], GatedLinear if isinstance(layer, nn.Linear) else GatedConv2d)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, become(layer, kind, wiring))


def _block_of(layout: Layout, site: Site) -> Block | None:
    index = layout.block_of(f"{site.writer}.weight")
    return None if index is None else layout.blocks[index]


def _layout_with(layout: Layout, sites: tuple[Site, ...]) -> Layout:
    """The layout with the gates' entries: which units are held, and the inputs that are never gated."""
    axes: dict[str, list[Axis]] = {group.name: [] for group in layout.groups}
    owned: dict[str, list[str]] = {block.name: [] for block in layout.blocks}
    by_group = {site.group: site for site in sites}
    for site in sites:
        gate = f"{PREFIX}{key_of(site.group)}"
        axes[site.group].append(Axis(f"{gate}.units", 0))
        source = next(g.name for g, axis in layout.axes_of[f"{site.writer}.weight"] if axis.dim == 1)
        if source not in by_group:
            axes[source].append(Axis(f"{gate}.weight", 1))
        block = _block_of(layout, site)
        if block is not None:
            owned[block.name].append(f"{gate}.")
    groups = tuple(replace(group, axes=(*group.axes, *axes[group.name])) for group in layout.groups)
    blocks = tuple(replace(block, gates=tuple(owned[block.name])) for block in layout.blocks)
    return Layout(groups, blocks)
