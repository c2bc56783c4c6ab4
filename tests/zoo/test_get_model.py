"""Models by name: sizes, shapes, options and what is said when something is wrong."""

from __future__ import annotations

import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from client_app.model import build_model
from pruning.groups import Axis, Group, Layout, LayoutError
from wire.message import ModelConfig
from zoo import ModelError, get_model, model_names


def num_parameters(name: str, *arguments: int, **options: object) -> int:
    with torch.device("meta"):
        model, _ = get_model(name, *arguments, **options)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("mlp", (10, 1, 28), 784 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10),
        ("cnn", (), 94_762),
        ("lenet", (), 1_520 + 25_050 + 2_560_800 + 400_500 + 5_010),
        ("resnet8", (), 78_042),
        ("resnet20", (), 272_474),
        ("resnet32", (), 466_906),
        ("resnet56", (), 855_770),
        ("resnet18", (), 11_172_170),
        ("resnet50", (1000, 3, 224), 25_557_032),
        ("mobilenet_v2", (1000, 3, 224), 3_504_872),
        ("vgg11", (), 9_228_362),
        ("vgg16", (), 14_724_042),
    ],
)
def test_zoo_models_have_the_published_number_of_parameters(name, arguments, expected):
    assert num_parameters(name, *arguments) == expected


@pytest.mark.parametrize(
    ("width", "expected"), [(1, 11_172_170), (0.5, 2_796_714), (0.25, 701_018), (0.125, 176_178), (0.0625, 44_510)]
)
def test_resnet18_has_heterofls_number_of_parameters_at_every_width(width, expected):
    assert num_parameters("resnet18", width=width) == expected


def test_vision_transformers_have_the_sizes_in_their_names():
    assert num_parameters("vit_86m", 300, 3, 224, exits=True) == 86_726_064
    assert num_parameters("vit_115m", 300, 3, 224, exits=True) == 115_077_552


@pytest.mark.parametrize("name", model_names())
def test_every_zoo_model_builds_on_meta_without_tensors(name):
    with torch.device("meta"):
        model, layout = get_model(name)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    layout.check({key: tensor.shape for key, tensor in model.state_dict().items()})


@pytest.mark.parametrize("name", [name for name in model_names() if name not in ("vit_86m", "vit_115m")])
@pytest.mark.parametrize(("in_channels", "image_size"), [(3, 32), (1, 8)])
def test_every_zoo_model_gives_logits_for_colour_images_and_for_digits(name, in_channels, image_size):
    narrow = {} if name in ("mlp", "vit_tiny") else {"width": 0.25}
    model, _ = get_model(name, 7, in_channels, image_size, **narrow)
    assert model.eval()(torch.randn(2, in_channels, image_size, image_size)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "vit_tiny"])
def test_larger_images_are_accepted(name):
    options = {} if name == "vit_tiny" else {"width": 0.1}
    model, _ = get_model(name, 4, 3, 96, **options)
    assert model.eval()(torch.randn(2, 3, 96, 96)).shape == (2, 4)


def test_patches_have_the_size_that_was_asked_for():
    own, asked = (build_model(ModelConfig("vit_tiny", patch_size=size), 10, (1, 8, 8))[0] for size in (0, 2))
    tokens = [model.state_dict()["stem.position"].shape[1] for model in (own, asked)]
    assert tokens == [1 + 8 * 8, 1 + 4 * 4]


@pytest.mark.parametrize(
    ("name", "exits"),
    [
        ("mlp", (0, 1)),
        ("cnn", (0, 1, 2)),
        ("resnet8", (0, 1, 2)),
        ("resnet20", (2, 5, 8)),
        ("resnet18", (1, 3, 5, 7)),
        ("vit_tiny", (1, 3, 5, 7)),
    ],
)
def test_exits_give_one_tensor_of_logits_each_deepest_last(name, exits):
    model, layout = get_model(name, 5, exits=True)
    assert model.exits == exits
    logits = model.eval()(torch.randn(2, 3, 32, 32))
    assert [tuple(tensor.shape) for tensor in logits] == [(2, 5)] * len(exits)
    for head, block in enumerate(exits):
        key = f"heads.{head}.weight" if name == "mlp" else f"heads.{head}.linear.weight"
        assert layout.block_of(key) == block


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("resnet81", {}, "did you mean 'resnet8'"),
        ("torchvison:resnet18", {}, "did you mean 'torchvision'"),
        ("torchvision:resnet19", {}, "did you mean 'resnet1"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "not fetched"),
        ("timm:vit_tinny_patch16_224", {}, "did you mean 'vit_tiny_patch16_224'"),
        ("timm:vit_tiny_patch16_224", {"pretrained": True}, "not fetched"),
        ("zoo.mlp:mpl", {}, "did you mean 'mlp'"),
        ("cnn", {"widht": 0.5}, "did you mean 'width'"),
        ("cnn", {"width": 0}, "positive number"),
        ("cnn", {"num_classes": 0}, "num-classes must be a positive integer, got 0"),
        ("cnn", {"image_size": "32"}, "image-size must be a positive integer"),
        ("cnn", {"image_size": 2}, "image-size >= 4"),
        ("lenet", {"image_size": 3}, "image-size >= 4"),
        ("vit_tiny", {"patch_size": 5}, "choose a divisor"),
        ("vit_tiny", {"patch_size": 0}, "choose a divisor"),
        ("mlp", {"hidden": ()}, "at least one layer width"),
    ],
)
def test_a_wrong_name_option_or_size_is_named_with_its_remedy(name, options, said):
    if name.startswith("timm") and find_spec("timm") is None:
        pytest.skip("timm is not installed")
    with pytest.raises(ModelError, match=said):
        get_model(name, **options)


