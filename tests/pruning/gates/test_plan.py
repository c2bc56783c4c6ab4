"""Plans: what is measured, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch

from pruning.gates import LayerPlan, executed_ratios, gates_of, measure_plan, plan
from tests.pruning.conftest import states_equal
from tests.pruning.gates.conftest import images_for


@pytest.fixture(autouse=True)
def forget() -> None:
    """Every test measures for itself."""
    plan._measured.clear()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["cnn", "mobilenet_v2", "mlp", "lenet"])
def test_every_gated_layer_is_measured_and_the_model_left_alone(name, training, make_gated):
    model, _ = make_gated(name, 0.5, torch.float32)
    gates_of(model).configure("group", compact=True, num_groups=2)
    before, mode = copy.deepcopy(model.state_dict()), model.training
    found = measure_plan(model, images_for(name, dtype=torch.float32), training=training, repeats=1)
    assert [layer.group for layer in found] == [site.group for site in gates_of(model).sites]
    assert all(layer.dense_s > 0 and layer.gated_s > 0 for layer in found)
    assert states_equal(model.state_dict(), before)
    assert model.training == mode
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_layer_in_which_every_unit_wins_is_measured_too(make_gated):
    model, _ = make_gated("cnn", 0.5, torch.float32)
    gates_of(model).configure("batch", compact=True)
    model.gates["stage2"].num_winners.fill_(64)
    found = measure_plan(model, images_for("cnn", dtype=torch.float32), training=True, repeats=1)
    assert [layer.group for layer in found] == ["stage2", "stage3"]


def test_layers_that_are_alike_are_measured_once(make_gated, monkeypatch):
    model, _ = make_gated("vgg11", 0.5, torch.float32)
    gates_of(model).configure("batch", compact=True)
    calls = []
    take_turns = plan._take_turns
    monkeypatch.setattr(plan, "_take_turns", lambda *a: calls.append(a) or take_turns(*a))
    images = images_for("vgg11", dtype=torch.float32)
    first = measure_plan(model, images, training=False, repeats=1)
    assert len(calls) < len(first) == 7
    assert measure_plan(model, images, training=False, repeats=1) == first


def test_gating_pays_where_it_takes_less_time_by_a_margin():
    assert LayerPlan("a", dense_s=1.0, gated_s=0.9).is_gated
    assert not LayerPlan("a", dense_s=1.0, gated_s=0.97).is_gated


def test_a_layer_left_dense_is_executed_whole_and_gated_by_nothing_whoever_won_there_before(make_gated):
    model, _ = make_gated("cnn")
    gates = gates_of(model.eval()).configure("batch", compact=True)
    model(images_for("cnn"))
    assert model.gates["stage3"].winners is not None
    gates.leave_dense(["stage3"])
    model(images_for("cnn"))
    assert model.gates["stage3"].winners is None
    ratios = {"blocks.1.conv.weight": 0.5, "blocks.2.conv.weight": 0.5, "heads.0.linear.weight": 1.0}
    assert executed_ratios(model) == ratios


def test_a_wide_layer_pays_and_a_tiny_one_at_a_batch_of_one_does_not(make_gated):
    model, _ = make_gated("mlp", 0.5, torch.float32)  # its predictor is as large as the layer
    gates_of(model).configure("sample", compact=True)
    (layer,) = measure_plan(model, images_for("mlp", 1, dtype=torch.float32), training=False)
    assert not layer.is_gated


def test_convolutions_of_other_kernels_are_not_alike_whatever_their_inputs(make_gated, monkeypatch):
    """A bottleneck's 1x1 and 3x3 convolutions may read images of the same shape."""
    model, _ = make_gated("resnet50", 0.5, torch.float32)
    gates_of(model).configure("batch", compact=True)
    monkeypatch.setattr(plan, "_take_turns", lambda *a: (float(len(plan._measured)), 0.0))
    found = measure_plan(model, images_for("resnet50", dtype=torch.float32), training=False)
    modules = dict(model.named_modules())
    forms: dict[float, set[tuple]] = {}
    for site, layer in zip([s for s, g in gates_of(model).pairs() if g.k < s.size], found, strict=True):
        around = (modules[site.writer], modules[site.reader])
        forms.setdefault(layer.dense_s, set()).add(tuple((m.weight.shape, m.stride) for m in around))
    assert all(len(kinds) == 1 for kinds in forms.values()), "one measurement stands for layers that differ"
    assert len(forms) < len(found)
