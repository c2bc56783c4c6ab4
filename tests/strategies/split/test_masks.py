"""Masks: gradients against autograd, frozen entries, and the server's half against torch on its own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from strategies.split import masks
from strategies.split.masks import MaskConfig, mask_gradients_, mask_weights, step_, step_logits_
from strategies.split.server import ServerDivergedError, SplitServer
from wire.flat import ConfigError
from wire.message import TrainConfig
from zoo import get_model
from zoo.cut import cut_model

TRAIN = TrainConfig(optimizer="adam", learning_rate=1e-2, weight_decay=1e-3)


def make(kind: str = "soft", train: TrainConfig = TRAIN, model: str = "lenet", **mask) -> tuple[SplitServer, nn.Module]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    full, _ = get_model(model, 10, 1, 8, width=0.1)
    cut = cut_model(full, "1")
    return SplitServer(cut_of_meta(full), full.state_dict(), MaskConfig(kind=kind, **mask), train), cut.server


def cut_of_meta(full: nn.Module):
    return cut_model(copy.deepcopy(full).to("meta"), "1")


def batch(server: SplitServer, number: int = 0, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    channels = dict(server.module.named_parameters())["blocks.1.conv.weight"].shape[1]
    return torch.rand(size, channels, 4, 4, generator=generator), torch.randint(0, 10, (size,), generator=generator)


def test_soft_gradients_are_autograds():
    weights, logits = torch.randn(50), torch.randn(50)
    target = torch.randn(50)
    u, v = weights.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = ((u * torch.sigmoid(v)) ** 2 @ target) + 0.3 * torch.sigmoid(v).sum()
    loss.backward()
    chances = torch.sigmoid(logits)
    gradient = 2 * weights * chances * target
    assert mask_gradients_(weights, chances, gradient, MaskConfig(penalty=0.3)) == [None]
    torch.testing.assert_close(gradient, u.grad)
    torch.testing.assert_close(chances, v.grad)


def test_hard_masks_are_binary_straight_through_and_frozen_below_the_threshold():
    logits = torch.tensor([2.0, -2.0, -3.0, 0.0])  # sigmoid: .88, .12, .05, .5; threshold .1
    config, chances = MaskConfig(kind="hard", hard_penalty=0.0, threshold=0.1), torch.sigmoid(logits)
    gradient, weights = torch.ones(4), torch.full((4,), 2.0)
    seen, found = torch.empty(4), torch.empty(4)
    mask_weights(weights, logits, config, seen, found)
    assert seen.tolist() == [2, 2, 0, 2]
    torch.testing.assert_close(found, chances)
    frozen = mask_gradients_(weights, found, gradient, config)
    assert gradient.tolist() == [1, 1, 0, 1]
    slope = 2 * chances * (1 - chances)
    torch.testing.assert_close(found, torch.where(logits < -2.5, torch.zeros(4), slope))
    assert [held is not None and held.tolist() for held in frozen] == [[0, 0, 1, 0]]


def test_hard_masks_have_defaults_of_their_own_and_soft_ones_the_authors():
    soft, hard = MaskConfig(), MaskConfig(kind="hard")
    assert (soft.start, soft.penalty_in_force, soft.rate_in_force) == (2.0, 1e-4, 1e-3)
    assert (hard.start, hard.penalty_in_force, hard.rate_in_force) == (2.0, 1e-6, 0.1)


@pytest.mark.parametrize("settings", [{"start": 0.0}, {"threshold": 0.9}, {"start": -3.0, "threshold": 0.1}])
def test_hard_masks_that_would_begin_and_so_stay_masked_are_refused(settings):
    with pytest.raises(ConfigError, match=r"start: got .* the threshold's logit: what begins masked stays masked"):
        MaskConfig(kind="hard", **settings)
    assert MaskConfig(kind="soft", **settings)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_piece_by_piece_is_what_it_is_at_once(kind, monkeypatch):
    logits, weights, gradient = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)) * 3
    config, results = MaskConfig(kind=kind, penalty=0.1, hard_penalty=0.1, threshold=0.1), []
    logits[40:80] = 1.0  # nothing of a part is frozen
    for piece, stepped in ((100, 100), (7, 100), (7, 20)):
        monkeypatch.setattr(masks, "PIECE", piece)
        monkeypatch.setattr(masks, "STEPPED", stepped)
        seen, chances, towards = torch.empty(100), torch.empty(100), gradient.clone()
        mask_weights(weights, logits, config, seen, chances)
        frozen = mask_gradients_(weights, chances, towards, config)
        held = torch.cat([torch.zeros(stepped) if part is None else part for part in frozen])
        results.append((seen, chances, towards, held))
        assert any(part is not None for part in frozen) == (kind == "hard")
    for whole, *pieced in zip(*results, strict=True):
        for part in pieced:
            torch.testing.assert_close(whole, part, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_where_nothing_is_held_neither_the_vector_nor_its_moments_move(optimizer):
    vector = torch.ones(4)
    if optimizer == "adam":
        made = torch.optim.Adam([vector], lr=0.1, fused=True)
    else:
        made = torch.optim.SGD([vector], lr=0.1, momentum=0.9, fused=True)
    held, frozen = torch.tensor([True, False, True, False]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    step_(made, torch.ones(4), [frozen])
    step_(made, torch.ones(4), None)  # moments exist now
    kept = [t.clone() for t in made.state[vector].values() if torch.is_tensor(t) and t.shape == vector.shape]
    before = vector.clone()
    step_(made, torch.ones(4), [frozen])
    moments = [t for t in made.state[vector].values() if torch.is_tensor(t) and t.shape == vector.shape]
    assert moments
    for tensor, old in ((vector, before), *zip(moments, kept, strict=True)):
        assert torch.equal(tensor[~held], old[~held])
        assert not torch.equal(tensor[held], old[held])


def test_a_logit_below_the_threshold_stays_for_good_whatever_its_momentum_was():
    logits = torch.zeros(4)
    made = torch.optim.Adam([logits], lr=0.1, fused=True)
    frozen = torch.tensor([0.0, 1.0, 0.0, 1.0])
    step_logits_(made, torch.ones(4))
    before = logits.clone()
    for _ in range(3):
        step_logits_(made, torch.ones(4) * (1 - frozen), [frozen])
    assert torch.equal(logits[frozen > 0], before[frozen > 0])
    assert (logits[frozen == 0] < before[frozen == 0]).all()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_without_masks_the_server_trains_as_torch_does(optimizer):
    train = TrainConfig(optimizer=optimizer, learning_rate=1e-2, weight_decay=1e-3, momentum=0.9)
    server, reference = make("none", train)
    parameters = reference.parameters()
    if optimizer == "adam":
        made = torch.optim.Adam(parameters, lr=1e-2, weight_decay=1e-3)
    else:
        made = torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=1e-3)
    for number in range(5):
        a, y = batch(server, number)
        loss, gradient = server.step(number % 2, a, y, 1e-2, wants_gradient=True)
        a = a.clone().requires_grad_()
        expected = functional.cross_entropy(reference(a), y)
        made.zero_grad()
        expected.backward()
        made.step()
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
        torch.testing.assert_close(gradient, a.grad)
    ours = server.state()
    for key, tensor in reference.state_dict().items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-6)


def test_soft_masks_train_as_autograd_through_u_times_sigmoid_v_with_two_adams():
    server, reference = make("soft", penalty=0.01, learning_rate=5e-3)
    output = {n: p for n, p in reference.named_parameters() if n.startswith("heads.0")}
    shared = {n: p for n, p in reference.named_parameters() if n not in output}
    logits = {n: torch.full_like(p, 2.0).requires_grad_() for n, p in shared.items()}
    weights = torch.optim.Adam([*shared.values(), *output.values()], lr=1e-2, weight_decay=1e-3)
    masks = torch.optim.Adam(logits.values(), lr=5e-3)
    for number in range(4):
        a, y = batch(server, number)
        loss, _ = server.step(7, a, y, 1e-2)
        seen = {n: p * torch.sigmoid(logits[n]) for n, p in shared.items()} | output
        cross_entropy = functional.cross_entropy(torch.func.functional_call(reference, seen, (a,)), y)
        total = cross_entropy + 0.01 * sum(torch.sigmoid(v).sum() for v in logits.values())
        weights.zero_grad()
        masks.zero_grad()
        total.backward()
        weights.step()
        masks.step()
        assert loss == pytest.approx(float(cross_entropy.detach()), rel=1e-4)
    ours = server.state_for(7)
    for name, p in shared.items():
        torch.testing.assert_close(ours[name], (p * torch.sigmoid(logits[name])).detach(), rtol=1e-4, atol=1e-5)


def spoil(activations: torch.Tensor) -> None:
    activations.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize(("factor", "what"), [(math.inf, "loss"), (math.nan, "loss"), (1.0, "gradient")])
def test_a_step_whose_loss_or_gradient_is_no_number_says_the_remedy_and_moves_nothing(factor, what):
    server, _ = make("soft")
    server.step(0, *batch(server), 1e-2)
    before = copy.deepcopy(server.export_state())
    a, y = batch(server, 1)
    if what == "gradient":
        server.module.register_forward_pre_hook(lambda _, inputs: spoil(inputs[0]))
    with pytest.raises(ServerDivergedError, match=rf"{what} is no number .* = 0, 4, 2, 7; lower train\.learning-rate"):
        server.step(0, factor * (1 + a), y, 1e-2, (0, 4, 2, 7), wants_gradient=True)
    after = server.export_state()
    assert torch.equal(after["weights"], before["weights"])
    assert torch.equal(after["plain"], before["plain"])
    assert torch.equal(after["clients"]["0"]["logits"], before["clients"]["0"]["logits"])


def test_a_step_of_one_client_leaves_the_masks_of_the_others_alone():
    server, _ = make("soft")
    for pid in (0, 1):
        server.step(pid, *batch(server, pid), 1e-2)
    before = server.served[1].logits.clone()
    server.step(0, *batch(server, 5), 1e-2)
    assert torch.equal(server.served[1].logits, before)
    assert not torch.equal(server.served[0].logits, before)


def test_the_output_layer_is_shared_without_a_mask():
    server, _ = make("hard")
    server.step(0, *batch(server), 1e-2)
    server.served[0].logits.fill_(-9.0)
    seen = server.state_for(0)
    assert torch.equal(seen["heads.0.weight"], server.state()["heads.0.weight"])
    assert all(not seen[key].any() for key in seen if not key.startswith("heads.0"))


def test_with_a_hard_mask_a_client_really_updates_only_its_part():
    server, _ = make("hard")
    for number in range(3):
        server.step(1, *batch(server, number), 1e-2)  # moments everywhere
    server.step(0, *batch(server), 1e-2)
    server.served[0].logits[::2] = -9.0
    before = server.weights.clone()
    server.step(0, *batch(server, 4), 1e-2)
    assert torch.equal(server.weights[::2], before[::2])
    assert not torch.equal(server.weights[1::2], before[1::2])


def test_dropout_belongs_to_the_step_and_disturbs_nobody_elses_random_numbers():
    torch.manual_seed(0)
    full, _ = get_model("mlp", 10, 1, 8)
    full.blocks[1].add_module("dropout", nn.Dropout(0.5))
    x, y = torch.rand(8, 200), torch.arange(8)

    def loss(*place: int) -> float:
        server = SplitServer(cut_of_meta(full), full.state_dict(), MaskConfig(kind="none"), TRAIN)
        assert server.is_random
        return server.step(0, x, y, 1e-3, place)[0]

    before = torch.get_rng_state()
    assert loss(0, 1, 2, 0) == loss(0, 1, 2, 0) != loss(0, 1, 3, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_running_statistics_belong_to_a_client():
    server, _ = make("soft", model="cnn")
    a, y = batch(server)
    server.step(0, a, y, 1e-3)
    server.step(1, a + 3, y, 1e-3)
    name = "blocks.1.norm.running_mean"
    assert not torch.allclose(server.state_for(0)[name], server.state_for(1)[name])
    mean = (server.state_for(0)[name] + server.state_for(1)[name]) / 2
    torch.testing.assert_close(server.state()[name], mean)


@pytest.mark.parametrize("kind", ["none", "soft", "hard"])
def test_a_server_goes_on_from_a_checkpoint_bit_for_bit(kind, tmp_path):
    whole, _ = make(kind)
    for number in range(3):
        whole.step(number % 2, *batch(whole, number), 1e-2)
    torch.save(whole.export_state(), tmp_path / "server.pt")
    resumed, _ = make(kind)
    resumed.import_state(torch.load(tmp_path / "server.pt", weights_only=True))
    for server in (whole, resumed):
        for number in range(3, 6):
            server.step(number % 2, *batch(server, number), 1e-2)
    assert torch.equal(whole.weights, resumed.weights)
    assert torch.equal(whole.plain, resumed.plain)
    for pid in whole.served:
        first, second = whole.state_for(pid), resumed.state_for(pid)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_client_first_served_after_a_resume_begins_with_the_statistics_that_everybody_began_with(tmp_path):
    """The run's state, from which a resumed server is made, has the mean of those served before."""
    whole, _ = make(model="cnn")
    a, y = batch(whole)
    whole.step(0, a + 3, y, 1e-2)
    torch.save(whole.export_state(), tmp_path / "server.pt")
    full, _ = get_model("cnn", 10, 1, 8, width=0.1)
    resumed = SplitServer(cut_of_meta(full), {**full.state_dict(), **whole.state()}, MaskConfig(), TRAIN)
    resumed.import_state(torch.load(tmp_path / "server.pt", weights_only=True))
    for server in (whole, resumed):
        server.step(1, a, y, 1e-2)
    first, second = whole.state_for(1), resumed.state_for(1)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_test_serves_nobody_the_mean_of_statistics_is_that_of_those_who_were_trained_for():
    server, _ = make(model="cnn")
    a, y = batch(server)
    server.step(0, a + 3, y, 1e-3)
    expected = server.state()["blocks.1.norm.running_mean"]
    server.logits(1, a)
    server.state_for(2)
    assert torch.equal(server.state()["blocks.1.norm.running_mean"], expected)
    assert list(server.served) == [0]
