"""A device starts a process for every message: what it must not load, and what its clock starts at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from client_app.model import full_model, price
from pruning.cost import measure_costs
from pruning.groups import Layout
from pruning.spec import FULL
from wire.message import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
NEEDLESS = [
    "jinja2",
    "matplotlib",
    "ray",
    "scipy",
    "sklearn",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torchvision",
]
"""Packages that take time and memory to import and that no client needs."""

FIRST_MESSAGE = """
import json, sys
from flwr.app import ConfigRecord
import client_app.app as app
from client_app.handler import handle
from wire.message import DataConfig, Instruction, Job, ModelConfig, TrainConfig
from zoo import get_model

model, _ = get_model("cnn", 10, 1, 8)
job = Job(ModelConfig("cnn"), DataConfig(max_train=400), TrainConfig(nesterov=True), 4, 2, 0)
report = handle(Instruction("train", 0, 0, 1, 0, job, model.state_dict()))
handle(Instruction("evaluate", 1, 0, 1, 0, job, model.state_dict()))
age_s = app.process_age_s()
print(json.dumps({"steps": report.num_steps, "age_s": age_s, "modules": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def first_message() -> dict:
    """What one process loaded and measured that trained and evaluated once."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_MESSAGE], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_clients_first_message_loads_nothing_that_it_does_not_need(first_message):
    assert first_message["steps"] > 0
    assert [name for name in NEEDLESS if name in first_message["modules"]] == []


@pytest.mark.slow
def test_the_age_of_a_process_includes_what_it_imported(first_message):
    assert 0.5 < first_message["age_s"] < 120


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet8", "mobilenet_v2", "vit_tiny"])
def test_prices_on_real_memory_are_those_without(name):
    shape = (3, 32, 32)
    model, _ = full_model(ModelConfig(name), 10, shape)
    blank = measure_costs(model, Layout(()), torch.empty(2, *shape, device="meta")).of(FULL)
    found = price(model, shape)
    assert (found.train_macs, found.macs, found.parameters) == (blank.train_macs, blank.macs, blank.parameters)
    assert found.activation_bytes == pytest.approx(blank.activation_bytes, rel=0.1)  # attention keeps less on a CPU
