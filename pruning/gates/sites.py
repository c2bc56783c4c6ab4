"""Where gates fit into a network, read off its layout and one pass of an empty image.

A *site* is a group of units that one layer writes and one layer reads, with an activation in between that maps zero to
zero: the inner channels of a residual block, a chain's channels, a MobileNet block's expansion. What the residual
stream adds up is written by several layers and stays dense, and so does a layer that reads the images.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pruning.groups import Axis, Group, Layout
from pruning.watch import OperatorWatch, memory_of

MIN_WINNERS = 8
"""Fewest winners, and what their number is a multiple of: vector units work on so many channels at once."""

RECTIFIES = ("relu", "relu_")
KEEPS_SIGN = ("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "mean", "clone", "_unsafe_view")


class GateError(ValueError):
    """Gates cannot be put on a network, or not be used as asked."""


@dataclass(frozen=True)
class Site:
    """One group of units that can be gated.

    Attributes
    ----------
    group : its name in the layout; size: its units.
    writer : path of the convolution or linear layer whose outputs the units are.
    norms, depthwise : paths of the layers between writer and reader that work on each unit by itself.
    reader : path of the layer that reads them.
    repeat : inputs of the reader per unit: height * width after flattening, else 1.
    inputs : units that the writer reads; input_repeat: positions of each in its weight's columns.
    source : group of the site whose units these are; None where its input is never gated.
    is_rectified : whether the writer's input is known to be >= 0, so that its magnitude is its value.
    """

    group: str
    size: int
    writer: str
    norms: tuple[str, ...]
    depthwise: tuple[str, ...]
    reader: str
    repeat: int
    inputs: int
    input_repeat: int
    source: str | None
    is_rectified: bool


def num_winners(size: int, density: float) -> int:
    """k: ``density * size`` rounded to a multiple of 8, at least 8 and at most all.

    Raises
    ------
    GateError
        If ``density`` is outside (0, 1].
    """
    if not 0 < density <= 1:
        raise GateError(f"gates: density must be in (0, 1], got {density}")
    if density == 1:
        return size
    return min(size, max(MIN_WINNERS, MIN_WINNERS * int(density * size / MIN_WINNERS + 0.5)))


def find_sites(model: nn.Module, layout: Layout, image_shape: tuple[int, ...]) -> tuple[Site, ...]:
    """Every site of a network with more units than the fewest winners, in the order of the layout.

    Parameters
    ----------
    model : on any device; left as it was.
    image_shape : of one input, [channels, height, width].

    Raises
    ------
    GateError
        If there is none.
    """
    found = {}
    for group in layout.prunable:
        roles = _roles(model, group)
        if roles is not None and group.size > MIN_WINNERS:
            found[group.name] = roles
    passed = _watch(model, image_shape)
    sites = []
    for name, roles in found.items():
        weight = f"{roles.writer}.weight"
        sources = [(g, axis) for g, axis in layout.axes_of[weight] if axis.dim == 1]
        if len(sources) != 1 or not passed.takes_vectors_or_images(roles.writer):
            continue  # it reads the images, tokens, or a concatenation
        if not passed.is_rectified(roles.reader):
            continue  # nothing between writer and reader keeps a silent unit silent
        sites.append(
            Site(
                group=name,
                size=layout.by_name[name].size,
                writer=roles.writer,
                norms=tuple(roles.norms),
                depthwise=tuple(roles.depthwise),
                reader=roles.reader,
                repeat=roles.repeat,
                inputs=sources[0][0].size,
                input_repeat=sources[0][1].repeat,
                source=sources[0][0].name if sources[0][0].name in found else None,
                is_rectified=passed.is_rectified(roles.writer),
            )
        )
    names = {site.group for site in sites}
    if not sites:
        raise GateError(
            f"gates: this {type(model).__name__} has nothing to gate: no group of more than {MIN_WINNERS} units is "
            "written by one convolution or linear layer, rectified, and read by one other; choose a convolutional model"
        )
    return tuple(site if site.source in names else _without_source(site) for site in sites)


def _without_source(site: Site) -> Site:
    return replace(site, source=None)


@dataclass
class _Roles:
    """Paths of the layers that a group's axes lie in, by what they do to its units."""

    writer: str
    reader: str
    repeat: int
    norms: list[str] = field(default_factory=list)
    depthwise: list[str] = field(default_factory=list)


