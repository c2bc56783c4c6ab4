"""Small runs of Co-S2P, and the strategy by itself, for its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from client_app.handler import handle
from pruning.cost import measure_costs
from pruning.groups import Layout
from server_app.checkpoint import load_checkpoint
from server_app.config import parse
from strategies.cos2p import CoS2P
from strategies.setting import Setting
from wire.message import Instruction, Job, Report
from zoo import get_model

VIT: dict[str, Any] = {
    "strategy": "cos2p",
    "model.name": "tests.vits:small",
    "model.exits": True,
    "train.optimizer": "adam",
    "train.learning-rate": 0.003,
    "train.local-epochs": 1,
    "data.max-train": 160,
    "data.max-test": 60,
    "cos2p.mask-epochs": 1,
    "evaluation.every": 99,
}
MLP: dict[str, Any] = {"strategy": "cos2p", "train.local-epochs": 1, "data.max-test": 60, "evaluation.every": 99}
SEMI: dict[str, Any] = {"cos2p.quorum-ratio": 0.5}


class Spy:
    """Keeps every training request with its answer; ``spoil`` may raise instead of answering."""

    def __init__(self, spoil: Any = lambda instruction: None) -> None:
        self.seen: list[tuple[Instruction, Report]] = []
        self.spoil = spoil

    def __call__(self, instruction: Instruction) -> Report:
        self.spoil(instruction)
        report = handle(instruction)
        if instruction.action == "train":
            self.seen.append((instruction, report))
        return report


def states_of(folder: Path, num_rounds: int) -> list[dict[str, torch.Tensor]]:
    return [
        load_checkpoint(folder / "checkpoints" / f"round-{number:06d}.pt")[0].state
        for number in range(1, num_rounds + 1)
    ]


def strategy_of(settings: dict[str, Any], has_blocks: bool = True) -> CoS2P:
    config = parse({"strategy": "cos2p", "num-clients": 4, **settings})
    model, layout = get_model("mlp", 10, 1, 8)
    layout = layout if has_blocks else Layout(layout.groups)
    cost = measure_costs(model, layout, torch.zeros(2, 1, 8, 8))
    job = Job(config.run.model, config.run.data, config.run.train, config.run.num_clients, 9, 0)
    return CoS2P(config.method, Setting(job, layout, cost, config.run.loop))