@pytest.fixture
def own_models(monkeypatch):
    """A module of somebody else's, with three factories."""
    module = types.ModuleType("somebodys_models")

    def plain(num_classes: int, neurons: int = 6) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(48, neurons), nn.ReLU(), nn.Linear(neurons, num_classes))

    def declared(num_classes: int) -> tuple[nn.Module, Layout]:
        axes = (Axis("1.weight", 0), Axis("1.bias", 0), Axis("3.weight", 1))
        return plain(num_classes), Layout((Group("mine", 6, axes),))

    def wrong(num_classes: int) -> tuple[nn.Module, Layout]:
        return plain(num_classes), Layout((Group("mine", 6, (Axis("1.weight", 0), Axis("3.weight", 1))),))

    module.__dict__.update(plain=plain, declared=declared, wrong=wrong, number=lambda: 3)
    monkeypatch.setitem(sys.modules, "somebodys_models", module)


@pytest.mark.usefixtures("own_models")
def test_a_factory_of_ones_own_gets_the_arguments_it_names_and_a_proved_layout():
    model, layout = get_model("somebodys_models:plain", 4, 3, 4, neurons=8)
    assert model(torch.randn(1, 3, 4, 4)).shape == (1, 4)
    assert [(group.size, group.exact) for group in layout.groups] == [(8, True), (4, False)]
    assert [group.name for group in get_model("somebodys_models:declared", 4, 3, 4)[1].groups] == ["mine"]


@pytest.mark.usefixtures("own_models")
def test_a_factory_that_returns_or_declares_something_wrong_is_an_error():
    with pytest.raises(LayoutError, match="mine"):
        get_model("somebodys_models:wrong", 4, 3, 4)
    with pytest.raises(ModelError, match=r"expected an nn\.Module"):
        get_model("somebodys_models:number")
    with pytest.raises(ModelError, match="did you mean 'neurons'"):
        get_model("somebodys_models:plain", neuron=3)


@pytest.mark.usefixtures("own_models")
def test_a_factory_that_raises_and_one_that_makes_too_few_logits_are_named():
    sys.modules["somebodys_models"].__dict__.update(
        raising=lambda num_classes: 1 / 0,
        ten_classes=lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 10)),
    )
    with pytest.raises(ModelError, match="'somebodys_models:raising': the function raised ZeroDivisionError"):
        get_model("somebodys_models:raising", 4, 3, 4)
    with pytest.raises(ModelError, match=r"'somebodys_models:ten_classes': expected 12 logits, .* got 10; let"):
        get_model("somebodys_models:ten_classes", 12, 3, 4)
    assert get_model("somebodys_models:ten_classes", 4, 3, 4)[0] is not None


def test_a_torchvision_model_takes_grey_images_and_is_traced_once_per_process():
    model, layout = get_model("torchvision:squeezenet1_1", 5, 1, 32)
    assert model.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    with torch.device("meta"):
        on_meta, again = get_model("torchvision:squeezenet1_1", 5, 1, 32)
    assert again is layout
    assert all(parameter.is_meta for parameter in on_meta.parameters())


def test_a_traced_model_can_be_asked_for_on_meta_first():
    with torch.device("meta"):
        model, layout = get_model("torchvision:squeezenet1_1", 3, 3, 32)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(layout.prunable) > 20


def test_zoo_imports_neither_flower_nor_a_sibling_other_than_pruning_and_compat():
    for path in (Path(__file__).parents[2] / "zoo").glob("*.py"):
        words = {
            line.split()[1].split(".")[0]
            for line in path.read_text().splitlines()
            if line.lstrip().startswith(("from ", "import "))
        }
        assert not words & {"flwr", "strategies", "wire", "fleet", "client_app", "server_app", "reporting", "bench"}, (
            path
        )
