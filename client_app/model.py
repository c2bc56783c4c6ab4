"""The models of a run: built as ``ModelConfig`` says, cut down to specs, priced; without storage until filled.

A process builds and prices each of them once, whatever number of requests it serves.
"""

from __future__ import annotations

import copy
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from pruning.cost import Cost, CostModel, measure_costs
from pruning.extract import resize
from pruning.groups import Layout
from pruning.spec import FULL, SubModelSpec
from wire.message import ModelConfig, State
from zoo import get_model, model_names

META = torch.device("meta")


def build_model(config: ModelConfig, num_classes: int, shape: tuple[int, int, int]) -> tuple[nn.Module, Layout]:
    """The full model with fresh weights, and its layout."""
    return get_model(config.name, num_classes, shape[0], shape[1], **model_options(config))


def model_options(config: ModelConfig) -> dict[str, Any]:
    """The options that the model is asked for with: those that differ from what every model does by itself."""
    options: dict[str, Any] = {} if config.width == 1 else {"width": config.width}
    options |= {name: True for name in ("exits", "scales", "gates", "residual_outputs") if getattr(config, name)}
    return options | ({"patch_size": config.patch_size} if config.patch_size else {})


@lru_cache(maxsize=4)
def full_model(config: ModelConfig, num_classes: int, shape: tuple[int, int, int]) -> tuple[nn.Module, Layout]:
    """The full model without storage, and its layout."""
    build = partial(build_model, config, num_classes, shape)
    if config.name not in model_names():  # a layout is traced on real tensors
        model, layout = build()
        return model.to(META), layout
    with META:
        return build()


@lru_cache(maxsize=64)
def sub_model(
    config: ModelConfig, num_classes: int, shape: tuple[int, int, int], spec: SubModelSpec
) -> tuple[nn.Module, Layout, Cost]:
    """The sub-model of ``spec`` without storage, the full layout, and what it costs."""
    full, layout = full_model(config, num_classes, shape)
    small = resize(full, layout, spec) if spec != FULL else full
    return small, layout, costs_of(config, num_classes, shape, spec).of(FULL)


@lru_cache(maxsize=64)
def costs_of(config: ModelConfig, num_classes: int, shape: tuple[int, int, int], spec: SubModelSpec) -> CostModel:
    """Costs of the sub-model of ``spec``, as a whole."""
    full, layout = full_model(config, num_classes, shape)
    return measured(resize(full, layout, spec) if spec != FULL else full, shape)


def price(model: nn.Module, shape: tuple[int, int, int]) -> Cost:
    """What a model without storage costs."""
    return measured(model, shape).of(FULL)


def measured(model: nn.Module, shape: tuple[int, int, int]) -> CostModel:
    """Costs of a model without storage as a whole, from one forward pass of an image of zeros.

    On real memory: the first pass on ``meta`` loads PyTorch's compiler, 1.4 s and 70 MB in every fresh process.
    """
    zeros = {key: torch.zeros(tensor.shape, dtype=tensor.dtype) for key, tensor in model.state_dict().items()}
    return measure_costs(filled(model, zeros), Layout(()), torch.zeros(1, *shape))


@lru_cache(maxsize=4)
def costs_by_spec(full: nn.Module, layout: Layout, shape: tuple[int, ...]) -> CostModel:
    """Costs of all sub-models of a model without storage, from its shapes alone, for images of ``shape`` [C, H, W]."""
    return measure_costs(full, layout, torch.empty(2, *shape, device=META))


def filled(model: nn.Module, state: State, is_partial: bool = False) -> nn.Module:
    """A copy of a model without storage whose entries are the tensors of ``state``; all of them unless partial."""
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(state, strict=not is_partial, assign=True)
    for parameter in loaded.parameters():
        parameter.requires_grad_(True)
    return loaded
