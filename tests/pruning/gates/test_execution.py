"""Compact execution is masked execution: outputs, gradients, statistics; and what losers do not get."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from pruning.cost import measure_costs
from pruning.extract import extract, resize, shapes_of
from pruning.gates import FLOOR, GateError, attach, executed_ratios, gates_of, key_of, num_winners, select_winners
from pruning.groups import Axis, Group, Layout
from pruning.spec import FULL
from tests.marks import slow_but
from tests.pruning.gates.conftest import QUICK, SMALL, images_for
from zoo import get_model

SHARES = ["sample", "group", "batch"]
every_model = pytest.mark.parametrize("name", slow_but(QUICK, SMALL))
every_share = pytest.mark.parametrize("share", SHARES)


def twins(model: nn.Module, share: str, training: bool, num_groups: int = 2) -> list[nn.Module]:
    """The same network, masked and compact."""
    made = [copy.deepcopy(model).train(training) for _ in range(2)]
    for twin, compact in zip(made, (False, True), strict=True):
        gates_of(twin).configure(share, compact, num_groups)
    return made


@every_share
@every_model
def test_compact_equals_masked_in_evaluation(name, share, make_gated):
    model, _ = make_gated(name)
    masked, compact = (twin(images_for(name)) for twin in twins(model, share, training=False))
    torch.testing.assert_close(compact, masked, rtol=1e-9, atol=1e-9)


@every_share
@every_model
def test_compact_equals_masked_in_training_outputs_gradients_and_running_statistics(name, share, make_gated):
    model, _ = make_gated(name)
    pair = twins(model, share, training=True)
    losses = [functional.cross_entropy(twin(images_for(name)), torch.arange(6)) for twin in pair]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-9)
    others = dict(pair[1].named_parameters())
    for key, parameter in pair[0].named_parameters():
        assert (parameter.grad is None) == (others[key].grad is None), key
        if parameter.grad is not None:
            torch.testing.assert_close(others[key].grad, parameter.grad, rtol=1e-7, atol=1e-9, msg=key)
    for (key, buffer), (_, other) in zip(pair[0].named_buffers(), pair[1].named_buffers(), strict=True):
        torch.testing.assert_close(other, buffer, rtol=1e-9, atol=1e-9, msg=key)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), num=st.integers(1, 7), density=st.floats(0.05, 1.0), share=st.sampled_from(SHARES))
def test_compact_equals_masked_for_any_images_density_and_batch(make_gated, seed, num, density, share):
    model, _ = make_gated("resnet8", density, torch.float32)
    images = images_for("resnet8", num, seed, torch.float32)
    with torch.no_grad():
        masked, compact = (twin(images) for twin in twins(model, share, training=False))
    torch.testing.assert_close(compact, masked, rtol=1e-4, atol=1e-5)


@every_model
def test_with_every_unit_winning_all_ways_to_share_are_one(name, make_gated):
    model, _ = make_gated(name, density=1.0)
    outputs = [twin(images_for(name)) for share in SHARES for twin in twins(model, share, training=False)]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-9, atol=1e-9)


@every_model
def test_without_an_active_gate_it_is_the_network_without_gates(name, make_gated):
    model, _ = make_gated(name)
    gates_of(model).leave_dense(site.group for site in gates_of(model).sites)
    gates_of(model).configure("group", compact=True)
    size, options = SMALL[name]
    plain, _ = get_model(name, 10, 3, size, **options)
    plain.double().load_state_dict({k: t for k, t in model.state_dict().items() if not k.startswith("gates.")})
    for training in (True, False):
        assert torch.equal(model.train(training)(images_for(name)), plain.train(training)(images_for(name)))


def test_the_gate_is_the_papers_formula_by_hand(make_gated):
    """s = mean |x|, g = ReLU(s W^T + b), the k largest win, y = ReLU(BN(conv(x)) g) there and 0 elsewhere."""
    model, _ = make_gated("resnet8")
    gates_of(model).configure("sample", compact=True)
    seen = {}
    block = model.eval().blocks[0]
    block.register_forward_pre_hook(lambda m, i: seen.update(x=i[0]))
    block.register_forward_hook(lambda m, i, o: seen.update(out=o))
    model(images_for("resnet8"))
    x, gate = seen["x"], model.gates[key_of("stage1.block0.inner")]
    s = x.abs().mean((2, 3))
    g = torch.relu(s / s.mean(1, keepdim=True) @ gate.weight.T + gate.bias)
    values = torch.zeros_like(g)
    for row, gates in enumerate(g.tolist()):
        for unit in sorted(range(16), key=lambda u: (-gates[u], u))[:8]:
            values[row, unit] = max(gates[unit], FLOOR)
    y = torch.relu(functional.batch_norm(
        functional.conv2d(x, block.conv1.weight, padding=1),
        block.norm1.running_mean, block.norm1.running_var, block.norm1.weight, block.norm1.bias,
    ) * values[:, :, None, None])  # fmt: skip
    expected = torch.relu(block.norm2(functional.conv2d(y, block.conv2.weight, padding=1)) + x)
    torch.testing.assert_close(seen["out"], expected, rtol=1e-9, atol=1e-9)


@every_share
def test_units_that_no_sample_selected_get_a_gradient_of_exactly_zero(share, make_gated):
    model, layout = make_gated("cnn")
    for twin in twins(model, share, training=True):
        functional.cross_entropy(twin(images_for("cnn")), torch.arange(6)).backward()
        gradients = {key: parameter.grad for key, parameter in twin.named_parameters()}
        num_losers = 0
        for site, gate in gates_of(twin).pairs():
            losers = ~gate.winners.union(site.size)
            num_losers += int(losers.sum())
            for axis in layout.by_name[site.group].axes:
                if axis.key in gradients:
                    rows = gradients[axis.key].movedim(axis.dim, 0)
                    assert not rows[losers].any()
                    assert rows[~losers].any()
            assert not gate.weight.grad[losers].any()
        assert num_losers


def test_the_gradient_is_the_mean_over_samples_of_each_ones_masked_gradient(make_gated):
    """In evaluation no sample touches another, so that each one's gradient can be had alone."""
    model, _ = make_gated("resnet8")
    gates_of(model.eval()).configure("sample", compact=True)
    images, labels = images_for("resnet8"), torch.arange(6)
    functional.cross_entropy(model(images), labels).backward()
    together = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    alone = {key: torch.zeros_like(gradient) for key, gradient in together.items()}
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        model.zero_grad()
        functional.cross_entropy(model(image), label).backward()
        for key, parameter in model.named_parameters():
            alone[key] += parameter.grad / 6
    for key, gradient in together.items():
        torch.testing.assert_close(gradient, alone[key], rtol=1e-7, atol=1e-10, msg=key)


