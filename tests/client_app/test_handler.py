"""One instruction in, one report out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from client_app.batches import batches, flip_shift, local_batches
from client_app.data import Examples, client_examples, load_images, partitions
from client_app.evaluation import evaluate, reestimate_batch_norm
from client_app.handler import MemoryMeter, TrainingError, compress, handle, learning_rate
from client_app.site import Site, SiteError
from client_app.store import ClientStore
from pruning.compress import densify
from pruning.cost import measure_costs
from pruning.extract import extract
from pruning.groups import Axis, Group, Layout
from pruning.select import equal_widths, select_prefix
from pruning.spec import SubModelSpec
from tests.runs import tiny_run
from wire.message import CompressionConfig, DataConfig, Instruction, Job, ModelConfig, Report, TrainConfig
from wire.training import make_optimizer, optimizer_slots
from zoo import get_model

HALF = SubModelSpec.of({"stage1": range(16), "stage2": range(0, 64, 2), "stage3": range(64)})


def test_training_changes_the_state_and_reports_what_it_cost(make_instruction):
    instruction = make_instruction(spec=HALF, train={"local_epochs": 3})
    before = {key: tensor.clone() for key, tensor in instruction.state.items()}
    report = handle(instruction)
    assert {k: t.shape for k, t in report.state.items()} == {k: t.shape for k, t in before.items()}
    assert not torch.equal(report.state["blocks.0.conv.weight"], before["blocks.0.conv.weight"])
    assert all(torch.equal(instruction.state[k], before[k]) for k in before), "the instruction's tensors are not ours"
    assert report.num_examples == sum(report.label_counts) == 64
    model, layout = get_model("cnn", 10, 1, 8)
    cost = measure_costs(model, layout, torch.zeros(2, 1, 8, 8)).of(HALF)
    assert report.train_macs == 3 * 64 * cost.train_macs
    assert report.compute_s > 0
    assert report.metrics.keys() == {"loss", "accuracy"}


def test_the_same_instruction_gives_the_same_report_and_another_dispatch_another(make_instruction):
    first, again = handle(make_instruction()), handle(make_instruction())
    other = handle(make_instruction(dispatch=1))
    assert all(torch.equal(first.state[k], again.state[k]) for k in first.state)
    assert not torch.equal(first.state["blocks.0.conv.weight"], other.state["blocks.0.conv.weight"])


def test_with_statistics_of_its_own_a_clients_test_does_not_depend_on_those_that_were_merged(make_instruction):
    merged = make_instruction(action="evaluate")
    spoiled = {key: tensor + 100 if key.endswith("running_mean") else tensor for key, tensor in merged.state.items()}
    own = {"own-statistics": True}
    assert handle(replace(merged, state=spoiled)).metrics["loss"] != handle(merged).metrics["loss"]
    found = handle(replace(merged, state=spoiled, settings=own)).metrics
    assert found == handle(replace(merged, settings=own)).metrics
    model, _ = get_model("cnn", 10, 1, 8)
    model.load_state_dict(merged.state)
    train, test = client_examples(merged.job.data, 4, 0)
    reestimate_batch_norm(model, train)
    assert found == evaluate(model, test)


@pytest.mark.parametrize("asked", [True, False])
def test_statistics_of_its_own_are_asked_for_by_the_key_of_the_run(asked, tmp_path):
    tests: list[Instruction] = []

    def spy(instruction: Instruction) -> Report:
        if instruction.action == "evaluate":
            tests.append(instruction)
        return handle(instruction)

    settings = {"evaluation.where": "federated", "evaluation.own-statistics": asked}
    tiny_run(tmp_path / "run", spy, strategy="fedavg", num_rounds=1, **settings)
    assert {instruction.settings["own-statistics"] for instruction in tests} == {asked}


def test_a_delta_is_the_trained_state_minus_what_was_sent(make_instruction):
    trained, delta = handle(make_instruction()), handle(make_instruction(wants_delta=True))
    assert delta.is_delta
    for key, tensor in make_instruction().state.items():
        if tensor.is_floating_point():
            assert torch.equal(delta.state[key], trained.state[key] - tensor)
        else:
            assert torch.equal(delta.state[key], trained.state[key])


def test_a_loss_that_explodes_is_an_error_that_names_the_remedy(make_instruction):
    with pytest.raises(TrainingError, match=r"client 0: the loss became .*lower the learning rate"):
        handle(make_instruction("mlp", train={"learning_rate": 1e12, "local_epochs": 3}))


def test_a_client_without_examples_is_an_error_that_names_the_remedy(make_instruction, monkeypatch):
    train, test = client_examples(make_instruction("mlp").job.data, 4, 0)
    nobody = replace(train, x=train.x[:0], y=train.y[:0])
    monkeypatch.setattr("client_app.handler.job_examples", lambda *which: (nobody, test, 10))
    with pytest.raises(TrainingError, match=r"no training example; raise data\.min-size"):
        handle(make_instruction("mlp"))


def test_evaluation_answers_with_loss_and_accuracy_on_the_clients_own_test_part(make_instruction):
    instruction = make_instruction(action="evaluate")
    report = handle(instruction)
    _, test = client_examples(instruction.job.data, 4, 0)
    assert report.state == {}
    assert report.num_examples == len(test) == 16
    model, _ = get_model("cnn", 10, 1, 8)
    model.load_state_dict(dict(instruction.state))
    x, y = test.batch(slice(None))
    logits = model.eval()(x).detach()
    assert report.metrics["accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    assert report.metrics["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)


def test_evaluation_does_not_depend_on_its_batches():
    x = torch.randn(50, 1, 8, 8)
    examples = Examples(x, torch.randint(10, (50,)), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    model, _ = get_model("cnn", 10, 1, 8, width=0.25)
    whole, parts = evaluate(model, examples), evaluate(model, examples, batch_size=7)
    assert whole["accuracy"] == parts["accuracy"]
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-5)


@pytest.mark.parametrize(("work_ratio", "num_batches"), [(1.0, 6), (0.4, 2), (2.0, 12), (2.6, 16), (0.01, 1)])
def test_local_work_is_a_multiple_of_the_local_epochs_to_the_nearest_batch(work_ratio, num_batches):
    config = TrainConfig(local_epochs=2, batch_size=16)
    found = list(local_batches(48, config, torch.Generator().manual_seed(0), work_ratio))
    assert len(found) == num_batches
    for start in range(0, num_batches - 2, 3):  # whole epochs see every example once
        assert torch.equal(torch.cat(found[start : start + 3]).sort().values, torch.arange(48))


def test_more_work_costs_as_many_more_macs_and_is_told_in_steps(make_instruction):
    one, three = handle(make_instruction("mlp")), handle(make_instruction("mlp", work_ratio=3.0))
    assert three.num_steps == 3 * one.num_steps
    assert three.train_macs == 3 * one.train_macs
    assert three.num_examples == one.num_examples


def test_partitions_are_disjoint_cover_everything_and_split_into_train_and_test():
    config = DataConfig(max_train=320)
    parts = partitions(config, 5)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(320))
    for pid, part in enumerate(parts):
        train, test = client_examples(config, 5, pid)
        assert len(train) + len(test) == len(part)
        assert len(test) > 0


def test_max_train_and_max_test_cut_the_data():
    data = load_images(DataConfig(max_train=100, max_test=50))
    assert (len(data.x_train), len(data.y_train), len(data.x_test), len(data.y_test)) == (100, 100, 50, 50)


def test_a_last_batch_of_one_example_joins_the_one_before():
    sizes = [len(part) for part in batches(33, 16, torch.Generator().manual_seed(0))]
    assert sizes == [16, 17]
    assert torch.equal(torch.cat(batches(33, 16, torch.Generator().manual_seed(0))).sort().values, torch.arange(33))


def test_the_cosine_schedule_starts_at_the_learning_rate_and_never_reaches_zero():
    config = TrainConfig(learning_rate=0.1, schedule="cosine")
    rates = [learning_rate(config, server_round, 10) for server_round in range(1, 11)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.05)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0
    assert learning_rate(TrainConfig(learning_rate=0.1, schedule="constant"), 7, 10) == 0.1


def test_augmentation_keeps_the_shape_and_moves_by_at_most_an_eighth():
    x = torch.zeros(16, 1, 16, 16)
    x[:, :, 8, 8] = 1
    moved = flip_shift(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(16))
    where = moved.nonzero()
    assert ((where[:, 2] - 8).abs() <= 2).all()
    assert ((where[:, 3] - 7.5).abs() <= 2.5).all()


def test_the_memory_meter_counts_weights_gradients_momentum_and_what_backward_needs():
    model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    x = torch.randn(8, 100)
    weights = 4 * (100 * 50 + 50 + 50 * 10 + 10)
    meter = MemoryMeter(model, optimizer_slots=1)
    for _ in range(2):
        with meter:
            model(x).sum().backward()
    input_and_hidden = 4 * (8 * 100 + 8 * 50)
    assert meter.fixed_bytes == 3 * weights
    assert meter.saved_bytes == input_and_hidden
    assert meter.peak_bytes == 3 * weights + input_and_hidden
    assert MemoryMeter(model, optimizer_slots=0).fixed_bytes == 2 * weights


@pytest.mark.parametrize(
    ("settings", "slots"),
    [
        ({"momentum": 0.0}, 0),
        ({"momentum": 0.9}, 1),
        ({"optimizer": "adam"}, 2),
        ({"optimizer": "adam", "momentum": 0}, 2),
    ],
)
def test_memory_is_counted_with_what_the_optimiser_really_holds(settings, slots, make_instruction):
    config, weights = TrainConfig(**settings), [nn.Parameter(torch.randn(30, 20)), nn.Parameter(torch.randn(20))]
    optimizer = make_optimizer(config, weights, 0.1)
    sum(weight.sum() for weight in weights).backward()
    optimizer.step()
    held = sum(
        t.numel() for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()
    )
    assert held == slots * sum(weight.numel() for weight in weights)
    assert optimizer_slots(config) == slots
    instruction = make_instruction("mlp", train=settings)
    bare = handle(make_instruction("mlp", train={"momentum": 0.0})).peak_memory_bytes
    num_weights = sum(tensor.numel() for tensor in instruction.state.values())
    assert handle(instruction).peak_memory_bytes == bare + 4 * slots * num_weights


def test_a_device_refuses_what_its_limit_does_not_hold_under_the_configured_optimiser(make_instruction):
    for settings in ({"momentum": 0.0}, {"momentum": 0.9}, {"optimizer": "adam"}):
        instruction = make_instruction("mlp", train=settings)
        counted = handle(instruction).peak_memory_bytes
        handle(instruction, Site(memory_bytes=int(1.03 * counted)))
        with pytest.raises(SiteError, match=r"memory: training this sub-model takes \d+ bytes"):
            handle(instruction, Site(memory_bytes=int(0.97 * counted)))


def test_a_smaller_model_needs_less_memory(make_instruction):
    assert handle(make_instruction(spec=HALF)).peak_memory_bytes < 0.7 * handle(make_instruction()).peak_memory_bytes


def dgc(density: float, folder) -> dict:
    return {"compression": CompressionConfig("dgc", density), "store_dir": str(folder)}


def test_what_is_not_sent_is_remembered_and_sent_later(make_instruction, tmp_path):
    instruction = make_instruction("mlp", job=dgc(0.1, tmp_path), wants_delta=True)
    plain = handle(make_instruction("mlp", wants_delta=True))
    report = handle(instruction)
    assert report.is_sparse
    sent = densify(report.state, instruction.state)
    residual = ClientStore(str(tmp_path), 0).load(0)["compression"]["residual"]
    for key, kept_back in residual.items():
        assert torch.allclose(sent[key] + kept_back, plain.state[key], atol=1e-7)
        assert int((sent[key] != 0).sum()) <= round(0.1 * sent[key].numel())
    second = make_instruction("mlp", job=dgc(0.1, tmp_path), wants_delta=True, dispatch=1, last_dispatch=0)
    step = handle(make_instruction("mlp", wants_delta=True, dispatch=1)).state
    later = densify(handle(second).state, second.state)
    after = ClientStore(str(tmp_path), 0).load(1)["compression"]["residual"]
    for key in residual:
        assert torch.allclose(later[key] + after[key], residual[key] + step[key], atol=1e-7)


def test_memories_follow_their_units_when_the_sub_model_changes(make_instruction, tmp_path):
    """Units kept before and after keep their residuals, new units start at zero."""
    _, layout = get_model("mlp", 10, 1, 8)
    first = SubModelSpec.of({"hidden0": range(100), "hidden1": range(0, 200, 2)})
    then = SubModelSpec.of({"hidden0": range(50, 150), "hidden1": range(100)})
    handle(make_instruction("mlp", first, job=dgc(0.1, tmp_path), wants_delta=True))
    old = ClientStore(str(tmp_path), 0).load(0)["compression"]["residual"]["blocks.1.linear.weight"]
    instruction = make_instruction("mlp", then, job=dgc(0.1, tmp_path), wants_delta=True, dispatch=1, last_dispatch=0)
    sent = densify(handle(instruction).state, instruction.state)["blocks.1.linear.weight"]
    step = handle(replace(instruction, job=replace(instruction.job, compression=CompressionConfig())))
    new = ClientStore(str(tmp_path), 0).load(1)["compression"]["residual"]["blocks.1.linear.weight"]
    carried = torch.zeros(200, 200)
    carried[torch.arange(0, 200, 2)[:, None], torch.arange(100)] = old
    expected = carried[torch.arange(100)[:, None], torch.arange(50, 150)] + step.state["blocks.1.linear.weight"]
    assert torch.allclose(sent + new, expected, atol=1e-7)
    assert layout.by_name["hidden0"].size == 200


def test_memories_follow_their_units_past_a_buffer_of_integers():
    """Swin's table of relative positions has two axes, and is sent whole."""
    full = nn.Linear(3, 2, bias=False)
    full.register_buffer("index", torch.arange(4).reshape(2, 2))
    layout = Layout((Group("inputs", 3, (Axis("weight", 1),)),))
    job = Job(ModelConfig(), DataConfig(), TrainConfig(), 1, 1, 0, CompressionConfig("dgc", 0.01))
    delta = {"weight": torch.tensor([[3.0, 1.0], [0.5, 2.0]]), "index": full.index}
    _, memory = compress(delta, {}, job, SubModelSpec.of({"inputs": [0, 1]}), layout, full)
    delta["weight"] = torch.zeros(2, 2)
    sparse, memory = compress(delta, memory, job, SubModelSpec.of({"inputs": [1, 2]}), layout, full)
    assert densify(sparse, delta)["weight"].tolist() == [[0, 0], [2, 0]]
    assert memory["residual"]["weight"].tolist() == [[1, 0], [0, 0]]


