"""One client with a few digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pruning.extract import extract
from pruning.spec import FULL, SubModelSpec
from wire.message import CompressionConfig, DataConfig, Instruction, Job, ModelConfig, TrainConfig
from zoo import get_model

MakeInstruction = Callable[..., Instruction]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums do not depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture
def make_instruction() -> MakeInstruction:
    """Build a training instruction for a client of 64 digits; ``train`` and ``job`` change the defaults."""

    def make(
        model: str = "cnn",
        spec: SubModelSpec = FULL,
        train: dict[str, Any] | None = None,
        job: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Instruction:
        torch.manual_seed(0)
        full, layout = get_model(model, 10, 1, 8)
        data = DataConfig(max_train=320, partition="iid")
        whole_job = Job(ModelConfig(model), data, TrainConfig(**(train or {})), 4, 10, 0, CompressionConfig())
        return replace(
            Instruction(
                action="train",
                dispatch=0,
                partition_id=0,
                server_round=1,
                global_version=0,
                job=replace(whole_job, **(job or {})),
                state=extract(full.state_dict(), layout, spec),
                spec=spec,
            ),
            **changes,
        )

    return make
