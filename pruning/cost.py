"""What a sub-model costs, without building it: parameters, MACs, bytes, training memory.

Every quantity is a sum over state-dict entries of a constant times the kept sizes of the entry's axes. A convolution
of weight [num_out, num_in, k, k] applied at H * W positions costs ``num_out * num_in * k * k * H * W`` MACs, whatever
the spec keeps of ``num_out`` and ``num_in``. So the full model is traced once, and thousands of specs are then priced
in one vectorised expression.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from pruning.groups import Axis, Group, Layout
from pruning.ops import Saved, trace_ops
from pruning.spec import SubModelSpec


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
    frozen_activation_bytes : the same where the weights of linear layers and convolutions are frozen.
    """

    parameters: int
    macs: int
    train_macs: int
    bytes: int
    activation_bytes: int
    frozen_activation_bytes: int

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
    trainable : state-dict keys of the parameters; the others are buffers.
    shapes : of the full state dict.
    read : weight -> a copy of its input, bytes per sample.
    written : weight of a linear layer -> its output, bytes per sample.
    shared : weights of linear layers whose input is part of ``frozen_activation_bytes``.
    """

    layout: Layout
    terms: Mapping[str, tuple[Term, ...]]
    trainable: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    read: Mapping[str, Term]
    written: Mapping[str, Term]
    shared: frozenset[str]

    def of(self, spec: SubModelSpec) -> Cost:
        """Price of one spec."""
        widths = self._widths(spec)
        return Cost(**{name: int(self.price(name, widths, spec.depth)[0]) for name in Cost.__dataclass_fields__})

    def price(self, quantity: str, widths: np.ndarray, depth: int | None = None) -> np.ndarray:
        """Price many sub-models at once.

        Parameters
        ----------
        quantity : ``parameters``, ``prunable`` (parameters whose number depends on widths), ``macs``, ``train_macs``,
            ``bytes``, ``activation_bytes`` or ``frozen_activation_bytes``.
        widths : int [num_specs, num_groups], kept units in the order of ``layout.groups``.
        depth : blocks kept, None for all.

        Returns
        -------
        float64 [num_specs].
        """
        return self._sum(self.terms[quantity], widths, depth)

    def gate_bytes(self, groups: Iterable[Group], spec: SubModelSpec, trained: Container[str]) -> int:
        """Bytes per sample that gates on the units of ``groups`` keep beside ``frozen_activation_bytes``.

        Of a frozen linear layer the input, if nothing else keeps it; of convolutions and of ``trained`` weights the
        gated copy that they read. Of a layer whose units nothing reads, what it writes.
        """
        gated, written = set[str](), set[str]()
        for group in groups:
            gated |= {axis.key for axis in group.axes if axis.dim == 1 and axis.key in self.read}
            written |= set() if group.is_read else {axis.key for axis in group.axes if axis.key in self.written}
        kept = [self.read[key] for key in sorted(gated) if key not in self.shared or key in trained]
        kept += [self.written[key] for key in sorted(written)]
        return int(self._sum(kept, self._widths(spec), spec.depth)[0])

    def _widths(self, spec: SubModelSpec) -> np.ndarray:
        return np.array([[spec.width(self.layout, group.name) for group in self.layout.groups]])

    def _sum(self, terms: Iterable[Term], widths: np.ndarray, depth: int | None) -> np.ndarray:
        blocks = len(self.layout.blocks) if depth is None else depth
        columns = np.asarray(widths, dtype=np.float64).T
        total = np.zeros(columns.shape[1])
        for term in terms:
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


def measure_costs(model: nn.Module, layout: Layout, example: Tensor) -> CostModel:
    """Trace ``model`` once and return the prices of all its sub-models.

    Parameters
    ----------
    model : full model; a ``meta`` model is enough, only shapes are used.
    layout : its layout.
    example : one batch, [batch, ...], on the model's device.
    """
    tensors = model.state_dict()
    index = {group.name: i for i, group in enumerate(layout.groups)}
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
    trace = trace_ops(model, example)
    for product in trace.products:
        if product.key is not None:
            shape, block, num_entries = factors(product.key), layout.block_of(product.key), tensors[product.key].numel()
        else:
            group = _heads_group(layout, product.path)
            shape = () if group is None else (Factor(0, ((index[group], 1),)),)
            block, num_entries = layout.block_of(product.path + "."), 1 if group is None else layout.by_name[group].size
        terms["macs"].append(Term(product.macs / num_entries, shape, block))
        terms["train_macs"].append(Term(product.train_macs / num_entries, shape, block))

    def term_of(saved: Saved) -> Term:
        axis, size = factors(saved.key)[saved.dim], tensors[saved.key].shape[saved.dim]
        return Term(saved.bytes / size, (axis,), layout.block_of(saved.key))

    terms["activation_bytes"] = [term_of(saved) for saved in trace.saved]
    terms["frozen_activation_bytes"] = [term_of(saved) for saved in trace.saved if not saved.for_weight]
    read = {key: term_of(copy) for key, (copy, _) in trace.read.items()}
    linear = {key: trace.saved[index] for key, (_, index) in trace.read.items() if tensors[key].dim() == 2}
    position_bytes = {key: trace.read[key][0].bytes / tensors[key].shape[1] for key in linear}
    written = {key: Term(size, (factors(key)[0],), layout.block_of(key)) for key, size in position_bytes.items()}
    shared = frozenset(key for key, saved in linear.items() if not saved.for_weight)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    priced = {name: tuple(items) for name, items in terms.items()}
    return CostModel(layout, priced, frozenset(parameters), shapes, read, written, shared)


def _factor(size: int, axes: Sequence[tuple[int, int, Axis]]) -> Factor:
    """Split an axis of ``size`` positions into what groups own, given as (index, size, axis), and the fixed rest."""
    repeats: dict[int, int] = {}
    for index, units, axis in axes:
        repeats[index] = repeats.get(index, 0) + axis.repeat
        size -= units * axis.repeat
    return Factor(size, tuple(repeats.items()))


def _heads_group(layout: Layout, path: str) -> str | None:
    """The group of attention heads inside the module at ``path``."""
    for group in layout.groups:
        if any(axis.key.startswith(path + ".") and axis.repeat > 1 for axis in group.axes):
            return group.name
    return None
