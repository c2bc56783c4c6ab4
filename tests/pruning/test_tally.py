"""Coverage over many merges, by hand."""

from __future__ import annotations

import torch

from pruning.merge import MaskedMean
from pruning.spec import FULL, SubModelSpec
from pruning.tally import add_holders, extremes
from zoo import get_model


def test_holders_of_three_merges_by_hand():
    """Four hidden neurons: all, the first two, neurons 1 and 2."""
    model, layout = get_model("mlp", 3, 1, 2, hidden=(4,))
    state = model.state_dict()
    so_far: dict[str, torch.Tensor] = {}
    num_answers = 0
    for specs in ([FULL], [SubModelSpec.of({"hidden0": [0, 1]}), FULL], [SubModelSpec.of({"hidden0": [1, 2]})]):
        mean = MaskedMean(state, layout)
        for spec in specs:
            kept = list(spec.units.get("hidden0", range(4)))
            part = {
                "blocks.0.linear.weight": state["blocks.0.linear.weight"][kept],
                "blocks.0.linear.bias": state["blocks.0.linear.bias"][kept],
                "heads.0.weight": state["heads.0.weight"][:, kept],
                "heads.0.bias": state["heads.0.bias"],
            }
            mean.add(part, spec, 7.0)
        merged = mean.finalize()
        so_far = add_holders(so_far, merged.holders)
        num_answers += merged.num_merged
    expected = torch.tensor([3.0, 4.0, 3.0, 2.0])
    assert torch.equal(so_far["blocks.0.linear.bias"].expand(4), expected)
    assert torch.equal(so_far["heads.0.weight"].expand(3, 4), expected.expand(3, 4))
    assert torch.equal(so_far["heads.0.bias"].expand(3), torch.full((3,), 4.0))
    least, most = extremes(so_far, num_answers)
    assert (least["heads.0.weight"], most["heads.0.weight"]) == (0.5, 1.0)
    assert (least["heads.0.bias"], most["heads.0.bias"]) == (1.0, 1.0)
