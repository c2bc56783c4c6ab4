"""Cutting a model at a layer into the part that a client holds and the part that the server holds.

A model that can be cut is a row of *stages*, each reading what the one before it made. Both parts keep the names of the
full model's state dict, so that a part's entries are a subset of the full ones, and neither is a copy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.cost import Cost, measure_costs
from pruning.gates import Gates
from pruning.groups import Layout
from pruning.spec import FULL
from zoo.chain import BlockChain


class CutError(ValueError):
    """A model cannot be cut, or not there."""


class Part(nn.Module):
    """Some stages of a model in a row, under the names that they have in the full model.

    Attributes
    ----------
    stage_names : dotted paths, in the order of execution.
    """

    def __init__(self, stages: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.stage_names = tuple(name for name, _ in stages)
        for name, module in stages:
            holder: nn.Module = self
            *parents, leaf = name.split(".")
            for parent in parents:
                if parent not in holder._modules:
                    holder.add_module(parent, nn.Module())
                holder = holder.get_submodule(parent)
            holder.add_module(leaf, module)

    def forward(self, x: Tensor) -> Tensor:
        """Run the stages one after the other."""
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
        return x


@dataclass(frozen=True)
class CutModel:
    """The two parts of one model.

    Attributes
    ----------
    client : images [batch, ...] -> activations at the cut (the smashed data).
    server : activations at the cut -> logits [batch, num_classes].
    output : key prefix of the output layer: the last stage.
    """

    client: Part
    server: Part
    output: str


def stages_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The stages of a model in order, as (path, module) pairs.

    A zoo model's are its stem, its blocks and its head; a ``nn.Sequential``'s are its layers, those of nested ones
    included; any other model names them itself in a method ``stages()`` that returns such pairs.

    Raises
    ------
    CutError
        If the model is none of these, or has exit heads: split learning trains one output; or gates, which belong to
        the whole model.
    """
    if isinstance(dict(model.named_children()).get("gates"), Gates):
        raise CutError("cut: a model with gates is one piece, split learning needs two; use gates=False")
    if isinstance(model, BlockChain):
        if model.exits:
            raise CutError("cut: a model with exits has several outputs, split learning trains one; use exits=False")
        blocks = [(f"blocks.{index}", block) for index, block in enumerate(model.blocks)]
        return [("stem", model.stem), *blocks, ("heads.0", model.heads[0])]
    if _is_a_row(model):
        return list(_layers(model, ""))
    own = getattr(model, "stages", None)
    if callable(own):
        pairs: Iterable[tuple[str, nn.Module]] = own()
        return list(pairs)
    raise CutError(
        f"cut: {type(model).__name__} is no row of stages; use a zoo model or a nn.Sequential, or give the model a "
        "method stages() that returns its (path, module) pairs in order of execution"
    )


def _is_a_row(model: nn.Module) -> bool:
    """Whether a module runs its layers one after the other; a subclass may have a ``forward`` of its own."""
    return isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward


def _layers(model: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model._modules.items():  # named_children would leave out a layer that stands there twice
        assert child is not None
        if _is_a_row(child):
            yield from _layers(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def cut_model(model: nn.Module, layer: str) -> CutModel:
    """Cut behind ``layer``.

    Parameters
    ----------
    model : a row of stages (see ``stages_of``); its modules are shared, not copied.
    layer : path of the last layer that stays on the client: a stage, or a module that holds some (its last one counts).
        For a zoo model also the number of blocks on the client, ``1`` for ``blocks.0``.

    Raises
    ------
    CutError
        If there is no such layer, or nothing would be left for the client or for the server.
    """
    stages = stages_of(model)
    names = [name for name, _ in stages]
    wanted = layer
    if isinstance(model, BlockChain) and layer.lstrip("-").isdigit():
        num_blocks = len(model.blocks)
        if not 1 <= int(layer) <= num_blocks:
            raise CutError(f"cut: got {layer} blocks on the client, expected 1 to {num_blocks}: both need a part")
        wanted = f"blocks.{int(layer) - 1}"
    inside = [index for index, name in enumerate(names) if name == wanted or name.startswith(wanted + ".")]
    if not inside or not wanted:
        close = difflib.get_close_matches(layer, names[:-1], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise CutError(f"cut: no layer {layer!r}; this model can be cut behind {', '.join(names[:-1])}{hint}")
    client, server = stages[: inside[-1] + 1], stages[inside[-1] + 1 :]
    if not any(True for _, module in client for _ in module.parameters()):
        raise CutError(f"cut: behind {layer!r} the client would have nothing to train; cut later, e.g. {names[1]!r}")
    if not any(True for _, module in server for _ in module.parameters()):
        raise CutError(f"cut: behind {layer!r} nothing is left for the server to train; cut earlier")
    parts = Part(client), Part(server)
    wrong = sorted({key for part in parts for key in part.state_dict()} ^ set(model.state_dict()))
    if wrong:
        raise CutError(
            f"cut: the stages do not make up the model: {', '.join(wrong[:3])} only in one of the two; stages() must "
            "name every module that has weights, by its path in the model"
        )
    if {id(p) for p in parts[0].parameters()} & {id(p) for p in parts[1].parameters()}:
        raise CutError(f"cut: behind {layer!r} client and server would share weights; cut where none are shared")
    return CutModel(*parts, names[-1])


def smashed_shape(client: Part, image_shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of one sample's activations at the cut, [...], of a part without storage."""
    was_training = client.training
    client.eval()
    with torch.no_grad():
        shape = tuple(client(torch.empty(2, *image_shape, device="meta")).shape[1:])
    client.train(was_training)
    return shape


def cost_of(model: nn.Module, sample_shape: Sequence[int]) -> Cost:
    """What a model without storage costs, from its shapes.

    No gradient flows into the input.
    """
    return measure_costs(model, Layout(()), torch.empty(2, *sample_shape, device="meta")).of(FULL)
