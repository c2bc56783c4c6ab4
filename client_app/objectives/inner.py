"""A smaller network inside the one that is trained: its weights are the larger one's own."""

from __future__ import annotations

import torch
from torch import Tensor

from client_app.objectives.base import Task, last_logits
from pruning.extract import relative, resize, selection, shapes_of
from pruning.rows import gather
from pruning.spec import SubModelSpec


class InnerNetwork:
    """The part ``spec`` of ``task.model``; training it trains the entries it is made of, and no others.

    Parameters
    ----------
    task : whose model it lies in.
    spec : a part of ``task.spec``.

    Attributes
    ----------
    module : the network without storage.
    """

    def __init__(self, task: Task, spec: SubModelSpec) -> None:
        shapes = shapes_of(task.full.state_dict())
        outer, inner = (selection(task.layout, item, shapes).positions for item in (task.spec, spec))
        self.module = resize(task.full, task.layout, spec).train()
        self._places = {key: relative(outer[key], kept) for key, kept in inner.items()}
        self._own = dict(task.model.named_parameters()) | dict(task.model.named_buffers())

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [batch, num_classes] of its deepest exit, for images [batch, ...]."""
        # Clones: this pass must not touch the larger network's running statistics, not even through a view.
        weights = {key: gather(self._own[key], kept).clone() for key, kept in self._places.items()}
        return last_logits(torch.func.functional_call(self.module, weights, (x,)))
