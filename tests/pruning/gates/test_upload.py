"""Salient uploads: which units, and a bitmap that says so."""

from __future__ import annotations

import pytest
import torch

from pruning.gates import GateError, check_bitmap, salient_spec, to_bitmap
from pruning.spec import FULL, SubModelSpec
from zoo import get_model

_, LAYOUT = get_model("cnn", 10, 1, 8, width=0.5, gates=True)  # 16, 32 and 64 channels; gates on the last two


def salience(**best: list[int]) -> dict[str, torch.Tensor]:
    found = {"stage2": torch.zeros(32), "stage3": torch.zeros(64)}
    for name, units in best.items():
        found[name][units] = torch.arange(len(units), 0, -1).float()
    return found


def test_the_most_salient_units_are_sent_and_ungated_layers_whole():
    spec = salient_spec(LAYOUT, FULL, salience(stage2=[30, 1, 7], stage3=list(range(40, 64))), 0.25)
    assert spec.units["stage2"] == (0, 1, 2, 3, 4, 5, 7, 30), "units without any salience: the first of them"
    assert spec.units["stage3"] == tuple(range(40, 56))
    assert "stage1" not in spec.units


def test_only_units_that_the_client_holds_are_sent():
    held = SubModelSpec.of({"stage3": range(32, 64)})
    spec = salient_spec(LAYOUT, held, salience(stage3=[0, 1, 2, 40]), 0.125)
    assert 40 in spec.units["stage3"]
    assert set(spec.units["stage3"]) <= set(range(32, 64))
    assert spec.is_subset_of(held, LAYOUT)


def test_a_layer_of_which_nothing_is_known_is_sent_whole_and_so_is_everything_at_density_1():
    assert "stage2" not in salient_spec(LAYOUT, FULL, {"stage3": torch.rand(64)}, 0.5).units
    assert salient_spec(LAYOUT, FULL, salience(), 1.0) == FULL


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
