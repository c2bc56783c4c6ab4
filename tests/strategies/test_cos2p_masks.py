"""The vote on Co-S2P's masks, by hand and for all masks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pruning.spec import SubModelSpec
from strategies.cos2p_masks import agreed_mask


def test_an_agreed_mask_keeps_what_most_masks_keep():
    masks = [
        SubModelSpec.of({"g": [0, 2]}),
        SubModelSpec.of({"g": [2, 3]}),
        SubModelSpec.of({"g": [1, 2, 3], "h": [1]}),
    ]
    sizes = {"g": 4, "h": 2}
    assert agreed_mask(SubModelSpec.of({"g": [0, 1]}, 2), sizes, masks) == SubModelSpec.of({"g": [2, 3]}, 2)
    assert agreed_mask(SubModelSpec.of({"g": [0, 1, 2], "h": [0]}), sizes, masks).units == {"g": (0, 2, 3), "h": (1,)}
    assert agreed_mask(SubModelSpec.of({"g": [1, 3]}), sizes, []).units == {"g": (0, 1)}, "nobody has learned one yet"


@given(st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=8), max_size=6), st.integers(1, 8), st.integers(1, 8))
def test_of_agreed_masks_the_smaller_is_part_of_the_larger(kept, first, second):
    masks = [SubModelSpec.of({"g": sorted(units)}) for units in kept]
    small, large = (
        set(agreed_mask(SubModelSpec.of({"g": list(range(width))}), {"g": 8}, masks).units["g"])
        for width in sorted((first, second))
    )
    assert small <= large
    assert (len(small), len(large)) == tuple(sorted((first, second)))