@every_share
def test_running_statistics_of_units_that_nobody_selected_stay(share, make_gated):
    model, _ = make_gated("cnn")
    for twin in twins(model, share, training=True):
        before = copy.deepcopy(twin.state_dict())
        twin(images_for("cnn"))
        losers = ~twin.gates["stage3"].winners.union(128)
        for name in ("running_mean", "running_var"):
            old, new = before[f"blocks.2.norm.{name}"], twin.state_dict()[f"blocks.2.norm.{name}"]
            assert torch.equal(old[losers], new[losers])
            assert (old[~losers] != new[~losers]).all()
        assert losers.any()


@pytest.mark.parametrize("compact", [False, True])
def test_cumulative_statistics_are_those_of_the_samples_that_a_unit_won_for(compact, make_gated):
    """Re-estimation of batch norm sets momentum to None: after one batch the statistics are the batch's."""
    model, _ = make_gated("cnn")
    gates_of(model).configure("batch", compact)
    norm = model.blocks[2].norm
    norm.reset_running_stats()
    norm.momentum = None
    seen = {}
    norm.register_forward_pre_hook(lambda m, i: seen.update(y=i[0]))
    model.train()(images_for("cnn"))
    part = model.gates["stage3"].winners.parts[0]
    y = seen["y"] if compact else seen["y"][:, part]
    torch.testing.assert_close(norm.running_mean[part], y.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var[part], y.transpose(0, 1).flatten(1).var(1))


