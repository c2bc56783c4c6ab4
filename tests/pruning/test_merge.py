"""The masked mean against independent oracles."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.extract import StateError, embed, extract
from pruning.merge import (
    MaskedMean,
    MergeError,
    coverage_mean,
    everybody_mean,
    holders_mean,
    residual_mean,
)
from pruning.prove import random_spec
from pruning.spec import FULL, SubModelSpec
from tests.pruning.conftest import randomized
from zoo import get_model

RULES = {
    "holders": holders_mean,
    "everybody": everybody_mean,
    "residual": residual_mean,
    "coverage": coverage_mean(0.5),
}


def reply(seed, spec, layout, model):
    noisy = {k: t.clone() for k, t in randomized(model, seed).state_dict().items()}
    return extract(noisy, layout, spec)


def dense_oracle(previous, layout, replies, rule):
    """The rule written out densely, in float64, without any of the code under test but ``embed``."""
    zeros = {k: torch.zeros_like(t) for k, t in previous.items()}
    placed = [(*embed(sub, layout, spec, zeros), weight) for sub, spec, weight in replies]
    weights = sum(weight for _, _, weight in replies)
    merged = {}
    for key, before in previous.items():
        if not before.is_floating_point():
            merged[key] = before
            continue
        total, cover = torch.zeros(before.shape).double(), torch.zeros(before.shape).double()
        for put, held, weight in placed:
            total += weight * put[key].double()
            cover += weight * held[key].double()
        mean = total / cover.clamp(min=1e-300)
        value = {
            "holders": mean,
            "everybody": total / weights,
            "residual": (total + (weights - cover) * before.double()) / weights,
            "coverage": torch.where(cover >= 0.5 * weights * (1 - 1e-9), mean, total / weights),
        }[rule]
        merged[key] = torch.where(cover > 0, value, before.double()).to(before.dtype)
    return merged


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=6, deadline=None)
@given(seeds=st.lists(st.integers(0, 1000), min_size=1, max_size=5), scale=st.floats(0.01, 100))
def test_every_rule_equals_its_dense_formula(rule, seeds, scale):
    model, layout = get_model("resnet8", 10, 3, 16, width=0.5)
    previous = {k: t.clone() for k, t in randomized(model, 12345).state_dict().items()}
    replies = []
    for i, seed in enumerate(seeds):
        spec = random_spec(layout.prunable, np.random.default_rng(seed))
        replies.append((reply(seed, spec, layout, model), spec, scale * (i + 1)))
    mean = MaskedMean(previous, layout)
    for item in replies:
        mean.add(*item)
    got = mean.finalize(rule=RULES[rule]).state
    expected = dense_oracle(previous, layout, replies, rule)
    for key in previous:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-6)


def test_with_full_models_every_rule_equals_flowers_own_fedavg():
    model, layout = get_model("cnn", 10, 3, 16)
    previous = {k: t.clone() for k, t in model.state_dict().items()}
    replies = [(reply(seed, FULL, layout, model), 10 + seed) for seed in range(3)]
    records = []
    for state, num_examples in replies:
        floats = {k: t for k, t in state.items() if t.is_floating_point()}
        records.append(RecordDict({"a": ArrayRecord(floats), "m": MetricRecord({"num-examples": num_examples})}))
    arrays = aggregate_arrayrecords(records, "num-examples")
    for rule in RULES.values():
        mean = MaskedMean(previous, layout)
        for state, num_examples in replies:
            mean.add(state, FULL, num_examples)
        merged = mean.finalize(rule=rule).state
        for key, expected in arrays.to_torch_state_dict().items():
            torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_an_entry_that_nobody_covers_keeps_its_value_bit_for_bit(seed):
    model, layout = get_model("resnet8", 10, 3, 16)
    previous = {k: t.clone() for k, t in randomized(model, 1).state_dict().items()}
    spec = random_spec(layout.prunable, np.random.default_rng(seed))
    mean = MaskedMean(previous, layout)
    mean.add(reply(seed, spec, layout, model), spec, 3.0)
    _, covered = embed(extract(previous, layout, spec), layout, spec, previous)
    for rule in RULES.values():
        again = MaskedMean(previous, layout)
        again.add(reply(seed, spec, layout, model), spec, 3.0)
        merged = again.finalize(rule=rule)
        assert all(torch.equal(merged.state[k][~covered[k]], previous[k][~covered[k]]) for k in previous)
    assert merged.n_star == (1 if spec == FULL or all(bool(c.all()) for c in covered.values()) else 0)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(4)))
def test_the_order_of_arrival_does_not_change_the_result_beyond_float_error(order):
    model, layout = get_model("resnet8", 10, 3, 16, width=0.5)
    previous = {k: t.clone() for k, t in model.state_dict().items()}
    specs = [random_spec(layout.prunable, np.random.default_rng(i)) for i in range(4)]
    results = []
    for sequence in (range(4), order):
        mean = MaskedMean(previous, layout)
        for i in sequence:
            mean.add(reply(i, specs[i], layout, model), specs[i], i + 1)
        results.append(mean.finalize().state)
    for key in previous:
        torch.testing.assert_close(results[0][key], results[1][key], rtol=2e-6, atol=1e-6)


def test_merging_merged_partial_sums_equals_merging_all():
    model, layout = get_model("resnet8", 10, 3, 16)
    previous = {k: t.clone() for k, t in model.state_dict().items()}
    specs = [random_spec(layout.prunable, np.random.default_rng(i)) for i in range(6)]
    flat, left, right = (MaskedMean(previous, layout) for _ in range(3))
    for i, spec in enumerate(specs):
        sub = reply(i, spec, layout, model)
        flat.add(sub, spec, i + 1)
        (left if i % 2 else right).add(sub, spec, i + 1)
    left.add_partial(right)
    one, two = flat.finalize(), left.finalize()
    assert (one.num_merged, one.n_star) == (two.num_merged, two.n_star)
    for key in previous:
        torch.testing.assert_close(one.state[key], two.state[key], rtol=1e-5, atol=1e-6)


@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 10)), min_size=1, max_size=7),
    st.sampled_from(sorted(RULES)),
)
@settings(max_examples=20)
def test_merging_merged_partial_sums_equals_merging_all_whatever_the_specs_weights_and_parts(seed, clients, rule):
    """Each client goes to one of four helpers, some of which get nobody; they are joined in two levels."""
    model, layout = get_model("mlp", 10, 1, 8)
    previous = {k: t.clone() for k, t in model.state_dict().items()}
    flat, *helpers = (MaskedMean(previous, layout, dtype=torch.float64) for _ in range(5))
    for number, (helper, weight) in enumerate(clients):
        spec = random_spec(layout.prunable, np.random.default_rng((seed, number)))
        sub = reply(seed + number, spec, layout, model)
        flat.add(sub, spec, weight)
        helpers[helper].add(sub, spec, weight)
    regions = [MaskedMean(previous, layout, dtype=torch.float64) for _ in range(2)]
    for number, helper in enumerate(helpers):
        regions[number // 2].add_partial(helper)
    regions[0].add_partial(regions[1])
    one, two = flat.finalize(rule=RULES[rule]), regions[0].finalize(rule=RULES[rule])
    assert (one.num_merged, one.n_star) == (two.num_merged, two.n_star)
    assert one.total_weight == pytest.approx(two.total_weight)
    for key in previous:
        torch.testing.assert_close(one.state[key], two.state[key], rtol=1e-6, atol=1e-7)


def test_coverage_counts_the_weight_of_the_holders(four_channels):
    model, layout = four_channels
    previous = model.state_dict()
    mean = MaskedMean(previous, layout)
    for units, weight in (([0, 1, 2, 3], 1.0), ([0, 2], 5.0), ([2], 7.0)):
        spec = SubModelSpec.of({"inner": units})
        mean.add(extract(previous, layout, spec), spec, weight)
    result = mean.finalize()
    assert result.coverage["0.weight"].flatten().tolist() == [6, 1, 13, 1]
    assert result.coverage["3.weight"].flatten().tolist() == [6, 1, 13, 1]
    assert result.holders["1.weight"].tolist() == [2, 1, 3, 1]
    assert result.n_star == 1
    assert result.uncovered_ratio == 0


def test_a_narrower_spec_merges_only_its_part():
    model, layout = get_model("cnn", 10, 3, 16)
    previous = {k: t.clone() for k, t in model.state_dict().items()}
    sub = {k: t + 1 if t.is_floating_point() else t for k, t in previous.items()}
    mean = MaskedMean(previous, layout)
    mean.add(sub, FULL, 1.0, part=SubModelSpec.of({"classes": [1, 4]}))
    merged = mean.finalize().state
    (axis,) = [a for a in layout.by_name["classes"].axes if a.key.endswith("weight")]
    moved = (merged[axis.key] != previous[axis.key]).any(1).nonzero().flatten().tolist()
    assert moved == [1, 4]
    with pytest.raises(MergeError, match="not part"):
        MaskedMean(previous, layout).add(
            extract(previous, layout, SubModelSpec.of({layout.groups[0].name: [0]})),
            SubModelSpec.of({layout.groups[0].name: [0]}),
            1.0,
            part=FULL,
        )


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_an_unusable_weight_is_refused(four_channels, weight):
    model, layout = four_channels
    with pytest.raises(MergeError):
        MaskedMean(model.state_dict(), layout).add(model.state_dict(), FULL, weight)


def test_a_bad_reply_changes_nothing(four_channels):
    model, layout = four_channels
    state = {k: t.clone() for k, t in model.state_dict().items()}
    mean = MaskedMean(state, layout)
    poisoned = {k: t.clone() for k, t in state.items()}
    poisoned["3.bias"][0] = float("nan")
    infinite = {k: t.clone() for k, t in state.items()}
    infinite["0.weight"][0] = float("inf")
    missing = {k: t for k, t in state.items() if k != "0.weight"}
    reshaped = {**state, "0.weight": state["0.weight"][:2]}
    for bad, error in ((poisoned, MergeError), (infinite, MergeError), (missing, StateError), (reshaped, StateError)):
        with pytest.raises(error):
            mean.add(bad, FULL, 1.0)
    mean.add(state, FULL, 0.0)
    assert mean.num_merged == 0
    assert all(torch.equal(t, state[k]) for k, t in mean.finalize().state.items())


def test_integer_buffers_are_never_averaged(four_channels):
    model, layout = four_channels
    previous = {k: t.clone() for k, t in model.state_dict().items()}
    sub = {k: t.clone() for k, t in previous.items()}
    sub["1.num_batches_tracked"] += 41
    mean = MaskedMean(previous, layout)
    mean.add(sub, FULL, 1.0)
    assert int(mean.finalize().state["1.num_batches_tracked"]) == int(previous["1.num_batches_tracked"])


def test_a_mixing_rate_moves_by_its_share(four_channels):
    model, layout = four_channels
    previous = {k: t.clone() for k, t in model.state_dict().items()}
    mean = MaskedMean(previous, layout)
    mean.add({k: t + 1 if t.is_floating_point() else t for k, t in previous.items()}, FULL, 2.0)
    merged = mean.finalize(mixing_rate=0.25).state
    torch.testing.assert_close(merged["0.weight"], previous["0.weight"] + 0.25)


def test_a_narrowed_reply_may_leave_out_the_units_that_it_writes():
    model, layout = get_model("vit_micro", 10, 1, 8, residual_outputs=True)
    previous, spec = model.state_dict(), SubModelSpec.of({"block0.mlp_out": range(0, 64, 3)})
    sent = extract(previous, layout, spec)
    assert sent["blocks.0.sum2.units"].tolist() == list(range(0, 64, 3))
    mean = MaskedMean(previous, layout)
    mean.add({key: tensor + 1 for key, tensor in sent.items() if tensor.is_floating_point()}, spec, 1.0)
    merged = mean.finalize().state
    assert torch.equal(merged["blocks.0.sum2.units"], torch.arange(64))
    moved = (merged["blocks.0.fc2.bias"] - previous["blocks.0.fc2.bias"]).nonzero().flatten()
    assert moved.tolist() == list(range(0, 64, 3))


@settings(max_examples=15)
@given(st.sampled_from(["mlp", "cnn", "resnet8", "vit_tiny"]), st.lists(st.integers(0, 999), min_size=1, max_size=4))
def test_what_is_extracted_and_merged_unchanged_is_the_original(name, seeds):
    model, layout = small(name)
    before = dict(model.state_dict())
    mean = MaskedMean(before, layout)
    for seed in seeds:
        spec = random_spec(layout.prunable, np.random.default_rng(seed))
        mean.add(extract(before, layout, spec), spec, 1.0 + seed)
    after = mean.finalize().state
    for key, tensor in before.items():
        assert torch.allclose(after[key].double(), tensor.double(), rtol=1e-6, atol=1e-8), key


@cache
def small(name):
    """A model with weights that no two units share, and its layout."""
    model, layout = get_model(name, 10, 3, 8, **({} if name.startswith("vit") else {"width": 0.25}))
    return randomized(model, 5), layout
