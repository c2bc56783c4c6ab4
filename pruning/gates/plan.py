"""Where gating pays: every gated layer timed on this device, whole and compact, gates included.

A layer whose predictor costs more than it saves is left dense: gated by nothing, as if it had no gate. On CPUs that
is the case of narrow layers and of batches of one.

A plan has to be in force while the network is trained. A layer left dense loses its gate, values and all, so that a
plan put on a network that was trained without it makes another function of it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruning.gates.gate import Gate
from pruning.gates.layers import Wiring
from pruning.gates.net import Gates, gates_of
from pruning.gates.sites import Site

PLAN = "gates.plan"
"""Name under which the times of a plan travel."""

MARGIN = 0.95
"""Compact execution has to take at most this share of a layer's time whole: a clock is never exact."""


@dataclass(frozen=True)
class LayerPlan:
    """What was measured of one layer: from what writes its units to what reads them.

    Attributes
    ----------
    group : of its units.
    dense_s, gated_s : seconds of one pass, forward and, where planned for training, backward.
    """

    group: str
    dense_s: float
    gated_s: float

    @property
    def is_gated(self) -> bool:
        """Whether gating pays."""
        return self.gated_s <= MARGIN * self.dense_s


_measured: dict[tuple[Any, ...], tuple[float, float]] = {}
"""Layers measured in this process: many layers of a network are alike, and a device is measured once."""


def measure_plan(model: nn.Module, images: Tensor, *, training: bool, repeats: int = 5) -> tuple[LayerPlan, ...]:
    """Time every layer that has a gate in force, at the present density and as configured.

    Where every unit wins there is nothing to save, but a predictor to pay for: these layers are timed like all others.

    Parameters
    ----------
    model : with gates, on the device that is planned for; left as it was.
    images : one batch as it will come, [batch, channels, height, width], in its memory format.
    training : whether passes forward and backward are planned, or inference.
    repeats : the fastest of so many counts.
    """
    twin = copy.deepcopy(model).train(training)
    gates = gates_of(twin)
    execution = gates.execution
    wanted = {site.group: gate.k for site, gate in gates.pairs()}
    inputs = _record_inputs(twin, gates, images)
    execution.is_compact, execution.sizes = True, _even(len(images), execution.num_groups)
    plans = []
    for site, gate in gates.pairs():
        k = wanted[site.group]
        if not k:
            continue
        x, z = inputs[site.writer], inputs[site.reader]
        key: tuple[Any, ...] = (
            len(site.norms),
            len(site.depthwise),
            site.is_rectified,
            x.shape,
            x.stride(),
            z.shape,
            k,
            str(x.device),
            *_forms(twin, site),
        )
        key += (training, execution.share, execution.num_groups, torch.get_num_threads())
        if key not in _measured:
            run = partial(_pass, twin, site, gate, x, z, training)
            _measured[key] = _take_turns(gate, k, run, repeats)
        plans.append(LayerPlan(site.group, *_measured[key]))
    return tuple(plans)


def _forms(model: nn.Module, site: Site) -> list[tuple[Any, ...]]:
    """What the inputs' shapes leave open of the products around a gate: a 1x1 and a 3x3 convolution may swap places."""
    layers = [(path, model.get_submodule(path)) for path in (site.writer, *site.depthwise, site.reader)]
    return [
        (
            tuple(model.get_parameter(f"{path}.weight").shape),
            getattr(layer, "stride", None),
            getattr(layer, "dilation", 1),
        )
        for path, layer in layers
    ]


def _record_inputs(model: nn.Module, gates: Gates, images: Tensor) -> dict[str, Tensor]:
    """Random stand-ins for what every layer around a gate is given while no gate is active; none stays active."""
    found: dict[str, Tensor] = {}

    def record(path: str) -> Any:
        return lambda module, inputs: found.update({path: torch.rand_like(inputs[0].detach())})

    handles = [
        module.register_forward_pre_hook(record(path))
        for path, module in model.named_modules()
        if isinstance(getattr(module, "wiring", None), Wiring)
    ]
    for _, gate in gates.pairs():
        gate.num_winners.fill_(0)
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def _even(num_samples: int, num_groups: int) -> tuple[int, ...]:
    return tuple(len(part) for part in torch.arange(num_samples).tensor_split(min(num_groups, num_samples)))


def _pass(model: nn.Module, site: Site, gate: Gate, x: Tensor, z: Tensor, training: bool) -> None:
    """Once from the writer to the reader; where the network pools in between, the reader gets an input of its own."""
    with torch.set_grad_enabled(training):
        h = model.get_submodule(site.writer)(x.detach().requires_grad_(training))
        for norm, depthwise in _in_order(site):
            h = model.get_submodule(depthwise)(h) if depthwise else h
            h = functional.relu(model.get_submodule(norm)(h)) if norm else h
        losses = [h]
        if h.shape[0] != z.shape[0] or h.shape[2:] != z.shape[2:]:
            share = z if gate.winners is None else z[:, : gate.k * site.repeat]
            h = share.contiguous(memory_format=_format_of(z)).requires_grad_(training)
        losses.append(model.get_submodule(site.reader)(h))
        if training:
            outputs = losses[1:] if losses[0] is h else losses
            torch.autograd.backward([t.sum() for t in outputs])


def _in_order(site: Site) -> list[tuple[str | None, str | None]]:
    """Normalisations, each with the depthwise convolution before it."""
    if not site.norms:
        return [(None, None)]
    depthwise = [None] * (len(site.norms) - len(site.depthwise)) + list(site.depthwise)
    return list(zip(site.norms, depthwise, strict=True))


def _format_of(x: Tensor) -> torch.memory_format:
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def _take_turns(gate: Gate, k: int, run: Callable[[], None], repeats: int) -> tuple[float, float]:
    """The fastest of ``repeats`` runs without the gate and with it, in seconds; in turns, under the same noise."""
    fastest = [float("inf")] * 2
    for turn in range(repeats + 1):
        for index, num_winners in enumerate((0, k)):
            gate.num_winners.fill_(num_winners)
            gate.winners = None
            _wait()
            began = time.perf_counter()
            run()
            _wait()
            if turn:  # the first warms up
                fastest[index] = min(fastest[index], time.perf_counter() - began)
    gate.num_winners.fill_(0)
    gate.winners = None
    return fastest[0], fastest[1]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
