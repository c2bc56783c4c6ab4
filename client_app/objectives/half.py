"""A client's half of a split model: its weights, the head that gives it a loss of its own, its optimiser, its steps.

What a client draws at random (order of the data, augmentation, dropout) belongs to (seed, client, round, step) and to
nothing else, so that it does the same work whatever messages tell it when.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from client_app.batches import augmented, batches
from client_app.data import Examples
from client_app.objectives.base import ObjectiveError, Task
from pruning.cost import Cost
from wire.training import make_saved_optimizer
from zoo.cut import CutModel, Part, cost_of, cut_model, smashed_shape

HEAD_CHANNELS, HEAD_NEURONS, FEATURES = 128, 256, 64


@dataclass(frozen=True)
class Plan:
    """What a cut means for a client, from shapes alone.

    Attributes
    ----------
    cut : the model without storage, cut.
    shape : of one sample's activations at the cut.
    cost : of the client's half.
    cost_with_head : of half and head together.
    """

    cut: CutModel
    shape: tuple[int, ...]
    cost: Cost
    cost_with_head: Cost


@lru_cache(maxsize=8)
def plan_of(full: nn.Module, layer: str, image_shape: tuple[int, ...]) -> Plan:
    """Cut a model without storage and measure the client's half."""
    cut = cut_model(full, layer)
    shape = smashed_shape(cut.client, image_shape)
    half = copy.deepcopy(cut.client)
    with torch.device("meta"):
        together = nn.Sequential(half, make_head(shape))
    return Plan(cut, shape, cost_of(half, image_shape), cost_of(together, image_shape))


class Tokens(nn.Module):
    """Tokens [batch, tokens, width] as an image of one column, [batch, width, tokens, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        """Move the width to the channels."""
        return x.transpose(1, 2).unsqueeze(3)


def make_head(shape: Sequence[int]) -> nn.Module:
    """AdaSplit's projection, used only in training: activations of ``shape`` -> [batch, 64].

    Images: 1x1 convolution to 128, ReLU, global max pooling, linear. Dense: linear to 256, ReLU, linear.
    """
    if len(shape) == 1:
        return nn.Sequential(nn.Linear(shape[0], HEAD_NEURONS), nn.ReLU(), nn.Linear(HEAD_NEURONS, FEATURES))
    tokens = [Tokens()] if len(shape) == 2 else []
    channels = shape[1] if tokens else shape[0]
    return nn.Sequential(
        *tokens,
        nn.Conv2d(channels, HEAD_CHANNELS, 1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(HEAD_CHANNELS, FEATURES),
    )


class Half:
    """One client's half, at work.

    Parameters
    ----------
    task : settings ``cut``, ``seed``, ``partition``, ``learning-rate``; its examples are those that are trained on.
    image_shape : [channels, height, width].
    device : where to work.
    memory : as ``export`` gave it; empty for a client that begins.
    """

    def __init__(self, task: Task, image_shape: Sequence[int], device: torch.device, memory: Mapping[str, Any]) -> None:
        self.task = task
        self.key = (int(task.settings["seed"]), int(task.settings["partition"]))
        self.plan = plan_of(task.full, str(task.settings["cut"]), tuple(image_shape))
        self.part: Part = copy.deepcopy(self.plan.cut.client).to_empty(device=device)
        self.head = self._fresh(lambda: make_head(self.plan.shape)).to(device)
        self.optimizer = self.renew_optimizer()
        self.rounds_done = int(memory.get("rounds-done", 0))
        if memory:
            self.part.load_state_dict(memory["part"])
            self.head.load_state_dict(memory["head"])
            self.optimizer.load_state_dict(memory["optimizer"])
        elif not task.settings.get("take-weights", False):
            self.part.load_state_dict(self._first_weights())
        if task.settings.get("take-weights", False):
            received = task.model.state_dict()
            self.part.load_state_dict({key: received[key] for key in self.part.state_dict()})
        self.set_rate(float(task.settings["learning-rate"]))

    @property
    def examples(self) -> Examples:
        """What is trained on."""
        assert self.task.examples is not None
        return self.task.examples

    def export(self) -> dict[str, Any]:
        """What the client must find again."""
        return {
            "part": copy.deepcopy(self.part.state_dict()),
            "head": copy.deepcopy(self.head.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "rounds-done": self.rounds_done,
        }

    def renew_optimizer(self) -> torch.optim.Optimizer:
        """An optimiser without a past."""
        rate = float(self.task.settings["learning-rate"])
        parameters = [*self.part.parameters(), *self.head.parameters()]
        self.optimizer = make_saved_optimizer(self.task.train, parameters, rate)
        return self.optimizer

    def set_rate(self, rate: float) -> None:
        """Change the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def order(self, server_round: int) -> list[Tensor]:
        """Indices of every batch of one round, in order."""
        generator = self._generator(server_round)
        config = self.task.train
        return [
            index
            for _ in range(config.local_epochs)
            for index in batches(len(self.examples), config.batch_size, generator)
        ]

    def batch(self, index: Tensor, server_round: int, step: int) -> tuple[Tensor, Tensor]:
        """One training batch, augmented as this step has it; also sets torch's generator for the step's dropout."""
        generator = self._generator(server_round, step)
        x, y = self.examples.batch(index)
        x = augmented(x, self.task.train, generator)
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        return x, y

    def _generator(self, *place: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash((*self.key, *place)) % 2**63)

    def _fresh(self, make: Callable[[], nn.Module]) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.key[0])
            return make()

    def _first_weights(self) -> dict[str, Tensor]:
        """The weights that the server's own copy began with: both draw them from the run's seed, nothing is sent."""
        if self.task.build is None:
            raise ObjectiveError("objective: a split model's client needs a way to build the model, got none")
        build = self.task.build
        state = self._fresh(lambda: build()[0]).state_dict()
        return {key: state[key] for key in self.part.state_dict()}
