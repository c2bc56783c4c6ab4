"""What one forward pass multiplies and what it keeps for the backward pass, by state-dict entry.

The pass is watched at the level of PyTorch's own operators, whatever modules or functions a model is made of: products
with a weight are recognised by the memory the weight lies in, products of two activations are attention's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pruning.watch import OperatorWatch, memory_of

NORMS = ("native_batch_norm", "cudnn_batch_norm", "native_group_norm", "native_layer_norm")
KEEPS_INPUT = ("gelu", "silu", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu", "max_pool2d_with_indices")
KEEPS_OUTPUT = ("relu", "relu_", "sigmoid", "tanh")


@dataclass(frozen=True)
class Product:
    """One matrix product or convolution, per sample.

    Attributes
    ----------
    key : of the weight; None for a product of two activations.
    path : of the module it happened in.
    macs, train_macs : multiply-accumulates forward, and forward and backward: no gradient flows into the input data,
        nor into weights that are frozen.
    """

    key: str | None
    path: str
    macs: float
    train_macs: float


@dataclass(frozen=True)
class Saved:
    """One activation kept for the backward pass.

    Attributes
    ----------
    key, dim : an axis that its size is proportional to.
    bytes : per sample.
    for_weight : kept only for the gradient of a linear layer's weight, so not where that is frozen.
    """

    key: str
    dim: int
    bytes: float
    for_weight: bool = False


@dataclass
class Trace:
    """All products and all kept activations of one forward pass.

    Attributes
    ----------
    products, saved : each once.
    read : weight -> what a copy of its input takes, and where the input lies in ``saved``.
    """

    products: list[Product] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    read: dict[str, tuple[Saved, int]] = field(default_factory=dict)


def trace_ops(model: nn.Module, example: Tensor) -> Trace:
    """Run one forward pass in evaluation mode and note its operators.

    Parameters
    ----------
    model : on any device; left as it was.
    example : one batch, [batch, ...], on the same device.
    """
    watch = _Watch(model, len(example))
    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, i, path=path: watch.paths.append(path)))
        handles.append(module.register_forward_hook(lambda m, i, o: watch.leave()))
    was_training = model.training
    try:
        model.eval()
        with torch.enable_grad(), watch:
            model(example)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return watch.trace


class _Watch(OperatorWatch):
    """Notes the operators that are called while it is active."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        super().__init__()
        self.trace, self.paths, self._batch = Trace(), [""], batch
        self._keys = {memory_of(p): (key, p.shape) for key, p in model.named_parameters(remove_duplicate=False)}
        self._kept: dict[int, tuple[Tensor, int]] = {}
        self._last: tuple[str, int] | None = None

    def leave(self) -> None:
        """The innermost module is done."""
        self.paths.pop()

    def note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name in ("convolution", "_convolution"):
            x, weight = args[:2]
            mapped = x if args[6] else result  # a transposed convolution has a product for every input position
            positions = mapped.numel() / mapped.shape[1]
            self._note_weighted(x, weight, positions * weight.numel(), is_linear=False)
        elif name in ("mm", "bmm", "addmm", "baddbmm"):
            x, weight = args[-2:] if name in ("mm", "bmm") else args[1:3]
            self._note_product(x, weight, float(x.numel()) * weight.shape[-1])
        elif name.startswith("_scaled_dot_product") and not name.endswith("backward"):
            q, k, v = args[:3]
            num_pairs = float(q.numel()) / q.shape[-1] * k.shape[-2]
            self._note_product(q, k, num_pairs * q.shape[-1])
            self._note_product(q, v, num_pairs * v.shape[-1])
        elif name in NORMS:
            weight = args[2] if name == "native_layer_norm" else args[1]
            if isinstance(weight, Tensor) and memory_of(weight) in self._keys:
                self._last = (self._keys[memory_of(weight)][0], 0)
                self._keep(args[0], *self._last)
        elif name in KEEPS_INPUT + KEEPS_OUTPUT and self._last is not None:
            self._keep(args[0] if name in KEEPS_INPUT else result, *self._last)
            if name == "max_pool2d_with_indices":
                self._keep(result[1], *self._last)

    def _note_product(self, a: Tensor, b: Tensor, macs: float) -> None:
        for x, weight in ((a, b), (b, a)):
            if memory_of(weight) in self._keys:
                self._note_weighted(x, weight, macs)
                return
        macs /= self._batch
        self.trace.products.append(Product(None, self.paths[-1], macs, 3 * macs))
        if self._last is not None:
            for x in (a, b):
                self._keep(x, *self._last)

    def _note_weighted(self, x: Tensor, weight: Tensor, macs: float, is_linear: bool = True) -> None:
        if memory_of(weight) not in self._keys:
            return
        key, shape = self._keys[memory_of(weight)]
        macs /= self._batch
        self.trace.products.append(
            Product(key, self.paths[-1], macs, macs * (1 + x.requires_grad + weight.requires_grad))
        )
        dim = 1 if len(shape) > 1 and shape[1] > 1 else 0
        self._keep(x, key, dim, for_weight=is_linear)
        copy = Saved(key, dim, x.numel() * x.element_size() / self._batch)
        self.trace.read[key] = (copy, self._kept[memory_of(x)][1])
        self._last = (key, 0)

    def _keep(self, tensor: Tensor, key: str, dim: int, for_weight: bool = False) -> None:
        """Note a tensor kept for the backward pass; each stretch of memory once."""
        memory, saved = memory_of(tensor), self.trace.saved
        if memory not in self._kept and memory not in self._keys:
            self._kept[memory] = (tensor, len(saved))  # held on to, so that no other tensor can take its place
            saved.append(Saved(key, dim, tensor.untyped_storage().nbytes() / self._batch, for_weight))
        elif memory in self._kept and not for_weight:
            index = self._kept[memory][1]
            saved[index] = replace(saved[index], for_weight=False)
