"""Costs against torch's FLOP counter, against the modules themselves, and against measured memory."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from client_app.handler import MemoryMeter
from pruning.cost import measure_costs
from pruning.extract import resize
from pruning.groups import Layout
from pruning.prove import random_spec
from pruning.select import equal_widths, select_prefix
from pruning.spec import FULL, SubModelSpec
from tests.marks import slow_but
from zoo import get_model, model_names

BATCH = 2
CONVOLUTIONAL = [name for name in model_names() if not name.startswith("vit")]


@cache
def on_meta(name, size=32, **options):
    with torch.device("meta"):
        model, layout = get_model(name, 10, 3, size, **options)
        return model, layout, measure_costs(model, layout, torch.empty(BATCH, 3, size, size))


def counted_macs(model, size=32):
    """MACs per sample by torch's own counter: forward, and forward with backward."""
    x = torch.empty(BATCH, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as forward:
        model(x)
    with FlopCounterMode(display=False) as both:
        model(x).sum().backward()
    return forward.get_total_flops() / 2 / BATCH, both.get_total_flops() / 2 / BATCH


def half(layout, cost):
    return select_prefix(layout, equal_widths(layout, cost, 0.5))


@pytest.mark.parametrize("name", slow_but(("mlp", "cnn", "resnet8", "vit_tiny"), model_names()))
@pytest.mark.parametrize("width", ["full", "half"])
def test_every_zoo_model_costs_what_torchs_counter_and_its_own_tensors_say(name, width):
    model, layout, cost = on_meta(name)
    spec = FULL if width == "full" else half(layout, cost)
    small = resize(model, layout, spec)
    got = cost.of(spec)
    forward, both = counted_macs(small)
    assert got.macs == forward
    if name != "mobilenet_v2":  # torch counts the backward pass of grouped convolutions as if they were not grouped
        assert got.train_macs == both
    assert got.parameters == sum(p.numel() for p in small.parameters())
    assert got.bytes == sum(t.numel() * t.element_size() for t in small.state_dict().values())


@pytest.mark.parametrize("width", ["full", "half"])
def test_a_depthwise_network_pays_three_products_a_layer_and_two_for_the_first(width):
    model, layout, cost = on_meta("mobilenet_v2")
    spec = FULL if width == "full" else half(layout, cost)
    stem = resize(model, layout, spec).stem.conv.weight.numel() * 32 * 32
    assert cost.of(spec).train_macs == 3 * cost.of(spec).macs - stem


@pytest.mark.parametrize(("name", "size"), [("resnet8", 32), ("cnn", 16), ("lenet", 32), ("vit_tiny", 32)])
@pytest.mark.parametrize("seed", range(3))
def test_a_random_sub_model_is_priced_as_if_it_were_measured_itself(name, size, seed):
    model, layout, cost = on_meta(name, size)
    spec = random_spec(layout.prunable, np.random.default_rng(seed))
    small = resize(model, layout, spec)
    got = cost.of(spec)
    own = measure_costs(small, Layout(()), torch.empty(BATCH, 3, size, size, device="meta")).of(FULL)
    nothing = {"activation_bytes": 0, "frozen_activation_bytes": 0}
    assert replace(got, **nothing) == replace(own, **nothing)
    for kept in nothing:  # with a single head torch copies less
        assert getattr(got, kept) == pytest.approx(getattr(own, kept), rel=0.1)


def test_a_shallower_sub_model_is_priced_without_the_blocks_it_lacks():
    model, layout, cost = on_meta("vit_tiny", exits=True)
    spec = SubModelSpec(depth=4)
    small = resize(model, layout, spec)
    x = torch.empty(BATCH, 3, 32, 32, device="meta")
    with FlopCounterMode(display=False) as counter:
        small(x)
    assert cost.of(spec).macs == counter.get_total_flops() / 2 / BATCH
    assert cost.of(spec).parameters == sum(p.numel() for p in small.parameters())


def test_models_that_call_functions_with_their_weights_are_priced_too():
    model = nn.MultiheadAttention(32, 4, batch_first=True)

    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x, x, x, need_weights=False)[0]

    x = torch.zeros(1, 5, 32)
    projections, products = 5 * 32 * 4 * 32, 2 * 5 * 5 * 32
    assert measure_costs(SelfAttention(), Layout(()), x).of(FULL).macs == projections + products


def test_prices_of_many_specs_at_once_are_those_of_each():
    _, layout, cost = on_meta("resnet8")
    specs = [random_spec(layout.prunable, np.random.default_rng(seed)) for seed in range(5)]
    table = np.array([list(spec.widths(layout).values()) for spec in specs])
    for quantity in ("parameters", "macs", "train_macs", "bytes", "activation_bytes"):
        assert cost.price(quantity, table).astype(int).tolist() == [getattr(cost.of(s), quantity) for s in specs]


def test_tracing_leaves_the_model_as_it_was():
    model, layout = get_model("resnet8", 10, 3, 16)
    model.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    measure_costs(model, layout, torch.randn(2, 3, 16, 16))
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["mlp", "cnn", "lenet", "resnet8", "resnet18", "vgg11", "mobilenet_v2", "vit_tiny"])
@pytest.mark.parametrize("width", ["full", "half"])
def test_estimated_memory_is_what_training_was_counted_to_hold_within_one_percent(name, width):
    model, layout = get_model(name, 10, 3, 32)
    cost = measure_costs(model, layout, torch.zeros(1, 3, 32, 32))
    spec = FULL if width == "full" else half(layout, cost)
    small = resize(model, layout, spec).train()
    meter = MemoryMeter(small, optimizer_slots=1)
    with meter:
        functional.cross_entropy(small(torch.randn(4, 3, 32, 32)), torch.zeros(4, dtype=torch.long))
    assert cost.of(spec).peak_memory_bytes(4) == pytest.approx(meter.peak_bytes, rel=0.01)


def resident_growth(name: str, width: float, batch: int) -> tuple[int, int]:
    """How much a process grows at its peak by three training steps, and the estimate; in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for _ in range(2):  # libraries, thread pools and kernels that only the first step loads
        warm, _ = get_model(name, 10, 3, 32, width=0.1)
        train(warm, 4)
    del warm
    before = peak_resident_bytes()
    model, layout = get_model(name, 10, 3, 32, width=width)
    train(model, batch)
    with torch.device("meta"):
        like, _ = get_model(name, 10, 3, 32, width=width)
        cost = measure_costs(like, layout, torch.empty(1, 3, 32, 32))
    return peak_resident_bytes() - before, cost.of(FULL).peak_memory_bytes(batch)


def train(model: nn.Module, batch: int) -> None:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.randn(batch, 3, 32, 32)), torch.zeros(batch, dtype=torch.long)).backward()
        optimizer.step()


def peak_resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the kernel's peak of resident memory")
@pytest.mark.parametrize(("name", "width", "batch"), [("resnet18", 0.5, 32), ("vgg16", 0.5, 64), ("vit_tiny", 1.0, 32)])
def test_estimated_memory_is_between_half_and_four_thirds_of_what_a_process_grows_by(name, width, batch):
    """Beside what is estimated a process holds gradients of activations and scratch memory, which differs by CPU."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        grown, estimated = pool.apply(resident_growth, (name, width, batch))
    print(f"{name}: grew by {grown / 2**20:.0f} MiB, estimated {estimated / 2**20:.0f} MiB")
    assert grown / 2 <= estimated <= grown * 4 / 3
