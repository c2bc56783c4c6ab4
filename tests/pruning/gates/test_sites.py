"""Where gates fit, read off the layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruning.gates import GateError, attach, find_sites, gates_of, num_winners
from pruning.groups import Axis, Group, Layout
from zoo import ModelError, get_model


def groups_of(name: str, **options: object) -> dict[str, str | None]:
    model, layout = get_model(name, 10, 3, 16, **options)
    return {site.group: site.source for site in find_sites(model, layout, (3, 16, 16))}


def test_residual_nets_are_gated_at_their_inner_channels_only():
    assert groups_of("resnet8") == {f"stage{s}.block0.inner": None for s in (1, 2, 3)}
    assert len(groups_of("resnet32")) == 15


def test_pre_activation_blocks_are_gated_at_their_inner_channels():
    assert list(groups_of("resnet18", width=0.25)) == [f"stage{s}.block{b}.inner" for s in (1, 2, 3, 4) for b in (0, 1)]


def test_a_bottleneck_has_two_gates_and_the_second_reads_the_first():
    found = groups_of("resnet50", width=0.25)
    assert found["stage2.block1.inner1"] is None
    assert found["stage2.block1.inner2"] == "stage2.block1.inner1"


def test_a_chain_is_gated_everywhere_but_at_the_first_convolution_and_the_classifier():
    found = groups_of("vgg11", width=0.25)
    assert list(found) == [f"conv{i}" for i in range(2, 9)]
    assert found["conv2"] is None, "the first convolution is whole"
    assert found["conv5"] == "conv4"


def test_a_mobilenet_is_gated_at_its_expansions_and_not_at_its_linear_bottlenecks():
    found = groups_of("mobilenet_v2", width=0.5)
    assert all(name.endswith(".inner") or name == "last" for name in found)
    assert not any(name.endswith(".trunk") for name in found)


def test_an_input_that_a_rectifier_made_is_known_not_to_be_negative():
    model, layout = get_model("mobilenet_v2", 10, 3, 16, width=0.5)
    assert not any(s.is_rectified for s in find_sites(model, layout, (3, 16, 16)) if s.group != "last")
    model, layout = get_model("resnet8", 10, 3, 16)
    assert all(site.is_rectified for site in find_sites(model, layout, (3, 16, 16)))


@pytest.mark.parametrize("name", ["vit_micro", "vit_tiny"])
def test_a_model_with_nothing_to_gate_is_refused_with_the_remedy(name):
    with pytest.raises(ModelError, match=r"nothing to gate.*choose a convolutional model"):
        get_model(name, 10, 3, 32, gates=True)


def test_layers_with_no_more_units_than_the_fewest_winners_have_no_gate():
    model, layout = get_model("cnn", 10, 3, 16, width=0.25)  # 8, 16, 32 channels
    assert [site.size for site in find_sites(model, layout, (3, 16, 16))] == [16, 32]
    with pytest.raises(ModelError, match="no group of more than 8 units"):
        get_model("cnn", 10, 3, 16, width=0.0625, gates=True)


def test_a_layer_without_a_rectifier_behind_it_has_no_gate():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 3))
    stem = Group("stem", 16, (Axis("0.weight", 0), Axis("0.bias", 0), Axis("2.weight", 1)))
    linear = Group("linear", 16, (Axis("2.weight", 0), Axis("2.bias", 0), Axis("3.weight", 1)))
    with pytest.raises(GateError, match="nothing to gate"):
        find_sites(model, Layout((stem, linear)), (3, 16, 16))


def test_gates_are_put_on_once():
    model, layout = get_model("cnn", 10, 3, 8, gates=True)
    with pytest.raises(GateError, match="already"):
        attach(model, layout, (3, 8, 8))


def test_a_network_without_gates_says_so():
    with pytest.raises(GateError, match="gates=True"):
        gates_of(get_model("cnn", 10, 3, 8)[0])


@pytest.mark.parametrize(
    ("size", "density", "k"),
    [(64, 0.5, 32), (64, 0.3, 16), (64, 0.01, 8), (20, 0.5, 8), (20, 1.0, 20), (12, 0.9, 8), (30, 0.95, 30)],
)
def test_winners_are_a_multiple_of_eight_at_least_eight_and_at_most_all(size, density, k):
    assert num_winners(size, density) == k


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_a_density_outside_0_to_1_is_refused(density):
    with pytest.raises(GateError, match=r"in \(0, 1\]"):
        num_winners(64, density)


@pytest.mark.parametrize("name", ["cnn", "resnet8", "vgg11", "mobilenet_v2"])
def test_the_models_own_weights_and_keys_stay(name):
    torch.manual_seed(3)
    plain, _ = get_model(name, 10, 3, 8)
    torch.manual_seed(3)
    gated, layout = get_model(name, 10, 3, 8, gates=True)
    state = gated.state_dict()
    assert [key for key in state if not key.startswith("gates.")] == list(plain.state_dict())
    assert all(torch.equal(state[key], tensor) for key, tensor in plain.state_dict().items())
    layout.check({key: tuple(tensor.shape) for key, tensor in state.items()})


def test_gates_can_be_put_on_a_model_without_storage():
    with torch.device("meta"):
        model, _ = get_model("resnet8", 10, 3, 8, gates=True)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
