"""What a sub-model costs, without building it: parameters, MACs, bytes, training memory.

Every quantity is a sum over state-dict entries of a constant times the kept sizes of the entry's axes. A convolution
of weight [num_out, num_in, k, k] applied at H * W positions costs ``num_out * num_in * k * k * H * W`` MACs, whatever
the spec keeps of ``num_out`` and ``num_in``. So the full model is traced once, and thousands of specs are then priced
in one vectorised expression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pruning.groups import Axis, Layout
from pruning.spec import SubModelSpec

Measure = Literal["parameters", "prunable", "macs", "bytes"]
MEASURES: tuple[str, ...] = ("parameters", "prunable", "macs", "bytes")


@dataclass(frozen=True)
class Factor:
    """Kept size of one axis: ``fixed + sum_g repeat_g * width_g`` over the groups that lie in it."""

    fixed: int
    groups: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Term:
    """``coefficient * prod(factors)``, present while the kept depth exceeds ``block``."""

    coefficient: float
    factors: tuple[Factor, ...]
    block: int | None = None


@dataclass(frozen=True)
class Cost:
    """Price of one sub-model.

    Attributes
    ----------
    parameters : trainable entries.
    macs : multiply-accumulates of one sample forward.
    train_macs : of one sample forward and backward.
    bytes : of the state dict as it travels.
    activation_bytes : kept for the backward pass, per sample.
    """

    parameters: int
    macs: int
    train_macs: int
    bytes: int
    activation_bytes: int

    def peak_memory_bytes(self, batch_size: int, optimizer_slots: int = 1) -> int:
        """Estimate of the training peak: weights, gradients, ``optimizer_slots`` states a weight, activations."""
        return self.bytes + 4 * self.parameters * (1 + optimizer_slots) + batch_size * self.activation_bytes


@dataclass(frozen=True)
class CostModel:
    """Prices specs of one model; made by ``measure_costs``.

    Attributes
    ----------
    layout : whose specs are priced.
    terms : quantity -> its terms.
    """

    layout: Layout
    terms: Mapping[str, tuple[Term, ...]]

    def of(self, spec: SubModelSpec) -> Cost:
        """Price of one spec."""
        widths = np.array([[spec.width(self.layout, group.name) for group in self.layout.groups]])
        return Cost(**{name: int(self.price(name, widths, spec.depth)[0]) for name in Cost.__dataclass_fields__})

    def price(self, quantity: str, widths: np.ndarray, depth: int | None = None) -> np.ndarray:
        """Price many sub-models at once.

        Parameters
        ----------
        quantity : ``parameters``, ``prunable`` (parameters whose number depends on widths), ``macs``, ``train_macs``,
            ``bytes`` or ``activation_bytes``.
        widths : int [num_specs, num_groups], kept units in the order of ``layout.groups``.
        depth : blocks kept, None for all.

        Returns
        -------
        float64 [num_specs].
        """
        blocks = len(self.layout.blocks) if depth is None else depth
        columns = np.asarray(widths, dtype=np.float64).T
        total = np.zeros(columns.shape[1])
        for term in self.terms[quantity]:
            if term.block is not None and term.block >= blocks:
                continue
            price: np.ndarray | float = term.coefficient
            for factor in term.factors:
                size: np.ndarray | float = factor.fixed
                for index, repeat in factor.groups:
                    size = size + repeat * columns[index]
                price = price * size
            total += price
        return total

    def retention_ratio(self, spec: SubModelSpec, quantity: str = "prunable") -> float:
        """Share of ``quantity`` that ``spec`` keeps."""
        sizes = np.array([[g.size for g in self.layout.groups], list(spec.widths(self.layout).values())])
        full = self.price(quantity, sizes[:1])[0]
        return float(self.price(quantity, sizes[1:], spec.depth)[0] / full) if full else 1.0


@dataclass(frozen=True)
class _Use:
    """How one module used its weight in the traced forward pass."""

    path: str
    positions: float
    input_elements: float
    is_first: bool
    shares_input: bool


def measure_costs(model: nn.Module, layout: Layout, example: Tensor) -> CostModel:
    """Trace ``model`` once and return the prices of all its sub-models.

    Parameters
    ----------
    model : full model; a ``meta`` model is enough, only shapes are used.
    layout : its layout.
    example : one batch, [batch, ...], on the model's device.
    """
    uses, attention = _trace(model, example)
    index = {group.name: i for i, group in enumerate(layout.groups)}
    tensors = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}
    terms: dict[str, list[Term]] = {name: [] for name in (*Cost.__dataclass_fields__, "prunable")}

    def factors(key: str) -> tuple[Factor, ...]:
        return tuple(
            _factor(size, [(index[g.name], g.size, a) for g, a in layout.axes_of.get(key, ()) if a.dim == dim])
            for dim, size in enumerate(tensors[key].shape)
        )

    for key, tensor in tensors.items():
        shape, block = factors(key), layout.block_of(key)
        terms["bytes"].append(Term(tensor.element_size(), shape, block))
        if key in parameters:
            terms["parameters"].append(Term(1, shape, block))
            if any(layout.by_name[g.name].exact for g, _ in layout.axes_of.get(key, ())) or block is not None:
                terms["prunable"].append(Term(1, shape, block))
    for use in uses:
        key = f"{use.path}.weight" if use.path else "weight"
        block = layout.block_of(key)
        if tensors[key].dim() > 1:
            terms["macs"].append(Term(use.positions, factors(key), block))
            terms["train_macs"].append(Term(use.positions * (2 if use.is_first else 3), factors(key), block))
        if not use.shares_input:
            in_dim = 1 if tensors[key].dim() > 1 and tensors[key].shape[1] > 1 else 0
            axis = factors(key)[in_dim]
            per_channel = use.input_elements / tensors[key].shape[in_dim]
            terms["activation_bytes"].append(Term(4 * per_channel, (axis,), block))
    for path, (num_tokens, head_dim, num_heads) in attention.items():
        group = _heads_group(layout, path)
        heads = Factor(num_heads) if group is None else Factor(0, ((index[group], 1),))
        block = layout.block_of(path + ".")
        macs = 2.0 * num_tokens**2 * head_dim
        terms["macs"].append(Term(macs, (heads,), block))
        terms["train_macs"].append(Term(3 * macs, (heads,), block))
        terms["activation_bytes"].append(Term(4.0 * 4 * num_tokens * head_dim, (heads,), block))
    return CostModel(layout, {name: tuple(items) for name, items in terms.items()})


def _factor(size: int, axes: Sequence[tuple[int, int, Axis]]) -> Factor:
    """Split an axis of ``size`` positions into what groups own, given as (index, size, axis), and the fixed rest."""
    repeats: dict[int, int] = {}
    for index, units, axis in axes:
        repeats[index] = repeats.get(index, 0) + axis.repeat
        size -= units * axis.repeat
    return Factor(size, tuple(repeats.items()))


def _heads_group(layout: Layout, path: str) -> str | None:
    for group in layout.groups:
        if any(axis.key.startswith(path + ".") and axis.repeat > 1 for axis in group.axes):
            return group.name
    return None


def _trace(model: nn.Module, example: Tensor) -> tuple[list[_Use], dict[str, tuple[int, int, int]]]:
    """Run one forward pass and note where each weight was used."""
    uses: list[_Use] = []
    attention: dict[str, tuple[int, int, int]] = {}
    seen: set[int] = set()
    alive: list[Tensor] = []
    batch = example.shape[0]

    def note(path: str, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if hasattr(module, "num_heads") and hasattr(module, "head_dim"):
            attention[path] = (inputs[0].shape[1], int(module.head_dim), int(module.num_heads))
            return
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or isinstance(module, nn.Embedding):
            return
        positions = output.numel() / output.shape[1] / batch
        if isinstance(module, nn.Linear):
            positions = output.numel() / output.shape[-1] / batch
        tensor = inputs[0]
        uses.append(_Use(path, positions, tensor.numel() / batch, tensor is example, id(tensor) in seen))
        seen.add(id(tensor))
        alive.append(tensor)

    handles = [
        module.register_forward_hook(lambda m, i, o, path=path: note(path, m, i, o))
        for path, module in model.named_modules()
    ]
    was_training = model.training
    try:
        model.eval()
        with torch.no_grad():
            model(example)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return uses, attention