def test_the_memory_of_a_lost_answer_is_not_used(make_instruction, tmp_path):
    job = dgc(0.1, tmp_path)
    handle(make_instruction("mlp", job=job, wants_delta=True, dispatch=5))
    lost = handle(make_instruction("mlp", job=job, wants_delta=True, dispatch=6, last_dispatch=-1))
    fresh = handle(make_instruction("mlp", job=dgc(0.1, tmp_path / "new"), wants_delta=True, dispatch=6))
    assert all(torch.equal(lost.state[key], fresh.state[key]) for key in fresh.state)


def test_a_client_never_allocates_the_full_model(make_instruction):
    model, layout = get_model("cnn", 10, 1, 8)
    cost = measure_costs(model, layout, torch.zeros(2, 1, 8, 8))
    spec = select_prefix(layout, equal_widths(layout, cost, 0.25))
    report = handle(make_instruction(spec=spec))
    assert {k: t.shape for k, t in report.state.items()} == {
        k: t.shape for k, t in extract(model.state_dict(), layout, spec).items()
    }


def test_frozen_weights_are_counted_without_gradient_and_optimiser_state():
    model = nn.Linear(100, 100, bias=False)
    trained = MemoryMeter(model, optimizer_slots=1).peak_bytes
    model.weight.requires_grad_(False)
    assert trained == 3 * 4 * 10_000
    assert MemoryMeter(model, optimizer_slots=1).peak_bytes == 4 * 10_000
