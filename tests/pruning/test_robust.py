"""Robust merging against formulas written out entry by entry, and against attackers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.extract import extract
from pruning.groups import Axis, Group, Layout
from pruning.merge import MaskedMean, MergeError, everybody_mean, residual_mean
from pruning.prove import random_spec
from pruning.robust import RobustMean
from pruning.spec import FULL, SubModelSpec
from tests.pruning.conftest import randomized
from zoo import get_model

LINE = Layout((Group("units", 4, (Axis("w", 0),)),))
ZEROS = {"w": torch.zeros(4)}


def answer(*values: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(values)}


def merged(mean: MaskedMean, **keywords) -> list[float]:
    return mean.finalize(**keywords).state["w"].tolist()


def test_the_median_of_three_holders_and_of_two_by_hand():
    mean = RobustMean(ZEROS, LINE, centre="median")
    mean.add(answer(1, 1, 1, 1), FULL, 1)
    mean.add(answer(2, 2, 2, 2), FULL, 100)  # weights count for nothing
    mean.add(answer(9e9, 7), SubModelSpec.of({"units": [0, 2]}), 1)
    assert merged(mean) == [2, 1.5, 2, 1.5]


def test_the_trimmed_mean_leaves_out_at_least_one_at_each_end_and_never_all_by_hand():
    mean = RobustMean(ZEROS, LINE, centre="trimmed-mean", trim_ratio=0.1)
    for value in (1.0, 2.0, 4.0, 1e30):
        mean.add(answer(value, value), SubModelSpec.of({"units": [0, 1]}), 1)
    mean.add(answer(8), SubModelSpec.of({"units": [1]}), 1)
    mean.add(answer(5), SubModelSpec.of({"units": [3]}), 1)
    assert merged(mean) == [3, pytest.approx((2 + 4 + 8) / 3), 0, 5]


def test_what_nobody_held_keeps_its_value_bit_for_bit():
    before = {"w": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    for centre in ("mean", "trimmed-mean", "median"):
        mean = RobustMean(before, LINE, centre=centre)
        mean.add(answer(5), SubModelSpec.of({"units": [1]}), 1)
        state = mean.finalize().state["w"]
        assert torch.equal(state[[0, 2, 3]], before["w"][[0, 2, 3]])
        assert state[1] == 5


def test_every_merge_rule_applies_to_the_centre():
    before = {"w": torch.full((4,), 10.0)}
    for rule, expected in ((everybody_mean, 2 / 2), (residual_mean, (2 + 10) / 2)):
        mean = RobustMean(before, LINE, centre="median")
        mean.add(answer(2), SubModelSpec.of({"units": [0]}), 1)
        mean.add(answer(0), SubModelSpec.of({"units": [1]}), 1)
        assert merged(mean, rule=rule)[0] == pytest.approx(expected)


@pytest.mark.parametrize("centre", ["median", "trimmed-mean"])
@pytest.mark.parametrize("rule", [everybody_mean, residual_mean])
def test_no_weight_that_a_client_claims_holds_still_what_others_train(rule, centre):
    """Both rules divide by everybody's weight; the liar holds the last unit only."""
    results = []
    for claimed in (1.0, 1e12):
        mean = RobustMean(ZEROS, LINE, centre=centre)
        for _ in range(3):
            mean.add(answer(4, 4, 4), SubModelSpec.of({"units": [0, 1, 2]}), 1)
        mean.add(answer(0), SubModelSpec.of({"units": [3]}), claimed)
        results.append(merged(mean, rule=rule))
    assert results[0] == results[1] == pytest.approx([3, 3, 3, 0])


def test_an_update_longer_than_the_bound_is_shortened_to_it_by_hand():
    before = {"w": torch.ones(4)}
    mean = RobustMean(before, LINE, centre="mean", clip_norm=5.0)
    mean.add(answer(1 + 30, 1 - 40, 1, 1), FULL, 1)  # norm 50: a tenth of it is left
    assert merged(mean) == pytest.approx([4, -3, 1, 1])


def test_the_factor_bounds_updates_by_the_median_norm_of_the_round():
    mean = RobustMean(ZEROS, LINE, centre="mean", clip_factor=2.0)
    for value in (1.0, 1.0, 1000.0):
        mean.add(answer(value, 0, 0, 0), FULL, 1)
    assert merged(mean)[0] == pytest.approx((1 + 1 + 2) / 3)


