"""The network made ready for inference computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pruning.gates import GateError, export, fold_norms, for_inference, gates_of
from pruning.gates.layers import Wiring
from server_app.checkpoint import load_checkpoint
from tests.marks import slow_but
from tests.pruning.conftest import states_equal
from tests.pruning.gates.conftest import QUICK, SMALL, images_for
from tests.runs import tiny_run
from zoo import get_model


def shape_of(name: str) -> tuple[int, int, int]:
    return (3, SMALL[name][0], SMALL[name][0])


@pytest.mark.parametrize("share", ["sample", "group", "batch"])
@pytest.mark.parametrize("name", slow_but(QUICK, SMALL))
def test_it_answers_as_the_masked_model_does(name, share, make_gated):
    model, _ = make_gated(name)
    before = copy.deepcopy(model.state_dict())
    small = for_inference(model, shape_of(name), share, num_groups=2)
    gates_of(model.eval()).configure(share, compact=False, num_groups=2)
    torch.testing.assert_close(small(images_for(name)), model(images_for(name)), rtol=1e-8, atol=1e-8)
    assert states_equal(model.state_dict(), before)
    assert not any(parameter.requires_grad for parameter in small.parameters())


def test_normalisations_that_alone_read_a_convolution_are_folded_away(make_gated):
    folded = for_inference(make_gated("resnet8")[0], shape_of("resnet8"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_a_convolution_that_others_read_too_keeps_its_normalisation(make_gated):
    """A pre-activation block adds its raw input: the stem's output is not the normalisation's alone."""
    folded = for_inference(make_gated("resnet18")[0], shape_of("resnet18"))
    assert isinstance(folded.blocks[0].norm1, nn.BatchNorm2d)
    assert isinstance(folded.blocks[0].norm2, nn.Identity)


def test_samples_that_share_nothing_answer_the_same_alone_as_in_any_batch(make_gated):
    small = for_inference(make_gated("vgg11")[0], shape_of("vgg11"), "sample")
    images = images_for("vgg11")
    torch.testing.assert_close(torch.cat([small(x) for x in images.split(1)]), small(images))


def test_layers_left_dense_are_ordinary_layers_again(make_gated):
    model, _ = make_gated("cnn")
    gates_of(model).leave_dense(["stage2", "stage3"])
    small = for_inference(model, shape_of("cnn"))
    assert not any(isinstance(getattr(module, "wiring", None), Wiring) for module in small.modules())
    assert type(small.blocks[1].conv) is nn.Conv2d
    assert not small._forward_hooks
    assert not small.blocks[1]._forward_pre_hooks


def test_a_plan_in_the_runs_state_is_that_of_the_network_for_inference(make_gated):
    """A plan has to be in force in training: put on afterwards, it makes another function of the network."""
    trained, _ = make_gated("cnn")
    images = images_for("cnn")
    unplanned = trained.eval()(images)
    gates_of(trained).leave_dense(["stage2"])
    state = copy.deepcopy(trained.state_dict())
    fresh, _ = get_model("cnn", 10, 3, SMALL["cnn"][0], gates=True)
    fresh.double().load_state_dict(state)
    small = for_inference(fresh, shape_of("cnn"))
    assert type(small.blocks[1].conv) is nn.Conv2d
    torch.testing.assert_close(small(images), trained.eval()(images), rtol=1e-8, atol=1e-8)
    assert not torch.allclose(small(images), unplanned, atol=1e-3)


def test_plain_networks_are_folded_as_well():
    torch.manual_seed(0)
    model, _ = get_model("resnet8", 10, 3, 8)
    images = torch.randn(4, 3, 8, 8)
    expected = model.eval()(images)
    fold_norms(model, (3, 8, 8))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_a_copy_that_computes_something_else_is_not_given_away(make_gated, monkeypatch):
    monkeypatch.setattr(export, "fold_norms", lambda model, shape: model.heads[0].linear.bias.add_(1))
    with pytest.raises(GateError, match="differs from the model by"):
        for_inference(make_gated("cnn")[0], shape_of("cnn"))


@pytest.mark.slow
def test_a_finished_runs_model_becomes_one_for_inference_as_the_readme_says(tmp_path):
    gated = {"model.name": "cnn", "model.gates": True, "adp.warmup-rounds": 1, "adp.ramp-rounds": 1, "num-rounds": 3}
    tiny_run(tmp_path / "run", strategy="adp", **gated)
    model, _ = get_model("cnn", 10, 1, 8, gates=True)
    state = load_checkpoint(tmp_path / "run")[0].state
    model.load_state_dict(state)
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(for_inference(model, (1, 8, 8))(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    winners = [key for key in state if key.endswith("num_winners")]
    assert all(int(state[key]) < len(state[key.replace("num_winners", "units")]) for key in winners)
    assert winners
