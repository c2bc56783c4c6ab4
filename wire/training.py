"""What ``TrainConfig`` means for whoever trains: optimiser, schedule, and how far steps go; the same on both sides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from wire.message import TrainConfig
from wire.sgd import SGD, Optimizer

VARIATE = "variate:"
"""Prefix of the companions that carry SCAFFOLD's control variates: c down, the change of c_i up."""


def make_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimizer:
    """The configured optimiser at ``learning_rate``; SGD on CPUs is our own, which starts faster."""
    owned = list(parameters)
    if config.optimizer == "adam" or any(parameter.device.type not in ("cpu", "meta") for parameter in owned):
        return make_saved_optimizer(config, owned, learning_rate)
    nesterov = config.nesterov and config.momentum > 0
    return SGD(owned, lr=learning_rate, momentum=config.momentum, nesterov=nesterov, weight_decay=config.weight_decay)


def optimizer_slots(config: TrainConfig) -> int:
    """Numbers that the configured optimiser keeps per weight: Adam two moments, SGD its velocity or nothing."""
    return 2 if config.optimizer == "adam" else int(config.momentum > 0)


def make_saved_optimizer(
    config: TrainConfig, parameters: Iterable[Tensor], learning_rate: float
) -> torch.optim.Optimizer:
    """PyTorch's own, whose moments can be saved; in one pass over memory where the tensors allow it."""
    owned = list(parameters)
    common: dict[str, Any] = {"lr": learning_rate, "weight_decay": config.weight_decay, "fused": can_be_fused(owned)}
    if config.optimizer == "adam":
        return torch.optim.Adam(owned, **common)
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(owned, momentum=config.momentum, nesterov=nesterov, **common)


def can_be_fused(parameters: Iterable[Tensor]) -> bool:
    """Whether one kernel may step them: it goes through memory in order and takes gradients to lie like weights."""
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() and p.is_contiguous() for p in parameters)


def learning_rate(config: TrainConfig, server_round: int, num_rounds: int) -> float:
    """The round's learning rate under the configured schedule."""
    if config.schedule == "constant":
        return config.learning_rate
    progress = torch.tensor(torch.pi * (server_round - 1) / max(1, num_rounds))
    return config.learning_rate * 0.5 * (1 + float(torch.cos(progress)))


def step_sums(num_steps: int, momentum: float = 0.0, nesterov: bool = False, pull: float = 0.0) -> list[float]:
    """How far 0, 1, ... ``num_steps`` steps of SGD go along a constant gradient; unit: learning rate times gradient.

    This is ``||a_i||_1`` of FedNova (Wang et al. 2020, arXiv 2007.07481, section 4): an update is ``-eta sum_k a_ik
    g_k``. Plain SGD: the number of steps. Momentum beta: ``(K - beta (1 - beta^K) / (1 - beta)) / (1 - beta)``.
    Proximal: ``(1 - (1 - pull)^K) / pull``. What torch's SGD does under both at once is the recursion below.

    Parameters
    ----------
    momentum, nesterov : of torch's SGD.
    pull : learning rate times mu of a proximal term, >= 0.
    """
    velocity, distance = 0.0, 0.0
    distances = [distance]
    for _ in range(num_steps):
        gradient = 1.0 - pull * distance
        velocity = momentum * velocity + gradient
        distance += gradient + momentum * velocity if nesterov else velocity
        distances.append(distance)
    return distances


def local_distances(config: TrainConfig, num_steps: int, rate: float, mu: float = 0.0) -> list[float]:
    """``step_sums`` of a client's round: under its optimiser, at learning rate ``rate``, with a proximal ``mu``."""
    return step_sums(num_steps, config.momentum, config.nesterov and config.momentum > 0, rate * mu)


def local_distance(config: TrainConfig, num_steps: int, rate: float, mu: float = 0.0) -> float:
    """How far all steps of a client's round go."""
    return local_distances(config, num_steps, rate, mu)[-1]