@every_share
def test_all_gates_at_zero_leave_the_first_units_speaking_at_the_floor(share, make_gated):
    model, _ = make_gated("cnn")
    for _, gate in gates_of(model).pairs():
        gate.weight.data.zero_()
        gate.bias.data.fill_(-1.0)
    for twin in twins(model, share, training=False):
        assert torch.isfinite(twin(images_for("cnn"))).all()
        winners = twin.gates["stage2"].winners
        assert winners.positions.sort(1).values.tolist() == [list(range(32))] * 6
        assert torch.equal(winners.values, torch.full_like(winners.values, FLOOR))


@every_share
@every_model
def test_a_batch_of_one_works(name, share, make_gated):
    model, _ = make_gated(name)
    masked, compact = (twin(images_for(name, 1)) for twin in twins(model, share, training=False))
    torch.testing.assert_close(compact, masked, rtol=1e-9, atol=1e-9)


@every_share
@pytest.mark.parametrize("name", ["resnet8", "vgg11"])
def test_a_batch_of_one_can_be_trained_on(name, share, make_gated):
    """At the end of ``vgg11`` a unit has one activation only: its variance is zero, its gradients stay numbers."""
    model, _ = make_gated(name)
    pair = twins(model, share, training=True)
    for twin in pair:
        functional.cross_entropy(twin(images_for(name, 1)), torch.tensor([3])).backward()
    others = dict(pair[1].named_parameters())
    for key, parameter in pair[0].named_parameters():
        torch.testing.assert_close(others[key].grad, parameter.grad, rtol=1e-7, atol=1e-9, msg=key)
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("layout_of_memory", [torch.contiguous_format, torch.channels_last])
def test_groups_answer_in_the_order_in_which_the_images_came(layout_of_memory, make_gated):
    model, _ = make_gated("resnet8", density=1.0)  # every unit wins: groups change nothing but the order on the way
    images = images_for("resnet8", 8).contiguous(memory_format=layout_of_memory)
    grouped, plain = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    gates_of(grouped).configure("group", compact=True, num_groups=4)
    torch.testing.assert_close(grouped(images), plain(images))
    assert sorted(gates_of(grouped).in_pass_order(torch.arange(8)).tolist()) == list(range(8))


def test_models_with_exits_are_gated_and_answer_at_every_exit():
    torch.manual_seed(0)
    model, _ = get_model("resnet8", 10, 3, 8, gates=True, exits=True)
    gates_of(model).set_density(0.5)
    pair = twins(model, "group", training=False)
    first, second = (twin(images_for("resnet8", dtype=torch.float32)) for twin in pair)
    assert len(first) == len(second) == 3
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_one_client_one_sub_model_is_the_masked_network_with_the_clients_units_winning(make_gated):
    """``share = client`` through the common extraction, against the whole network whose other units are silent."""
    model, layout = make_gated("vgg11", density=1.0)
    generator = torch.Generator().manual_seed(4)
    groups = [site.group for site in gates_of(model).sites]
    kept = {
        name: torch.randperm(layout.by_name[name].size, generator=generator)[
            : num_winners(layout.by_name[name].size, 0.5)
        ].tolist()
        for name in groups
    }
    spec = select_winners(layout, kept, FULL)
    small = resize(model, layout, spec)
    small.load_state_dict(extract(model.state_dict(), layout, spec), strict=True)
    gates_of(small.eval()).configure("client", compact=True)
    masked = copy.deepcopy(model).eval()
    for name in groups:  # silent: a unit that was not kept has a gate of zero for everybody
        norm = masked.get_submodule(next(s for s in gates_of(masked).sites if s.group == name).norms[0])
        lost = [u for u in range(layout.by_name[name].size) if u not in kept[name]]
        norm.weight.data[lost] = 0
        norm.bias.data[lost] = 0
    torch.testing.assert_close(small(images_for("vgg11")), masked(images_for("vgg11")), rtol=1e-9, atol=1e-9)
    for site, gate in gates_of(small).pairs():
        assert gate.units.tolist() == sorted(kept[site.group])
        assert len(gate.bias) == site.size, "predictors are whole"


