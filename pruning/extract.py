"""Extract and embed: from the full model to a client's share and back. And ``resize``: the share as a module."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pruning.groups import Axis, Group, Layout
from pruning.rows import gather
from pruning.spec import SubModelSpec

State = Mapping[str, Tensor]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
Model = TypeVar("Model", bound=nn.Module)


class StateError(ValueError):
    """A state dict does not have the entries or shapes that its spec asks for."""


@dataclass(frozen=True)
class Selection:
    """Where one spec's entries lie in the full state dict: what ``layout`` and ``spec`` mean for given shapes.

    Attributes
    ----------
    positions : key -> one item per axis: ``None`` for the whole axis or the sorted kept positions, int64 [num_kept].
        Keys of blocks beyond the kept depth are absent.
    """

    positions: Mapping[str, tuple[np.ndarray | None, ...]]

    def shape_of(self, key: str, full_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of ``key`` in the sub-model."""
        return tuple(
            full if kept is None else len(kept) for full, kept in zip(full_shape, self.positions[key], strict=True)
        )


def shapes_of(state: State) -> Shapes:
    """Shapes of a state dict as a hashable value."""
    return tuple((key, tuple(tensor.shape)) for key, tensor in state.items())


def is_statistic(key: str) -> bool:
    """Whether an entry is a running statistic of BatchNorm, which no gradient moves."""
    return key.endswith((".running_mean", ".running_var"))


def is_variance(key: str) -> bool:
    """Whether an entry is a running variance of BatchNorm, which has to stay positive."""
    return key.endswith(".running_var")


@lru_cache(maxsize=128)
def selection(layout: Layout, spec: SubModelSpec, shapes: Shapes) -> Selection:
    """Return where ``spec`` lies in a state dict of ``shapes``.

    Raises
    ------
    SpecError
        If the spec does not fit the layout.
    """
    spec.check(layout)
    constrained = {name: units for name, units in spec.arrays.items() if len(units) < layout.by_name[name].size}
    depth = len(layout.blocks) if spec.depth is None else spec.depth
    positions: dict[str, tuple[np.ndarray | None, ...]] = {}
    for key, shape, block in _keys_with_blocks(layout, shapes):
        if block is not None and block >= depth:
            continue
        kept: list[np.ndarray | None] = [None] * len(shape)
        shared: dict[int, list[tuple[Group, Axis]]] = {}
        for group, axis in layout.axes_of.get(key, ()):
            if group.name in constrained:
                shared.setdefault(axis.dim, []).append((group, axis))
        for dim, pairs in shared.items():
            kept[dim] = _axis_positions(pairs, constrained, shape[dim])
        positions[key] = tuple(kept)
    return Selection(positions)


@lru_cache(maxsize=16)
def _keys_with_blocks(layout: Layout, shapes: Shapes) -> tuple[tuple[str, tuple[int, ...], int | None], ...]:
    return tuple((key, shape, layout.block_of(key)) for key, shape in shapes)


def _axis_positions(pairs: list[tuple[Group, Axis]], constrained: Mapping[str, np.ndarray], size: int) -> np.ndarray:
    """Kept positions of one axis: what no constrained group owns, and what their kept units own."""
    group, axis = pairs[0]
    if len(pairs) == 1 and axis.repeat == 1 and group.size == size:
        return constrained[group.name]
    mask = np.ones(size, dtype=bool)
    for group, axis in pairs:
        owned = mask[axis.offset : axis.offset + group.size * axis.repeat].reshape(group.size, axis.repeat)
        owned[:] = False
        owned[constrained[group.name]] = True
    return np.flatnonzero(mask)


def relative(
    outer: tuple[np.ndarray | None, ...], inner: tuple[np.ndarray | None, ...]
) -> tuple[np.ndarray | None, ...]:
    """Where the kept positions ``inner`` lie within a tensor that holds only those of ``outer``, a superset."""
    return tuple(
        wanted if held is None or wanted is None else np.searchsorted(held, wanted)
        for held, wanted in zip(outer, inner, strict=True)
    )


def extract(state: State, layout: Layout, spec: SubModelSpec) -> dict[str, Tensor]:
    """Cut one client's sub-model out of a full state dict.

    Parameters
    ----------
    state : full state dict; an entry has shape [size_0, size_1, ...].
    layout : what can be pruned in it.
    spec : what this client keeps.

    Returns
    -------
    dict
        Contiguous tensors in the order of ``state``. Entries kept whole are returned as they are, not copied.
    """
    chosen = selection(layout, spec, shapes_of(state))
    return {key: gather(state[key], kept).contiguous() for key, kept in chosen.positions.items()}


def narrow(sub_state: State, layout: Layout, spec: SubModelSpec, narrowed: SubModelSpec, shapes: Shapes) -> State:
    """Cut a part out of a sub-model.

    Parameters
    ----------
    sub_state : entries of ``spec``; those that it lacks are left out.
    narrowed : a part of ``spec``.
    shapes : of the full state dict.
    """
    outer, inner = (selection(layout, item, shapes).positions for item in (spec, narrowed))
    return {key: gather(sub_state[key], relative(outer[key], kept)) for key, kept in inner.items() if key in sub_state}