def _roles(model: nn.Module, group: Group) -> _Roles | None:
    """Who writes, works on and reads the units; None if that is not one writer and one reader."""
    writers: list[str] = []
    readers: list[tuple[str, int]] = []
    norms: list[str] = []
    depthwise: list[str] = []
    for axis in group.axes:
        path = axis.key.rpartition(".")[0]
        kind = _kind(model.get_submodule(path), axis)
        if kind is None:
            return None
        known = {"write": writers, "norm": norms, "depthwise": depthwise}.get(kind)
        if known is None:
            readers.append((path, axis.repeat))
        elif path not in known:
            known.append(path)
    if len(writers) != 1 or len(readers) != 1 or readers[0][0] == writers[0]:
        return None
    return _Roles(writers[0], *readers[0], norms, depthwise)


def _kind(module: nn.Module, axis: Axis) -> str | None:
    """What a layer does to the units of one of its axes; None for what gates do not know."""
    if axis.offset:
        return None
    if isinstance(module, nn.BatchNorm2d):
        return "norm" if module.affine and module.track_running_stats and axis.repeat == 1 else None
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "depthwise" if axis.dim == 0 and module.groups == module.in_channels == module.out_channels else None
    if isinstance(module, nn.Conv2d | nn.Linear) and not (isinstance(module, nn.Conv2d) and axis.repeat != 1):
        if axis.dim == 1:
            return "read"
        return "write" if axis.repeat == 1 else None
    return None


# --- one pass of an empty image --------------------------------------------------------------------------------------


@dataclass
class _Passed:
    """What every layer was given: whether it is known to be >= 0, and how many axes it has."""

    rectified: dict[str, bool] = field(default_factory=dict)
    num_axes: dict[str, int] = field(default_factory=dict)

    def is_rectified(self, path: str) -> bool:
        return self.rectified.get(path, False)

    def takes_vectors_or_images(self, path: str) -> bool:
        return self.num_axes.get(path) in (2, 4)


class _Signs(OperatorWatch):
    """Follows which memory is known to hold no negative number."""

    def __init__(self) -> None:
        super().__init__()
        self._rectified: dict[int, Tensor] = {}

    def knows(self, tensor: Tensor) -> bool:
        return memory_of(tensor) in self._rectified

    def note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        first = result[0] if isinstance(result, tuple | list) else result
        if isinstance(first, Tensor):
            # In-place functions share their argument's memory, whatever was known of it before.
            if name.endswith("_") and name not in RECTIFIES:
                self._rectified.pop(memory_of(first), None)
            if name in RECTIFIES or (name in ("hardtanh", "hardtanh_") and len(args) > 1 and args[1] >= 0):
                self._rectified[memory_of(first)] = first  # held, so that no other tensor can take its place
            elif name in KEEPS_SIGN and isinstance(args[0], Tensor) and self.knows(args[0]):
                self._rectified[memory_of(first)] = first


def _watch(model: nn.Module, image_shape: tuple[int, ...]) -> _Passed:
    """Pass an image of zeros through a copy, and note what every layer gets.

    On real memory: the first pass on ``meta`` loads PyTorch's compiler, 1.4 s and 70 MB in every fresh process.
    """
    zeros = {key: torch.zeros(t.shape, dtype=t.dtype, device="cpu") for key, t in model.state_dict().items()}
    twin = copy.deepcopy(model).eval()
    twin.load_state_dict(zeros, assign=True)
    signs, passed = _Signs(), _Passed()

    def note(path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                passed.rectified[path] = signs.knows(inputs[0])
                passed.num_axes[path] = inputs[0].dim()

        return hook

    for path, module in twin.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(note(path))
    with torch.device("cpu"), torch.no_grad(), signs:
        twin(torch.zeros(1, *image_shape))
    return passed
