"""What ``TrainConfig`` means for whoever trains: the optimiser and the schedule, the same on clients and server."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from wire.message import TrainConfig


def make_optimizer(
    config: TrainConfig, parameters: Iterable[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """The configured optimiser at ``learning_rate``."""
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def learning_rate(config: TrainConfig, server_round: int, num_rounds: int) -> float:
    """The round's learning rate under the configured schedule."""
    if config.schedule == "constant":
        return config.learning_rate
    progress = torch.tensor(torch.pi * (server_round - 1) / max(1, num_rounds))
    return config.learning_rate * 0.5 * (1 + float(torch.cos(progress)))
