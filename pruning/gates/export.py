"""A gated network made ready for inference: compact, normalisations folded into convolutions, nothing to train."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pruning.gates.layers import GatedDepthwise2d, Wiring
from pruning.gates.net import gates_of
from pruning.gates.sites import GateError
from pruning.watch import OperatorWatch, memory_of

TOLERANCE = 1e-3
"""Largest relative difference of logits that folding may make in float32."""


@torch.no_grad()
def for_inference(
    model: nn.Module, image_shape: tuple[int, ...], share: str = "sample", num_groups: int = 4
) -> nn.Module:
    """A copy of a gated network that computes the same in evaluation, faster; it cannot be trained or executed whole.

    Layers whose gate is inactive (``num_winners`` 0) run dense. The copy is proved on random images before it is given
    away.

    Parameters
    ----------
    model : with gates, with real weights; left as it was.
    image_shape : of one input, [channels, height, width].
    share : who shares winners: ``sample`` needs no other images and answers the same for every batch.

    Raises
    ------
    GateError
        If the model has no gates, or the copy does not compute the same.
    """
    small = copy.deepcopy(model).eval().requires_grad_(False)
    gates_of(small).configure(share, compact=True, num_groups=num_groups)
    fold_norms(small, image_shape)
    _drop_inactive(small)
    reference = copy.deepcopy(model).eval()
    gates_of(reference).configure(share, compact=True, num_groups=num_groups)
    images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()))
    got, expected = (net(images) for net in (small, reference))
    pairs = zip(got, expected, strict=True) if isinstance(got, list | tuple) else [(got, expected)]
    for mine, theirs in pairs:
        gap = float((mine - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
        if not gap <= TOLERANCE:
            raise GateError(
                f"gates: the model for inference differs from the model by {gap:.3g}; deploy the model itself"
            )
    return small


def _drop_inactive(model: nn.Module) -> None:
    """Layers around inactive gates become ordinary again; without an active gate nothing else is left of gates."""
    for path, layer in list(model.named_modules()):
        wiring = getattr(layer, "wiring", None)
        if not isinstance(wiring, Wiring):
            continue
        around = [gate for gate in (wiring.source, wiring.gate) if gate is not None]
        if any(gate.k for gate in around):
            continue
        kind: type[nn.Module] = next(base for base in type(layer).__mro__ if base.__module__.startswith("torch.nn"))
        plain: nn.Module = kind.__new__(kind)
        plain.__dict__ = {name: value for name, value in layer.__dict__.items() if name != "wiring"}
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, plain)
    gates = gates_of(model)
    if gates.execution.share != "group" or not any(gate.k for _, gate in gates.pairs()):
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for number in [n for n, hook in hooks.items() if getattr(hook, "__self__", None) is gates]:
                    del hooks[number]


@torch.no_grad()
def fold_norms(model: nn.Module, image_shape: tuple[int, ...]) -> None:
    """Fold every normalisation that reads a convolution's output into that convolution, in place, for evaluation.

    Works on networks with gates and without.
    """
    layers = dict(model.named_modules())
    for path, norm_path in _pairs(model, image_shape):
        conv, norm = layers[path], layers[norm_path]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if conv.bias is not None:
            bias = bias + conv.bias * scale
        conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
        conv.bias = nn.Parameter(bias, requires_grad=False)
        wiring = getattr(norm, "wiring", None)
        if isinstance(wiring, Wiring) and wiring.is_last and not isinstance(conv, GatedDepthwise2d):
            conv.wiring.is_last = True  # type: ignore[union-attr]
        parent, _, name = norm_path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())


def _pairs(model: nn.Module, image_shape: tuple[int, ...]) -> list[tuple[str, str]]:
    """Convolutions and the normalisations that alone read what they wrote, found in one pass in evaluation."""
    written: dict[int, tuple[str, Tensor]] = {}
    pairs: dict[int, tuple[str, str]] = {}

    def wrote(path: str) -> Any:
        return lambda module, inputs, output: written.update({memory_of(output): (path, output)})

    def reads(path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            memory = memory_of(inputs[0])
            if memory in written:
                pairs[memory] = (written[memory][0], path)

        return hook

    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(wrote(path)))
        elif isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(reads(path)))
    with _Uses(written) as uses:
        model(torch.zeros(2, *image_shape).to(next(model.parameters())))
    for handle in handles:
        handle.remove()
    # a layer that a grouped network peeks at runs twice
    return list(dict.fromkeys(pair for memory, pair in pairs.items() if uses.counts[memory] == 1))


class _Uses(OperatorWatch):
    """Counts the operators that read each of the tensors in ``written``, by memory."""

    def __init__(self, written: Mapping[int, object]) -> None:
        super().__init__()
        self._written, self.counts = written, Counter[int]()

    def note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        self.counts.update({memory_of(x) for x in args if isinstance(x, Tensor)} & self._written.keys())