def test_multiply_accumulates_counted_from_executed_shapes_are_the_formulas(make_gated):
    """Inner layers of residual blocks: k / C of both; a chain: k / C of the next layer's columns as well."""
    model, _ = make_gated("resnet8")
    gates_of(model.eval()).configure("batch", compact=True)
    model(images_for("resnet8"))
    ratios = executed_ratios(model)
    assert {key: ratios[key] for key in sorted(ratios)} == {
        f"blocks.{b}.conv{c}.weight": 0.5 for b in range(3) for c in (1, 2)
    }
    chain, _ = make_gated("vgg11")
    for share in SHARES:
        gates_of(chain.eval()).configure(share, compact=True, num_groups=2)
        chain(images_for("vgg11"))
        sizes = [16, 32, 64, 64, 128, 128, 128, 128]
        k = [1.0, *(num_winners(size, 0.5) / size for size in sizes[1:])]
        expected = {f"blocks.{i}.conv.weight": k[i] * k[i - 1] for i in range(1, 8)}
        assert executed_ratios(chain) == pytest.approx({**expected, "heads.0.linear.weight": k[7]})


def test_masked_execution_saves_nothing_and_says_so(make_gated):
    model, _ = make_gated("resnet8")
    model.eval()(images_for("resnet8"))
    assert set(executed_ratios(model).values()) == {1.0}


def test_predictors_are_priced(make_gated):
    model, layout = make_gated("resnet8", 1.0, torch.float32)
    plain, plain_layout = get_model("resnet8", 10, 3, 8)
    image = torch.zeros(1, 3, 8, 8)
    extra = measure_costs(model, layout, image).of(FULL).macs - measure_costs(plain, plain_layout, image).of(FULL).macs
    assert extra == 16 * 16 + 16 * 32 + 32 * 64


def test_a_copy_has_gates_of_its_own(make_gated):
    model, _ = make_gated("cnn")
    twin = copy.deepcopy(model)
    gates_of(twin).configure("batch", compact=True).set_density(1.0)
    assert twin.blocks[1].conv.wiring.gate is twin.gates["stage2"]
    assert twin.blocks[1].conv.wiring.gate is not model.gates["stage2"]
    assert gates_of(model).execution.share == "sample"
    assert int(model.gates["stage2"].num_winners) == 32
    assert shapes_of(twin.state_dict()) == shapes_of(model.state_dict())


@pytest.mark.parametrize(
    ("share", "num_groups", "message"), [("clinet", 4, "share must be one of"), ("group", 3, "power of two")]
)
def test_a_way_to_share_that_does_not_exist_is_refused(share, num_groups, message, make_gated):
    with pytest.raises(GateError, match=message):
        gates_of(make_gated("cnn")[0]).configure(share, True, num_groups)


class Depthwise(nn.Module):
    """A depthwise convolution with a bias and no normalisation behind it, between the units' writer and reader."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.norm = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32)
        self.depthwise, self.fc = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [batch, 10]."""
        hidden = self.norm(self.expand(self.stem(x).relu())).relu()
        return self.fc(self.depthwise(hidden).relu().mean((2, 3)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("share", ["sample", "batch"])
def test_of_a_loser_nothing_is_heard_not_even_the_bias_of_a_depthwise_convolution(share, training):
    torch.manual_seed(0)
    own = [Axis(f"{path}.{name}", 0) for path in ("expand", "norm", "depthwise") for name in ("weight", "bias")]
    own += [Axis("norm.running_mean", 0), Axis("norm.running_var", 0), Axis("fc.weight", 1)]
    stem = Group("stem", 16, (Axis("stem.weight", 0), Axis("stem.bias", 0), Axis("expand.weight", 1)))
    model, _ = attach(Depthwise(), Layout((stem, Group("inner", 32, tuple(own)))), (3, 8, 8))
    gates_of(model.double()).set_density(0.5)
    masked, compact = (twin(images_for("cnn")) for twin in twins(model, share, training))
    torch.testing.assert_close(compact, masked, rtol=1e-9, atol=1e-9)
