"""Clients whose losses are parabolas: what a method converges to is known on paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from client_app.objectives import OBJECTIVES, Objective, Task, make_objective
from pruning.cost import measure_costs
from pruning.groups import Layout
from pruning.spec import FULL
from strategies import STRATEGIES
from strategies.loop import LoopConfig
from strategies.setting import Setting
from wire.local import LocalTransport
from wire.message import DataConfig, Instruction, Job, ModelConfig, Report, TrainConfig


@dataclass(frozen=True)
class Parabola:
    """``curvature / 2 (w - bottom)^2``, seen by a client that makes ``num_steps`` steps and has ``num_examples``."""

    curvature: float
    bottom: float
    num_steps: int
    num_examples: int = 10


class Clients:
    """A handler: trains a single weight on each client's parabola, with real objectives, corrections and memory."""

    def __init__(self, parabolas: list[Parabola]) -> None:
        self.parabolas = parabolas
        self.memory: dict[tuple[int, int], Any] = {}

    def __call__(self, instruction: Instruction) -> Report:
        """Do what the instruction asks, as ``client_app.handler`` does."""
        mine, train = self.parabolas[instruction.partition_id], instruction.job.train
        model = nn.Linear(1, 1, bias=False)
        model.load_state_dict(dict(instruction.state))
        memory = self.memory.get((instruction.partition_id, instruction.last_dispatch), {})
        task = Task(
            model=model,
            layout=Layout(()),
            train=train,
            settings=instruction.settings,
            label_counts=torch.ones(1),
            spec=FULL,
            full=nn.Linear(1, 1, bias=False),
            companions=instruction.companions,
            memory=memory,
            learning_rate=train.learning_rate,
        )

        def parabola(task: Task) -> Objective:
            def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
                w = model(torch.ones(1, 1))
                return mine.curvature / 2 * ((w - mine.bottom) ** 2).sum(), w

            return Objective(model, loss)

        _, *corrections = instruction.objective.split("+")
        before = OBJECTIVES["cross-entropy"]
        OBJECTIVES["cross-entropy"] = parabola  # type: ignore[index]
        try:
            objective = make_objective("+".join(["cross-entropy", *corrections]), task)
        finally:
            OBJECTIVES["cross-entropy"] = before  # type: ignore[index]
        optimizer = torch.optim.SGD(model.parameters(), lr=train.learning_rate, momentum=train.momentum)
        for _ in range(mine.num_steps):
            optimizer.zero_grad()
            objective.loss(torch.ones(1, 1), torch.zeros(1))[0].backward()
            objective.correct()
            optimizer.step()
        findings = objective.finish(mine.num_steps)
        self.memory[instruction.partition_id, instruction.dispatch] = findings.memory
        return Report(
            instruction.dispatch,
            instruction.partition_id,
            {"weight": model.weight.detach().clone()},
            mine.num_examples,
            metrics={"loss": 0.0},
            companions=findings.companions,
            num_steps=mine.num_steps,
        )


def converged(
    name: str,
    parabolas: list[Parabola],
    num_rounds: int = 25,
    momentum: float = 0.0,
    client_weight: str = "examples",
    **own: Any,
) -> float:
    """The weight that strategy ``name`` ends at, from 0, with learning rate .2."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    train = TrainConfig(batch_size=1, learning_rate=0.2, momentum=momentum, weight_decay=0.0, schedule="constant")
    job = Job(ModelConfig("mlp"), DataConfig(), train, len(parabolas), num_rounds, 0, store_dir="in memory")
    layout = Layout(())
    cost = measure_costs(model, layout, torch.ones(2, 1))
    kind = STRATEGIES[name]
    setting = Setting(job, layout, cost, LoopConfig(client_weight=client_weight))
    strategy = kind(kind.Config(**own), setting)
    clients = Clients(parabolas)
    strategy.start(LocalTransport(clients, len(parabolas)), ArrayRecord(model.state_dict()), num_rounds)
    return float(strategy.progress.state["weight"])


def bottom_of_the_mean(parabolas: list[Parabola]) -> float:
    """Where the clients' mean loss, weighted by examples, is least."""
    pull = np.array([p.num_examples * p.curvature for p in parabolas])
    return float((pull * np.array([p.bottom for p in parabolas])).sum() / pull.sum())
