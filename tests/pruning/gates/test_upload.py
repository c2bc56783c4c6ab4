"""Uploads of units: which units, and a bitmap that says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pruning.gates import GateError, check_bitmap, to_bitmap, upload_spec
from pruning.importance import UnitScores
from pruning.spec import FULL, SubModelSpec
from zoo import get_model

_, LAYOUT = get_model("cnn", 10, 1, 8, width=0.5, gates=True)  # 16, 32 and 64 channels; gates on the last two


def scores(**best: list[int]) -> UnitScores:
    found = {"stage2": np.zeros(32), "stage3": np.zeros(64)}
    for name, units in best.items():
        found[name][units] = np.arange(len(units), 0, -1)
    return found


def test_the_units_that_score_best_are_sent_and_ungated_layers_whole():
    spec = upload_spec(LAYOUT, FULL, scores(stage2=[30, 1, 7], stage3=list(range(40, 64))), 0.25)
    assert spec.units["stage2"] == (0, 1, 2, 3, 4, 5, 7, 30), "units without any score: the first of them"
    assert spec.units["stage3"] == tuple(range(40, 56))
    assert "stage1" not in spec.units


def test_only_units_that_the_client_holds_are_sent():
    held = SubModelSpec.of({"stage3": range(32, 64)})
    spec = upload_spec(LAYOUT, held, scores(stage3=[0, 1, 2, 40]), 0.125)
    assert 40 in spec.units["stage3"]
    assert set(spec.units["stage3"]) <= set(range(32, 64))
    assert spec.is_subset_of(held, LAYOUT)


def test_a_layer_of_which_nothing_is_known_is_sent_whole_and_so_is_everything_at_density_1():
    assert "stage2" not in upload_spec(LAYOUT, FULL, {"stage3": np.arange(64.0)}, 0.5).units
    assert upload_spec(LAYOUT, FULL, scores(), 1.0) == FULL


def test_a_bitmap_has_one_bit_per_unit():
    spec = SubModelSpec.of({"stage2": range(0, 32, 2), "stage3": range(8)})
    bitmap = to_bitmap(LAYOUT, spec)
    assert bitmap.tolist() == [0b10101010] * 4 + [255] + [0] * 7
    check_bitmap(bitmap, LAYOUT, spec)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: None, "got none"),
        (lambda b: b[:-1], "got torch.uint8"),
        (lambda b: b.to(torch.int64), "got torch.int64"),
        (lambda b: b ^ torch.tensor([1] + [0] * 11, dtype=torch.uint8), "disagree about 1 units"),
    ],
)
def test_a_bitmap_that_does_not_name_the_units_that_were_sent_is_refused(spoil, message):
    spec = SubModelSpec.of({"stage2": range(0, 32, 2)})
    with pytest.raises(GateError, match=message):
        check_bitmap(spoil(to_bitmap(LAYOUT, spec)), LAYOUT, spec)
