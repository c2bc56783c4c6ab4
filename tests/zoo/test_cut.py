"""Cutting: for every model and cut, the two parts in a row are the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zoo import get_model
from zoo.cut import CutError, cost_of, cut_model, smashed_shape, stages_of

SMALL = {
    "mlp": 8, "cnn": 8, "lenet": 8, "resnet8": 8, "resnet20": 8, "resnet18": 8, "resnet50": 8, "vgg11": 8,
    "mobilenet_v2": 8, "vit_tiny": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_both_parts_in_a_row_are_the_model_at_every_cut(name):
    torch.manual_seed(0)
    options = {} if name == "vit_tiny" else {"width": 0.1}
    model, _ = get_model(name, 10, 1, SMALL[name], **options)
    model.eval()
    x = torch.randn(2, 1, 8, 8)
    whole, keys = model(x), set(model.state_dict())
    blocks = len(model.blocks)
    for number in sorted({1, 2, blocks // 2, blocks} - {0}):
        cut = cut_model(model, str(number))
        torch.testing.assert_close(cut.server(cut.client(x)), whole, rtol=1e-5, atol=1e-5)
        client, server = set(cut.client.state_dict()), set(cut.server.state_dict())
        assert client | server == keys
        assert not client & server
        assert not any(key.startswith("heads") for key in client)
        assert cut_model(model, f"blocks.{number - 1}").client.stage_names == cut.client.stage_names


def test_a_chain_cut_short_gives_the_same_activations():
    from pruning.extract import resize
    from pruning.spec import SubModelSpec

    torch.manual_seed(0)
    model, layout = get_model("lenet", 10, 3, 32, width=0.1)
    x = torch.randn(2, 3, 32, 32)
    short = resize(model, layout, SubModelSpec(depth=2))
    assert torch.equal(cut_model(model, "2").client(x), short(x))


def test_the_lenet_of_the_paper_has_its_smashed_data():
    with torch.device("meta"):
        model, _ = get_model("lenet", 10, 3, 32)
    assert smashed_shape(cut_model(model, "1").client, (3, 32, 32)) == (20, 16, 16)
    assert smashed_shape(cut_model(model, "3").client, (3, 32, 32)) == (800,)
    # 20 filters of 3 x 5 x 5 at 32 x 32 places; backward only to the weights
    cost = cost_of(cut_model(model, "1").client, (3, 32, 32))
    assert (cost.macs, cost.train_macs) == (20 * 75 * 1024, 2 * 20 * 75 * 1024)


def test_sequential_and_staged_models_of_ones_own_are_cut_by_the_names_of_their_layers():
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU())
    model = nn.Sequential()
    model.add_module("body", body)
    model.add_module("out", nn.Linear(8, 10))
    x = torch.randn(2, 1, 8, 8)
    for layer in ("body", "body.2", "body.1"):
        cut = cut_model(model, layer)
        assert torch.equal(cut.server(cut.client(x)), model(x))
    assert set(cut_model(model, "body").client.state_dict()) == {"body.1.weight", "body.1.bias"}

    class Staged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), nn.Linear(8, 10)

        def stages(self) -> list[tuple[str, nn.Module]]:
            return [("first", self.first), ("second", self.second)]

    staged = Staged()
    assert [name for name, _ in stages_of(staged)] == ["first", "second"]
    assert set(cut_model(staged, "first").server.state_dict()) == {"second.weight", "second.bias"}


def test_a_layer_that_stands_twice_in_a_row_runs_twice_and_a_row_with_a_forward_of_its_own_is_one_stage():
    class Residual(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    torch.manual_seed(0)
    relu = nn.ReLU()
    inner = Residual(nn.Linear(8, 8), nn.Tanh())
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), relu, inner, nn.Linear(8, 8), relu, nn.Linear(8, 10))
    assert [name for name, _ in stages_of(model)] == ["0", "1", "2", "3", "4", "5", "6"]
    x = torch.randn(2, 1, 8, 8)
    for layer in ("1", "2", "3", "4", "5"):
        cut = cut_model(model, layer)
        assert torch.equal(cut.server(cut.client(x)), model(x))


def test_stages_that_are_not_the_model_and_cuts_through_shared_weights_are_refused():
    class Staged(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.first, self.second = name, nn.Linear(64, 8), nn.Linear(8, 10)

        def stages(self) -> list[tuple[str, nn.Module]]:
            return [(self.name, self.first), ("second", self.second)]

    assert cut_model(Staged("first"), "first")
    with pytest.raises(CutError, match=r"do not make up the model: .*1st\.bias.*must name every module"):
        cut_model(Staged("1st"), "1st")
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), shared, nn.ReLU(), shared, nn.Linear(8, 10))
    with pytest.raises(CutError, match="would share weights"):
        cut_model(model, "2")


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("lenet", "0", "expected 1 to 4"),
        ("lenet", "5", "expected 1 to 4"),
        ("lenet", "-1", "expected 1 to 4"),
        ("lenet", "heads.0", "nothing is left for the server"),
        ("lenet", "stem", "the client would have nothing to train"),
        ("lenet", "block.1", r"did you mean 'blocks.1'\?"),
        ("lenet", "", "no layer ''"),
    ],
)
def test_a_cut_that_leaves_a_part_empty_or_does_not_exist_is_refused(name, layer, reason):
    model, _ = get_model(name, 10, 1, 8, width=0.1)
    with pytest.raises(CutError, match=reason):
        cut_model(model, layer)


def test_exits_gates_and_unknown_modules_are_refused_with_the_remedy():
    model, _ = get_model("resnet8", 10, 1, 8, width=0.25, exits=True)
    with pytest.raises(CutError, match="exits=False"):
        cut_model(model, "1")
    gated, _ = get_model("cnn", 10, 1, 8, gates=True)
    with pytest.raises(CutError, match="use gates=False"):
        cut_model(gated, "1")
    with pytest.raises(CutError, match=r"a method stages\(\)"):
        cut_model(nn.Linear(3, 3), "1")


def test_parts_share_the_models_modules():
    model, _ = get_model("lenet", 10, 1, 8, width=0.1)
    cut = cut_model(model, "1")
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in cut.client.parameters():
            p.add_(1)
    assert not torch.equal(model.state_dict()["blocks.0.conv.weight"], before["blocks.0.conv.weight"])
