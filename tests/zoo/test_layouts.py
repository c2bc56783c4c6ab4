"""Declared layouts of the zoo: consistent, proved, equal to traced ones, and deep where depth pruning cuts."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pruning.extract import extract, resize
from pruning.groups import Axis, Group, Layout, LayoutError
from pruning.prove import prove
from pruning.spec import SubModelSpec
from pruning.trace import traced_layout
from zoo import get_model
from zoo.vit import vit

MODELS = [
    ("mlp", {"hidden": (20, 10)}),
    ("mlp", {"hidden": (20, 10, 5), "exits": True}),
    ("mlp", {"hidden": (20, 10), "scales": True}),
    ("cnn", {}),
    ("cnn", {"exits": True}),
    ("lenet", {"width": 0.2}),
    ("resnet8", {}),
    ("resnet8", {"exits": True}),
    ("resnet20", {}),
    ("resnet18", {"width": 0.125}),
    ("resnet18", {"width": 0.125, "exits": True}),
    ("resnet50", {"width": 0.125}),
    ("vgg11", {"width": 0.125}),
    ("vgg16", {"width": 0.125}),
    ("mobilenet_v2", {"width": 0.25}),
    ("vit_tiny", {"dim": 24, "num_blocks": 4}),
    ("vit_tiny", {"dim": 24, "num_blocks": 4, "scales": True}),
    ("vit_tiny", {"dim": 24, "num_blocks": 4, "fused_qkv": False, "exits": True}),
]
IDS = ["-".join([name, *options]) for name, options in MODELS]
WRITING = ("vit_tiny", {"dim": 24, "num_blocks": 4, "residual_outputs": True})
"""No tracer finds units that nothing reads."""


def build(name: str, options: dict) -> tuple:
    """A model that is narrow enough to be proved in a blink, with its layout."""
    if name == "vit_tiny" and "dim" in options:
        fixed = {"dim": options["dim"], "num_heads": 3, "num_blocks": options["num_blocks"]}
        rest = {key: value for key, value in options.items() if key not in fixed}
        return partial(vit, **fixed)(5, 3, 32, **rest)
    return get_model(name, 5, **options)


def owned_places(group: Group) -> frozenset:
    """What a group owns, names aside: a set of units, each a set of (key, axis, position)."""
    return frozenset(
        frozenset(
            (axis.key, axis.dim, axis.offset + unit * axis.repeat + k)
            for axis in group.axes
            for k in range(axis.repeat)
        )
        for unit in range(group.size)
    )


@pytest.mark.parametrize(("name", "options"), [*MODELS, WRITING], ids=[*IDS, "-".join(["vit", *WRITING[1]])])
def test_declared_layouts_are_proved(name, options):
    model, layout = build(name, options)
    assert prove(model, layout, torch.randn(2, 3, 32, 32), declared=True) == layout


@pytest.mark.parametrize(("name", "options"), MODELS, ids=IDS)
def test_declared_and_traced_layouts_agree(name, options):
    pytest.importorskip("torch_pruning")
    model, declared = build(name, options)
    traced = traced_layout(model, torch.randn(2, 3, 32, 32))
    assert {owned_places(group) for group in declared.groups} == {owned_places(group) for group in traced.groups}
    assert {group.exact for group in traced.groups} == {True, False}


@pytest.mark.parametrize(("name", "options"), MODELS, ids=IDS)
def test_every_axis_but_images_classes_and_residual_widths_belongs_to_a_group(name, options):
    model, layout = build(name, options)
    classifier = layout.by_name["classes"]
    assert classifier.size == 5
    for key, tensor in model.state_dict().items():
        if name == "vit_tiny" or tensor.dim() == 0:
            continue
        dims = {axis.dim for _, axis in layout.axes_of.get(key, ())}
        reads_image = tensor.dim() > 1 and key in ("stem.conv.weight", "blocks.0.conv.weight", "blocks.0.linear.weight")
        depthwise = "depthwise.conv" in key
        assert dims == ({0} if reads_image or depthwise or tensor.dim() == 1 else {0, 1}), key


def test_heads_declared_at_the_wrong_positions_of_a_fused_qkv_do_not_pass_the_proof():
    """Every shape is right here: only the logits tell."""
    model, layout = build("vit_tiny", {"dim": 24, "num_blocks": 4})
    heads = layout.by_name["block0.heads"]
    head_by_head = (
        Axis("blocks.0.attention.qkv.weight", 0, repeat=24),
        Axis("blocks.0.attention.qkv.bias", 0, repeat=24),
        Axis("blocks.0.attention.proj.weight", 1, repeat=8),
    )
    wrong = Layout(tuple(Group(g.name, g.size, head_by_head) if g is heads else g for g in layout.groups))
    with pytest.raises(LayoutError, match="does not hold"):
        prove(model, wrong, torch.randn(2, 3, 32, 32), declared=True)


@pytest.mark.parametrize(
    ("name", "options", "exits"),
    [
        ("mlp", {"exits": True}, (1, 2)),
        ("mlp", {}, (2,)),
        ("cnn", {"exits": True}, (1, 2, 3)),
        ("resnet8", {"exits": True}, (1, 2, 3)),
        ("resnet18", {"width": 0.125, "exits": True}, (2, 4, 6, 8)),
        ("vit_tiny", {"exits": True}, (2, 4, 6, 8)),
        ("vit_tiny", {}, ()),
    ],
)
def test_a_layout_knows_behind_which_depths_heads_stand(name, options, exits):
    assert get_model(name, 5, **options)[1].exits == exits


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet20", "resnet18", "vit_tiny"])
def test_a_model_cut_in_depth_gives_the_logits_of_its_own_exits(name):
    options = {"width": 0.125} if name == "resnet18" else {"dim": 24, "num_blocks": 4} if name == "vit_tiny" else {}
    model, layout = build(name, {**options, "exits": True})
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        full = model.eval()(x)
        for num_exits, block in enumerate(model.exits, start=1):
            spec = SubModelSpec(depth=block + 1)
            small = resize(model, layout, spec)
            small.load_state_dict(extract(model.state_dict(), layout, spec), strict=True)
            logits = small.eval()(x)
            assert len(logits) == num_exits
            for mine, theirs in zip(logits, full, strict=False):
                assert torch.equal(mine, theirs)


def test_lenet_cut_after_one_and_three_blocks_gives_adasplits_smashed_data():
    model, layout = get_model("lenet")
    x = torch.randn(2, 3, 32, 32)
    assert resize(model, layout, SubModelSpec(depth=1))(x).shape == (2, 20, 16, 16)
    assert resize(model, layout, SubModelSpec(depth=3))(x).shape == (2, 800)


def test_a_transformer_without_exits_keeps_its_head_at_every_depth():
    model, layout = build("vit_tiny", {"dim": 24, "num_blocks": 4})
    assert resize(model, layout, SubModelSpec(depth=2))(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_a_narrowed_model_equals_the_zoo_model_built_with_that_width():
    full, layout = get_model("resnet18", width=0.25)
    narrow, _ = get_model("resnet18", width=0.125)
    half = SubModelSpec.of({group.name: range(group.size // 2) for group in layout.prunable})
    shapes = {key: tensor.shape for key, tensor in extract(full.state_dict(), layout, half).items()}
    assert shapes == {key: tensor.shape for key, tensor in narrow.state_dict().items()}


def test_the_softmax_scale_of_a_transformer_with_fewer_heads_stays_that_of_the_full_model():
    model, layout = build("vit_tiny", {"dim": 24, "num_blocks": 4})
    spec = SubModelSpec.of({"block1.heads": [1]})
    small = resize(model, layout, spec)
    assert small.blocks[1].attention.head_dim == model.blocks[1].attention.head_dim == 8
    assert small.blocks[1].attention.qkv.weight.shape == (3 * 8, 24)


def test_what_a_narrowed_layer_does_not_write_leaves_the_residual_stream_as_it_was():
    model, layout = build(*WRITING)
    kept = [1, 5, 20]
    spec = SubModelSpec.of({"block1.attention_out": kept, "block1.mlp_out": [0]})
    small = resize(model, layout, spec)
    small.load_state_dict(extract(model.state_dict(), layout, spec), strict=True)
    stream, block = torch.randn(2, 5, 24), small.blocks[1]
    attention = block.attention(block.norm1(stream))
    assert attention.shape == (2, 5, 3)
    summed = block.sum1(attention, stream)
    untouched = [index for index in range(24) if index not in kept]
    assert torch.equal(summed[..., untouched], stream[..., untouched])
    assert torch.equal(summed[..., kept], stream[..., kept] + attention)


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("residual_outputs", [False, True])
def test_a_blocks_share_of_weights_is_the_rate_and_less_with_output_rows_left_out(rate, residual_outputs):
    """(7 r + 5 r^2) / 12 of the 12 D^2 weights of a block; r where what it writes stays whole."""
    model, layout = vit(5, 3, 32, dim=64, num_heads=4, num_blocks=4, residual_outputs=residual_outputs)
    spec = SubModelSpec.of({group.name: range(int(rate * group.size)) for group in layout.prunable})

    def num_weights(state: dict[str, torch.Tensor]) -> int:
        return sum(t.numel() for key, t in state.items() if key.startswith("blocks.0.") and t.dim() == 2)

    assert num_weights(model.state_dict()) == 12 * 64**2
    share = num_weights(extract(model.state_dict(), layout, spec)) / num_weights(model.state_dict())
    assert share == pytest.approx((7 * rate + 5 * rate**2) / 12 if residual_outputs else rate)
