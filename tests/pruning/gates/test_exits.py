"""Networks with exits, gated: samples with like winners are put side by side, and every exit answers in order."""

from __future__ import annotations

import copy

import pytest
import torch

from pruning.extract import extract, resize
from pruning.gates import GateError, attach, for_inference, gates_of
from pruning.groups import Block, Layout
from pruning.spec import SubModelSpec
from tests.pruning.gates.conftest import images_for
from zoo import get_model

DENSE = {"mlp": (), "cnn": (), "resnet8": ("stage1.block0.inner", "stage2.block0.inner")}
"""Layers left dense, so that an exit stands before the first gate; the others' first block has none to begin with."""


def gated(name):
    torch.manual_seed(0)
    model, layout = get_model(name, 10, 3, 8, gates=True, exits=True)
    gates_of(model.eval().double()).leave_dense(DENSE[name])
    return model, layout


@pytest.mark.parametrize("name", DENSE)
def test_every_exit_answers_in_the_order_of_the_images_also_before_the_block_at_which_they_are_sorted(name):
    """Every unit wins: ways to share differ in nothing but the order on the way."""
    model, _ = gated(name)
    images = images_for(name, 8)
    reference = copy.deepcopy(model)
    gates_of(reference).configure("sample", compact=False)
    gates_of(model).configure("group", compact=True, num_groups=4)
    small = for_inference(model, (3, 8, 8), "group")
    expected = reference(images)
    for net in (model, small):
        got = net(images)
        assert gates_of(net).in_pass_order(torch.arange(8)).tolist() != list(range(8)), "nothing was sorted"
        assert len(got) == len(expected) > 1
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_pass_leaves_the_gates_as_they_are():
    model, _ = gated("resnet8")
    gates_of(model).set_density(0.5).configure("group", compact=True, num_groups=4)
    children, keys = list(gates_of(model)), list(model.state_dict())
    seen = []
    model.heads[0].register_forward_hook(lambda *_: seen.append(list(model.state_dict())))
    model(images_for("resnet8", 8))
    assert seen == [keys]
    assert list(gates_of(model)) == children


def test_exits_before_the_first_gate_do_not_hear_of_it_however_many_units_win():
    model, _ = gated("cnn")
    images = images_for("cnn", 8)
    plain, _ = get_model("cnn", 10, 3, 8, exits=True)
    plain.eval().double().load_state_dict({k: t for k, t in model.state_dict().items() if not k.startswith("gates.")})
    gates_of(model).set_density(0.5).configure("group", compact=True, num_groups=4)
    for mine, theirs in zip(model(images)[:2], plain(images)[:2], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_part_cut_behind_its_second_exit_answers_in_order_too():
    model, layout = gated("resnet8")
    gates_of(model).set_density(1.0).leave_dense(["stage1.block0.inner"])
    images = images_for("resnet8", 8)
    spec = SubModelSpec(depth=2)
    small = resize(model, layout, spec)
    small.load_state_dict(extract(model.state_dict(), layout, spec), strict=True)
    gates_of(small.eval()).configure("group", compact=True)
    gates_of(model).configure("sample", compact=False)
    got = small(images)
    assert len(got) == 2
    for mine, theirs in zip(got, model(images), strict=False):
        torch.testing.assert_close(mine, theirs)


def test_outputs_that_the_layout_does_not_place_are_refused_with_the_remedy():
    model, layout = get_model("cnn", 10, 3, 8, exits=True)
    headless = Layout(layout.groups, tuple(Block(block.name, (f"{block.name}.",)) for block in layout.blocks))
    model, _ = attach(model, headless, (3, 8, 8))
    gates_of(model.eval()).configure("group", compact=True)
    with pytest.raises(GateError, match=r"of the 3 outputs .* places 0 behind blocks; use 'batch' or 'sample'"):
        model(images_for("cnn", 8, dtype=torch.float32))


@pytest.mark.parametrize("exits", [False, True])
def test_a_gate_is_no_exit_head(exits):
    _, plain = get_model("resnet20", 10, 3, 8, exits=exits)
    _, with_gates = get_model("resnet20", 10, 3, 8, exits=exits, gates=True)
    assert with_gates.exits == plain.exits
    assert with_gates.blocks[0].owned == (*plain.blocks[0].owned, "gates.stage1-block0-inner.")
