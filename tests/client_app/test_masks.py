"""Co-S2P's client: gates are silenced units, masks are learned with frozen weights, and what is trained is small."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from client_app.batches import batches, flip_shift
from client_app.handler import handle
from client_app.model import measured
from client_app.objectives import ObjectiveError, Task, make_objective
from client_app.objectives.mask_gates import GatedProduct, MaskGates, StraightThrough
from client_app.objectives.masks import MaskPhase, choose_units, freeze, learn_mask, learnable_groups, mask_peak_bytes
from client_app.site import Site, SiteError
from client_app.store import ClientStore
from pruning.capability import Training, inner_groups
from pruning.cost import measure_costs
from pruning.extract import extract, narrow, resize, shapes_of
from pruning.groups import Axis, Group
from pruning.prove import _randomize, random_spec, silence
from pruning.spec import FULL, SubModelSpec
from tests.client_app.conftest import MakeInstruction
from tests.marks import slow_but
from tests.vits import small, writing
from wire.message import DataConfig, Instruction, ModelConfig, TrainConfig
from wire.training import optimizer_slots
from zoo import get_model

SETTINGS = {"then": "deepest-teaches", "width-rate": 0.5, "mask-epochs": 2, "distillation-weight": 0.5}
VITS = {"tests.vits:small": small, "tests.vits:writing": writing}


def build(name: str = "vit_micro", exits: bool = True):
    torch.manual_seed(0)
    options = {"exits": True} if exits else {}
    if name in VITS:
        return VITS[name](10, 1, 8, **options)
    return get_model(name, 10, 1, 8, **options)


@pytest.fixture
def masked(make_instruction: MakeInstruction, tmp_path):
    """Instructions that ask a client with a small ViT to learn its mask."""

    def make(
        name: str = "tests.vits:small", exits: bool = True, settings: dict | None = None, **changes
    ) -> Instruction:
        model, layout = build(name, exits)
        spec = changes.pop("spec", FULL)
        train = {"learning_rate": 0.01, "batch_size": 16, **changes.pop("train", {})}
        job = {
            "model": ModelConfig(name, exits=exits),
            "data": DataConfig(max_train=320, partition="iid"),
            "store_dir": str(tmp_path),
        }
        instruction = make_instruction("mlp", train=train, job=job)
        return replace(
            instruction,
            state=extract(model.state_dict(), layout, spec),
            spec=spec,
            objective="mask-learning+exit-choice" if exits else "mask-learning",
            settings={**SETTINGS, **({} if exits else {"then": "cross-entropy"}), **(settings or {})},
            **changes,
        )

    return make


@pytest.mark.parametrize("name", [*VITS, "resnet8", "mlp", "cnn", "lenet", "vgg11", "mobilenet_v2"])
def test_shut_gates_are_silenced_units(name):
    exits = name in (*VITS, "resnet8")
    model, layout = build(name, exits) if name != "vgg11" else (get_model("vgg11", 10, 1, 32, width=0.125))
    x = torch.randn(3, 1, 32 if name == "vgg11" else 8, 32 if name == "vgg11" else 8)
    _randomize(model, 0)
    groups = inner_groups(layout, dict(shapes_of(model.state_dict())))
    spec = random_spec(groups, np.random.default_rng(1))
    gates = MaskGates(model.eval(), groups, {group.name: torch.zeros(group.size) for group in groups})
    flags = [torch.isin(torch.arange(g.size), torch.tensor(spec.units[g.name])).float() for g in groups]
    gates.set(torch.cat(flags))
    with torch.no_grad():
        gated = model(x)
        gates.remove()
        untouched = model(x)
        model.load_state_dict(silence(model.state_dict(), layout, spec))
        expected = model(x)
    mine, wanted, whole = (torch.stack(o) if isinstance(o, list) else o for o in (gated, expected, untouched))
    scale = float(wanted.abs().max())
    assert torch.allclose(mine, wanted, atol=1e-5 * max(1.0, scale))
    assert not torch.allclose(whole, wanted, atol=1e-3 * scale)


def test_the_draw_is_bernoulli_forward_and_straight_through_times_p_backward():
    scores = torch.linspace(-3, 3, 7, requires_grad=True)
    uniform = torch.full((7,), 0.5)
    gate = StraightThrough.apply(scores, uniform)
    assert gate.tolist() == [0, 0, 0, 0, 1, 1, 1]
    weights = torch.arange(1.0, 8.0)
    (gate * weights).sum().backward()
    assert torch.allclose(scores.grad, weights * torch.sigmoid(scores.detach()))
    torch.manual_seed(0)
    many = StraightThrough.apply(torch.full((20_000,), math.log(0.3 / 0.7)), torch.rand(20_000))
    assert float(many.mean()) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_the_realised_keep_rate_is_the_target_to_one_unit_per_group(masked, rate, name):
    report = handle(masked(name, settings={"width-rate": rate}))
    assert report.narrowed is not None
    _, layout = build(name)
    for group in layout.prunable:
        width = report.narrowed.width(layout, group.name)
        assert abs(width - rate * group.size) <= 0.5 or width == 1


def test_drawing_the_mask_misses_the_rate_by_more_than_a_unit_and_keeps_one_at_least():
    group = Group("g", 40, (Axis("w", 0),))
    scores = {"g": torch.full((40,), math.log(1 / 3))}
    drawn = [
        len(choose_units(scores, (group,), 0.25, "bernoulli", torch.Generator().manual_seed(seed)).get("g", range(40)))
        for seed in range(30)
    ]
    assert max(abs(count - 10) for count in drawn) > 1
    hopeless = choose_units({"g": torch.full((40,), -99.0)}, (group,), 0.25, "bernoulli", torch.Generator())
    assert len(hopeless["g"]) == 1
    with pytest.raises(ObjectiveError, match="mask-select: got 'best'"):
        choose_units(scores, (group,), 0.25, "best", torch.Generator())


def task_for(instruction: Instruction) -> Task:
    from client_app.data import client_examples
    from client_app.handler import load
    from client_app.model import full_model, sub_model

    train, _ = client_examples(instruction.job.data, 4, 0)
    blank, layout, _ = sub_model(instruction.job.model, 10, (1, 8, 8), instruction.spec)
    return Task(
        load(blank, instruction, torch.device("cpu")).train(),
        layout,
        instruction.job.train,
        instruction.settings,
        torch.bincount(train.y, minlength=10),
        instruction.spec,
        full_model(instruction.job.model, 10, (1, 8, 8))[0],
        examples=train,
        learning_rate=0.01,
        generator=torch.Generator().manual_seed(0),
    )


@pytest.mark.parametrize(
    ("name", "exits"), [("tests.vits:small", True), ("tests.vits:writing", True), ("resnet8", True), ("mlp", False)]
)
def test_learning_a_mask_leaves_the_weights_and_statistics_as_they_were_received(masked, name, exits):
    instruction = masked(name, exits)
    task = task_for(instruction)
    learned = learn_mask(task)
    for key, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, instruction.state[key]), key
    assert learned.spec.is_subset_of(instruction.spec, task.layout)
    assert learned.num_seen == 2 * len(task.examples)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in task.model.modules())


def test_the_mask_phase_sees_augmented_images_where_training_does(masked, monkeypatch):
    def seen(augment: str) -> list[torch.Tensor]:
        images = []
        step = MaskPhase.step
        monkeypatch.setattr(MaskPhase, "step", lambda self, x, y: images.append(x) or step(self, x, y))
        learn_mask(task_for(masked(train={"augment": augment})))
        monkeypatch.undo()
        return images

    plain, changed = seen("none"), seen("flip-shift")
    order = batches(64, 16, torch.Generator().manual_seed(0))
    task = task_for(masked())
    assert torch.equal(plain[0], task.examples.batch(order[0])[0])
    generator = torch.Generator().manual_seed(0)
    batches(64, 16, generator)
    assert torch.equal(changed[0], flip_shift(plain[0], generator))
    assert len(plain) == len(changed) == 8


@pytest.mark.parametrize("limit", [0.0, 1e-6])
def test_in_the_mask_phase_gradients_are_clipped_of_all_but_the_scores(masked, limit):
    settings = {"momentum": 0.0, "weight_decay": 0.0, "max_grad_norm": limit}
    task = replace(task_for(masked(train=settings)), learning_rate=1.0)
    phase = MaskPhase(task, learnable_groups(task))
    before = {key: tensor.clone() for key, tensor in task.model.state_dict().items()}
    scores = phase.gates.scores.detach().clone()
    phase.step(*task.examples.batch(slice(0, 16)))
    moved = torch.cat([(t - before[key]).flatten() for key, t in task.model.state_dict().items()]).norm()
    assert float(moved) > 1e-3 if not limit else float(moved) <= 1.1 * limit
    first = (phase.gates.scores.detach() - scores).abs()
    assert float(first.max()) == pytest.approx(0.01, rel=1e-3), "Adam's first step is as long as its rate"


def test_units_that_the_data_need_are_kept():
    """Half of the hidden units are made useless by hand; a learned mask keeps the others."""
    torch.manual_seed(0)
    model, layout = get_model("mlp", 10, 1, 8, width=0.1)
    useless = set(range(0, 20, 2))
    with torch.no_grad():  # what they say is noise that drowns the logits
        model.blocks[1].linear.weight[:, sorted(useless)] = 10 * torch.randn(20, 10)
    from client_app.data import client_examples

    train, _ = client_examples(DataConfig(max_train=640, partition="iid"), 4, 0)
    settings = {"width-rate": 0.5, "mask-epochs": 20, "mask-learning-rate": 0.1}
    counts = torch.bincount(train.y, minlength=10)
    with torch.device("meta"):
        full = get_model("mlp", 10, 1, 8, width=0.1)[0]
    task = Task(model.train(), layout, TrainConfig(), settings, counts, FULL, full, examples=train, learning_rate=0.05)
    kept = set(learn_mask(task).spec.units["hidden0"])
    assert len(kept) == 10
    assert len(kept & useless) <= 2


def test_what_is_trained_is_physically_small_starts_from_what_was_received_and_reports_its_part(masked):
    instruction = masked(train={"learning_rate": 1e-9, "weight_decay": 0.0})
    report = handle(instruction)
    _, layout = build("tests.vits:small")
    shapes = shapes_of(instruction.state)
    part = narrow(instruction.state, layout, FULL, report.narrowed, shapes)
    assert {k: t.shape for k, t in report.state.items()} == {k: t.shape for k, t in part.items()}
    for key, tensor in part.items():
        assert torch.allclose(report.state[key], tensor, atol=1e-6), key
    assert report.state["blocks.0.fc1.weight"].shape == (64, 32)


def test_a_depth_limited_client_learns_masks_of_its_own_blocks_only(masked):
    instruction = masked(spec=SubModelSpec(depth=2))
    report = handle(instruction)
    assert report.narrowed.depth == 2
    assert set(report.narrowed.units) == {"block0.heads", "block0.mlp", "block1.heads", "block1.mlp"}
    assert {"heads.0.linear.weight", "heads.1.linear.weight"} <= report.state.keys()
    assert not any(key.startswith(("blocks.2", "heads.2")) for key in report.state)


def test_every_exit_that_was_trained_is_part_of_the_answer(masked):
    instruction = masked(wants_delta=True)
    report = handle(instruction)
    for index in range(4):
        assert float(report.state[f"heads.{index}.linear.weight"].abs().sum()) > 0


def test_scores_and_optimiser_state_survive_the_process_and_a_resume(masked, tmp_path):
    first = handle(masked())
    memory = ClientStore(str(tmp_path), 0).load(0)["objective"]
    assert set(memory) == {"scores", "optimizer", "exit_accuracy"}
    assert not torch.allclose(memory["scores"]["block0.mlp"], torch.zeros(128))
    assert float(memory["optimizer"]["step"]) == 2 * 4  # 64 examples in batches of 16, two epochs
    second = handle(masked(dispatch=1, last_dispatch=0))
    later = ClientStore(str(tmp_path), 0).load(1)["objective"]
    assert float(later["optimizer"]["step"]) == 16
    moved = (later["scores"]["block0.mlp"] - memory["scores"]["block0.mlp"]).abs().max()
    assert 0 < float(moved) < 0.2
    forgotten = handle(masked(dispatch=1, last_dispatch=-1))
    assert forgotten.narrowed != second.narrowed or first.narrowed is None


@pytest.mark.parametrize("between", ["exits", "deepest-teaches+exit-choice", "cross-entropy"])
def test_scores_wait_for_a_client_that_is_asked_for_something_else_at_another_depth(between, masked, tmp_path):
    """As the rotation of Co-S2P does in the middle of a mask phase: in between, other blocks and no mask."""
    exits = between != "cross-entropy"
    name, groups = ("tests.vits:small", 4) if exits else ("mlp", 2)
    shallow = {"spec": SubModelSpec(depth=2)} if exits else {}
    other = SubModelSpec.of({"block0.mlp": range(64)}) if exits else FULL
    handle(masked(name, exits, **shallow))
    before = ClientStore(str(tmp_path), 0).load(0)["objective"]
    plain = masked(name, exits, spec=other, dispatch=1, last_dispatch=0)
    handle(replace(plain, objective=between))
    kept = ClientStore(str(tmp_path), 0).load(1)["objective"]
    assert {key: torch.equal(kept["scores"][key], before["scores"][key]) for key in before["scores"]} == dict.fromkeys(
        before["scores"], True
    )
    assert len(before["scores"]) == groups
    handle(masked(name, exits, **shallow, dispatch=2, last_dispatch=1))
    assert float(ClientStore(str(tmp_path), 0).load(2)["objective"]["optimizer"]["step"]) == 16


def test_scores_of_blocks_that_are_not_there_this_time_wait_too(masked, tmp_path):
    handle(masked())
    handle(masked(spec=SubModelSpec(depth=1), dispatch=1, last_dispatch=0))
    before, after = (ClientStore(str(tmp_path), 0).load(n)["objective"]["scores"] for n in (0, 1))
    assert before.keys() == after.keys()
    assert torch.equal(before["block3.mlp"], after["block3.mlp"])
    assert not torch.equal(before["block0.mlp"], after["block0.mlp"])


def test_an_answer_that_was_lost_is_forgotten_with_its_scores(masked, tmp_path):
    handle(masked())
    handle(masked(dispatch=1, last_dispatch=-1))
    assert float(ClientStore(str(tmp_path), 0).load(1)["objective"]["optimizer"]["step"]) == 8


def test_both_phases_are_in_the_macs_and_the_larger_one_is_the_peak(masked):
    instruction = masked()
    report = handle(instruction)
    model, layout = build("tests.vits:small")
    cost = measure_costs(model, layout, torch.zeros(2, 1, 8, 8))
    # Forward, backward through every product; of weights only those of the last head get gradients.
    tokens, images, dim, classes = 17, 16, 32, 10
    attention = 4 * 2 * tokens * tokens * dim
    embedding, heads = images * 4 * dim, classes * dim
    blocks = 4 * tokens * (4 * dim * dim + 8 * dim * dim)
    assert cost.of(FULL).macs == attention + embedding + blocks + 4 * heads
    expected = (3 * attention + embedding + 2 * (blocks + 3 * heads) + 3 * heads) * 2 * 64
    expected += cost.of(report.narrowed).train_macs * 64
    assert report.train_macs == expected
    plain = handle(replace(instruction, objective="deepest-teaches"))
    small = handle(
        replace(
            instruction,
            objective="deepest-teaches",
            spec=report.narrowed,
            state=extract(model.state_dict(), layout, report.narrowed),
        )
    )
    assert small.peak_memory_bytes <= report.peak_memory_bytes < plain.peak_memory_bytes


@pytest.mark.parametrize(
    ("name", "optimizer"),
    slow_but(
        [
            ("tests.vits:small", "adam"),
            ("tests.vits:writing", "sgd"),
            ("resnet8", "sgd"),
            ("mlp", "adam"),
            ("cnn", "sgd"),
        ],
        product([*VITS, "resnet8", "mlp", "cnn", "mobilenet_v2"], ["sgd", "adam"]),
    ),
)
def test_the_estimate_of_the_mask_phase_is_what_it_was_counted_to_hold(masked, name, optimizer):
    """Frozen weights, gated copies of what convolutions read, scores and what is trained beside them."""
    exits = name in (*VITS, "resnet8")
    instruction = masked(name, exits, train={"batch_size": 64, "optimizer": optimizer})
    task, shape = task_for(instruction), (1, 8, 8)
    slots = optimizer_slots(instruction.job.train)
    estimate = mask_peak_bytes(
        task, Training(64, slots), lambda spec: measured(resize(task.full, task.layout, spec), shape)
    )
    phase = MaskPhase(task, learnable_groups(task))
    phase.step(*task.examples.batch(slice(0, 64)))
    assert estimate == pytest.approx(phase.peak_bytes, rel=0.06)


def test_a_device_with_room_for_the_mask_phase_but_not_for_training_all_units_takes_part(masked):
    instruction = masked()
    counted = handle(instruction).peak_memory_bytes
    whole = handle(replace(instruction, objective="deepest-teaches")).peak_memory_bytes
    limit = int(1.03 * counted)
    assert limit < 0.9 * whole
    assert handle(instruction, Site(memory_bytes=limit)).narrowed is not None
    with pytest.raises(SiteError, match="memory: training this sub-model takes"):
        handle(instruction, Site(memory_bytes=int(0.97 * counted)))
    with pytest.raises(SiteError, match="memory: training this sub-model takes"):
        handle(replace(instruction, objective="deepest-teaches"), Site(memory_bytes=limit))


def test_a_device_without_room_for_the_gated_copies_refuses_though_it_could_train_all_units(masked):
    instruction = masked("resnet8", train={"batch_size": 64, "momentum": 0.0})
    whole = handle(replace(instruction, objective="deepest-teaches")).peak_memory_bytes
    with pytest.raises(SiteError, match="memory: training this sub-model takes"):
        handle(instruction, Site(memory_bytes=int(1.02 * whole)))


def test_the_small_model_is_trained_as_if_it_had_been_sent_small(masked):
    """Phase two, from the same random numbers, is plain training of the extracted sub-model."""
    instruction = masked()
    task = task_for(instruction)
    objective = make_objective("mask-learning", task)
    x, y = task.examples.batch(slice(0, 16))
    model, layout = build("tests.vits:small")
    small = resize(model, layout, objective.narrowed)
    logits = small.train()(x)
    teacher = functional.softmax(logits[-1].detach() / 3, 1)
    expected = sum(functional.cross_entropy(z, y) for z in logits)
    for z in logits[:-1]:
        student = functional.log_softmax(z / 3, 1)
        expected = expected + 0.5 * 9 * (teacher * (teacher.log() - student)).sum(1).mean()
    torch.testing.assert_close(objective.loss(x, y)[0], expected, rtol=1e-5, atol=1e-5)


def test_who_only_tests_learns_no_mask(masked):
    report = handle(masked(action="evaluate"))
    assert report.narrowed is None
    assert 0 <= report.metrics["accuracy"] <= 1


def test_it_refuses_what_it_does_not_know_and_what_it_cannot_narrow(masked):
    with pytest.raises(ObjectiveError, match="then: got 'nested'"):
        handle(masked(settings={"then": "nested"}))
    instruction = masked("mlp", exits=False)
    _, layout = build("mlp", False)
    task = task_for(instruction)
    with pytest.raises(ObjectiveError, match="no unit to choose"):
        learnable_groups(replace(task, spec=SubModelSpec.of({g.name: range(3) for g in layout.prunable})))


def test_a_mask_phase_whose_loss_is_no_number_ends_the_request_with_the_remedy(masked, tmp_path):
    with pytest.raises(ObjectiveError, match=r"mask-learning: the loss became (inf|nan); lower the learning rate"):
        handle(masked(settings={"mask-penalty": 1e39}))
    assert not ClientStore(str(tmp_path), 0).load(0), "nothing of it is remembered"


def test_a_regulariser_reaches_the_small_model(masked):
    plain = handle(masked("resnet8", True))
    sparse = handle(masked("resnet8", True, train={"sparsity": 0.05}))
    assert plain.narrowed == sparse.narrowed
    assert sparse.state["blocks.0.norm1.weight"].abs().sum() < plain.state["blocks.0.norm1.weight"].abs().sum()


@pytest.mark.parametrize("piece", [1 << 18, 12, 1])  # all rows at once, two at a time, each alone
def test_gating_a_frozen_layers_columns_is_gating_its_input_gradients_included(piece, monkeypatch):
    monkeypatch.setattr("client_app.objectives.mask_gates.PIECE", piece)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, requires_grad=True)
    layer, gate = nn.Linear(6, 4), torch.tensor([0.0, 1, 1, 0, 1, 0], requires_grad=True)
    direction = torch.randn(2, 3, 4)
    results = []
    for outcome in (
        GatedProduct.apply(x, layer.weight.detach(), layer.bias.detach(), gate),
        functional.linear(x * gate, layer.weight, layer.bias),
    ):
        results.append((outcome.detach(), *torch.autograd.grad((outcome * direction).sum(), (x, gate))))
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)


def test_both_ways_of_gating_give_the_scores_the_same_gradients():
    found = []
    for is_frozen in (True, False):
        model, layout = build("tests.vits:small")
        if is_frozen:
            freeze(model)
        groups = inner_groups(layout, dict(shapes_of(model.state_dict())))
        gates = MaskGates(model, groups, {group.name: torch.zeros(group.size) for group in groups})
        assert bool(gates._replaced) == is_frozen
        gates.draw(torch.Generator().manual_seed(1))
        x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
        model(x)[-1].square().sum().backward()
        gates.remove()
        assert not any("forward" in vars(module) for module in model.modules())
        found.append(gates.scores.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_the_weights_of_torchs_own_attention_are_frozen_with_the_others():
    attention, norm = nn.MultiheadAttention(8, 2), nn.LayerNorm(8)
    trained = freeze(nn.ModuleList([attention, norm]))
    assert {id(p) for p in trained} == {id(p) for p in norm.parameters()}
    assert not any(p.requires_grad for p in attention.parameters())