def test_a_narrowed_answer_counts_where_it_was_narrowed_to():
    mean = RobustMean(ZEROS, LINE, centre="median")
    mean.add(answer(3, 4, 5, 6), FULL, 1, part=SubModelSpec.of({"units": [1, 3]}))
    assert merged(mean) == [0, 4, 0, 6]


def test_unusable_answers_are_refused_as_by_the_mean():
    mean = RobustMean(ZEROS, LINE)
    with pytest.raises(MergeError, match="NaN or infinity"):
        mean.add(answer(math.nan, 0, 0, 0), FULL, 1)
    with pytest.raises(MergeError, match="weight must be finite"):
        mean.add(answer(0, 0, 0, 0), FULL, math.inf)
    assert mean.num_merged == 0


def test_robust_merges_cannot_be_composed_and_say_so():
    with pytest.raises(MergeError, match="cannot be composed"):
        RobustMean(ZEROS, LINE).add_partial(MaskedMean(ZEROS, LINE))


@pytest.mark.parametrize("bad", [{"centre": "mode"}, {"trim_ratio": 0.5}, {"clip_norm": -1.0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(MergeError, match="expected one of"):
        RobustMean(ZEROS, LINE, **bad)


def oracle(values: list[float], centre: str, trim_ratio: float) -> float:
    ordered = sorted(values)
    if centre == "median":
        return float(np.median(ordered))
    cut = min(math.ceil(trim_ratio * len(ordered) - 1e-9), (len(ordered) - 1) // 2)
    return float(np.mean(ordered[cut : len(ordered) - cut]))


@pytest.mark.slow
@given(st.integers(0, 10**6), st.integers(1, 7), st.sampled_from(["median", "trimmed-mean"]), st.floats(0, 0.49))
@settings(max_examples=10)
def test_every_entry_of_a_real_model_is_the_centre_of_its_own_holders(seed, num_clients, centre, trim_ratio):
    model, layout = get_model("mlp", 10, 1, 8)
    previous = {k: t.clone() for k, t in model.state_dict().items()}
    mean = RobustMean(previous, layout, centre=centre, trim_ratio=trim_ratio)
    held: dict[tuple, list[float]] = {}
    index = {k: torch.arange(t.numel()).reshape(t.shape) for k, t in previous.items()}
    for client in range(num_clients):
        spec = random_spec(layout.prunable, np.random.default_rng((seed, client)))
        sub = extract({k: t.clone() for k, t in randomized(model, seed + client).state_dict().items()}, layout, spec)
        mean.add(sub, spec, 1 + client)
        for key, places in extract(index, layout, spec).items():
            for place, value in zip(places.flatten().tolist(), sub[key].flatten().tolist(), strict=True):
                held.setdefault((key, place), []).append(value)
    state = mean.finalize().state
    rng = np.random.default_rng(seed)
    names = list(held)
    for number in rng.choice(len(names), size=min(300, len(names)), replace=False):
        key, place = names[number]
        got = float(state[key].flatten()[place])
        assert got == pytest.approx(oracle(held[key, place], centre, trim_ratio), rel=1e-5, abs=1e-6)


@given(st.integers(0, 10**6), st.integers(3, 9))
@settings(max_examples=25)
def test_no_minority_moves_the_median_or_the_trimmed_mean_out_of_the_range_of_the_honest(seed, num_clients):
    rng = np.random.default_rng(seed)
    num_bad = (num_clients - 1) // 2
    for centre, bad in (("median", num_bad), ("trimmed-mean", min(num_bad, math.ceil(0.3 * num_clients)))):
        mean = RobustMean(ZEROS, LINE, centre=centre, trim_ratio=0.3)
        honest = rng.normal(size=(num_clients - bad, 4)).astype(np.float32)
        for row in honest:
            mean.add({"w": torch.from_numpy(row)}, FULL, 1)
        for _ in range(bad):
            mean.add({"w": torch.from_numpy(rng.normal(size=4).astype(np.float32) * 1e20)}, FULL, 1e9)
        state = mean.finalize().state["w"].numpy()
        assert (state >= honest.min(axis=0) - 1e-5).all()
        assert (state <= honest.max(axis=0) + 1e-5).all()


def test_what_is_multiplied_after_the_merge_is_bounded_as_it_will_move_the_model():
    """An update of 10 that is to be tripled moves the model by 30: a bound of 6 leaves it 2."""
    mean = RobustMean(ZEROS, LINE, centre="mean", clip_norm=6.0)
    mean.add(answer(10, 0, 0, 0), FULL, 1)
    mean.later = {"w": 3.0}
    assert merged(mean)[0] == pytest.approx(2.0)
