"""What an objective may look at, and what it says in return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from client_app.data import Examples
from pruning.cost import CostModel
from pruning.groups import Layout
from pruning.spec import SubModelSpec
from wire.flat import Scalar
from wire.message import State, TrainConfig
from wire.sgd import Optimizer


class ObjectiveError(ValueError):
    """An instruction asks for an objective that this client does not have, or not in this way."""


@dataclass(frozen=True)
class Task:
    """What an objective may look at.

    Attributes
    ----------
    model : the sub-model, in training mode.
    layout : of the full model, whose group names and keys the sub-model shares.
    train : the run's training configuration.
    settings : the objective's own, from the instruction.
    label_counts : int64 [num_classes], this client's training examples by class.
    spec : what of the full model ``model`` is.
    full : the full model without storage, from which other sub-models are cut.
    companions : tensors that the server sent beside the weights.
    memory : what the objective remembered with this client's last merged answer; empty at first.
    examples : the client's training examples; None when the client only evaluates.
    learning_rate : of this round.
    generator : the request's random numbers.
    work_ratio : how much to train, as a multiple of the run's local epochs.
    build : makes the whole model with fresh weights, drawn from torch's generator, and its layout.
    load_draft, save_draft : work that the objective saved in the middle of a request, and how it does; for work that
        depends on no answer being merged, so that it survives the server.
    """

    model: nn.Module
    layout: Layout
    train: TrainConfig
    settings: Mapping[str, Scalar]
    label_counts: Tensor
    spec: SubModelSpec
    full: nn.Module
    companions: State = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    examples: Examples | None = None
    learning_rate: float = 0.0
    generator: torch.Generator = field(default_factory=torch.Generator)
    work_ratio: float = 1.0
    build: Callable[[], tuple[nn.Module, Layout]] | None = None
    load_draft: Callable[[], Mapping[str, Any]] = dict
    save_draft: Callable[[dict[str, Any]], None] = lambda draft: None


@dataclass(frozen=True)
class Findings:
    """What an objective has to say after training, beside the trained weights.

    Attributes
    ----------
    companions : tensors for the server.
    memory : what the objective wants to find again in ``Task.memory``; survives the process and a resume. Tensors,
        numbers, strings, and lists and dicts of them. What it does not name stays as it was: another objective, asked
        for between two requests of this one, forgets nothing of it.
    metrics : further numbers for the event log.
    state : entries to report, where that is not all of the model's.
    narrowed : what of the full model the trained module is, where the objective made it smaller than what was sent.
    train_macs : executed by everything, where the objective knows better than one pass per example.
    peak_memory_bytes : of what the objective did before the training that the handler measures.
    """

    companions: State = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: State | None = None
    narrowed: SubModelSpec | None = None
    train_macs: float | None = None
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class Fitted:
    """What training came to: metrics over all batches, peak memory in bytes, examples seen, steps made."""

    metrics: dict[str, float]
    memory_bytes: int
    num_seen: int
    num_steps: int


CostOf = Callable[[SubModelSpec], CostModel]
"""Spec -> costs of that sub-model as a whole."""

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images [batch, ...], labels [batch]) -> (scalar loss, logits [batch, num_classes])."""


@dataclass(frozen=True)
class Objective:
    """What is minimised and in which module, and what it costs beyond one pass through it.

    Attributes
    ----------
    model : whose weights are trained and reported; the task's, or a part of it that the objective chose.
    loss : of one batch.
    predict : images [batch, ...] -> logits [batch, num_classes], for evaluation; None: the deepest exit of ``model``.
    beside : parameters that are trained with the model's and stay on the client.
    varies : whether passes differ in size, so that memory has to be counted in all of them.
    extra : further networks that every batch passes through, forward and backward.
    narrowed : what of the full model ``model`` is, where the base chose a part of it before training.
    kept_bytes : of the tensors that are kept through training beside the model (anchors, variates).
    correct : changes the gradients between the backward pass and the step.
    step : makes the optimiser's step, after all corrections.
    steps_of : after training, by parameter name, how many steps moved each entry, int64 and of a shape that broadcasts
        to the parameter's; parameters all of which every step moved are missing.
    finish : told the number of steps made, says what there is to say.
    train : trains in a way of its own (own optimiser, own steps) instead of the handler's loop over all batches.
    examine : tests in a way of its own; the metrics, and what the server needs to finish the test.
    """

    model: nn.Module
    loss: Loss
    predict: Callable[[Tensor], Tensor] | None = None
    beside: tuple[nn.Parameter, ...] = ()
    varies: bool = False
    extra: tuple[nn.Module, ...] = ()
    narrowed: SubModelSpec | None = None
    kept_bytes: int = 0
    correct: Callable[[], None] = lambda: None
    step: Callable[[Optimizer], object] = lambda optimizer: optimizer.step()
    steps_of: Callable[[], Mapping[str, Tensor]] = dict
    finish: Callable[[int], Findings] = lambda num_steps: Findings()
    train: Callable[[Examples], Fitted] | None = None
    examine: Callable[[Examples], Findings] | None = None


def last_logits(output: Tensor | Sequence[Tensor]) -> Tensor:
    """Logits [batch, num_classes] of the deepest exit."""
    return output if isinstance(output, Tensor) else output[-1]