def embed(
    sub_state: State, layout: Layout, spec: SubModelSpec, like: State
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Put a sub-model back to its places.

    Parameters
    ----------
    sub_state : what ``extract`` returned for ``spec``, or its trained successor.
    like : full state dict; gives the shapes, and the values where the spec holds nothing.

    Returns
    -------
    state, coverage
        Full state dict, and per key a boolean tensor of the same shape that is true where ``sub_state`` was put.

    Raises
    ------
    StateError
        If ``sub_state`` lacks an entry of the spec, has one too many, or one of another shape.
    """
    chosen = selection(layout, spec, shapes_of(like))
    check_state(sub_state, chosen, like)
    state = {key: tensor.clone() for key, tensor in like.items()}
    coverage = {key: torch.zeros(tensor.shape, dtype=torch.bool) for key, tensor in like.items()}
    for key, kept in chosen.positions.items():
        where = mesh(kept, tuple(like[key].shape))
        state[key][where] = sub_state[key].to(state[key].dtype)
        coverage[key][where] = True
    return state, coverage


def mesh(kept: tuple[np.ndarray | None, ...], shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Broadcastable index tensors, one per axis, that address the kept entries of a tensor of ``shape``."""
    num_axes = len(shape)
    return tuple(
        torch.as_tensor(np.arange(size) if index is None else index).reshape(
            [-1 if d == dim else 1 for d in range(num_axes)]
        )
        for dim, (size, index) in enumerate(zip(shape, kept, strict=True))
    )


def check_state(sub_state: State, chosen: Selection, full: State) -> None:
    """Raise ``StateError`` unless ``sub_state`` has exactly the entries and shapes of ``chosen``."""
    missing, extra = chosen.positions.keys() - sub_state.keys(), sub_state.keys() - chosen.positions.keys()
    if missing or extra:
        raise StateError(f"sub-model state: missing entries {sorted(missing)}, unexpected entries {sorted(extra)}")
    for key in chosen.positions:
        expected = chosen.shape_of(key, tuple(full[key].shape))
        if tuple(sub_state[key].shape) != expected:
            raise StateError(
                f"sub-model state: {key!r} should have shape {expected}, got {tuple(sub_state[key].shape)}"
            )


# --- the sub-model as a module ---------------------------------------------------------------------------------------


def resize(model: Model, layout: Layout, spec: SubModelSpec) -> Model:
    """Return a physically small copy of ``model``: plain shapes, no masks; it loads the extracted state strictly.

    The copy holds the weights of its units. A model on the ``meta`` device stays there, so that a client can build,
    resize and load without ever allocating the full model.

    Raises
    ------
    SpecError
        If the spec does not fit the layout.
    """
    sub_state = extract(model.state_dict(), layout, spec)
    small = copy.deepcopy(model)
    if spec.depth is not None:
        for block in reversed(layout.blocks[spec.depth :]):
            _drop(small, block.owned)
    owners = dict(small.named_modules())
    for key, tensor in sub_state.items():
        path, _, name = key.rpartition(".")
        _set_tensor(owners[path], name, tensor)
    for module in small.modules():
        _sync_attributes(module)
    return small


def _drop(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Remove the modules that own ``prefixes`` from their parents."""
    for prefix in prefixes:
        parent_path, _, name = prefix.rstrip(".").rpartition(".")
        parent = model.get_submodule(parent_path)
        if name in parent._modules:
            del parent._modules[name]


def _set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        old = module._parameters[name]
        assert old is not None
        if old.shape != tensor.shape:
            module._parameters[name] = nn.Parameter(tensor.detach().clone(), requires_grad=old.requires_grad)
    elif name in module._buffers:
        module._buffers[name] = tensor.detach().clone()
    else:
        raise StateError(f"module {type(module).__name__} keeps {name!r} neither as parameter nor as buffer")


def _sync_attributes(module: nn.Module) -> None:
    """Make a layer's own idea of its widths agree with its tensors."""
    if isinstance(module, nn.modules.conv._ConvNd):
        out_channels, in_per_group = module.weight.shape[:2]
        if module.groups > 1 and in_per_group == 1 and module.groups == module.in_channels:
            module.groups = out_channels // (module.out_channels // module.groups)
        module.out_channels, module.in_channels = out_channels, in_per_group * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensor = module.weight if module.weight is not None else module.running_mean
        if tensor is not None:
            module.num_features = tensor.shape[0]
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif hasattr(module, "num_heads") and hasattr(module, "head_dim"):
        qkv = getattr(module, "qkv", None)
        if isinstance(qkv, nn.Linear):
            attention: Any = module  # timm's: it reads these attributes
            attention.num_heads = qkv.weight.shape[0] // (3 * attention.head_dim)
            if hasattr(attention, "attn_dim"):
                attention.attn_dim = attention.num_heads * attention.head_dim
