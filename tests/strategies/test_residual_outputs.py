"""Sub-models whose layers write only a part of the residual stream, under methods that prune units."""

from __future__ import annotations

import pytest
import torch

from tests.marks import slow_but
from tests.runs import equal_states, final_state, tiny_run
from tests.strategies.small_cos2p import VIT, Spy, states_of
from tests.vits import small

WRITING = {**VIT, "model.residual-outputs": True, "data.max-train": 200, "num-rounds": 3}
METHODS = {
    "cos2p": {"cos2p.masks": "learned"},
    "heterofl": {"heterofl.rates": "1,0.5"},
    "fjord": {"fjord.rates": "1,0.5"},
    "adaptcl": {},
    "fiarse": {},
    "fedrolex": {"fedrolex.rates": "1,0.5"},
    "fedmp": {},
    "scalefl": {},
    "scaffold": {"scaffold.rates": "1,0.5", "train.optimizer": "sgd", "train.momentum": 0.0},
    "heterofl, compressed": {"heterofl.rates": "1,0.5", "compression.kind": "dgc"},
    "heterofl, median": {"heterofl.rates": "1,0.5", "robust.centre": "median"},
    "cos2p, half of them at a time": {"cos2p.quorum-ratio": 0.5},
}


@pytest.mark.parametrize("method", slow_but(("cos2p", "fjord", "heterofl, compressed"), METHODS))
def test_places_in_the_stream_are_never_averaged_and_every_sub_model_writes_to_its_own(method, tmp_path):
    strategy = method.split(",")[0]
    spy, settings = Spy(), {**WRITING, **METHODS[method], "strategy": strategy}
    if strategy not in ("cos2p", "scalefl"):
        settings |= {"model.exits": False}
    tiny_run(tmp_path / "run", spy, **settings)
    narrowed = set()
    for instruction, report in spy.seen:
        held = report.narrowed or instruction.spec
        for key, group in (("blocks.0.sum1.units", "block0.attention_out"), ("blocks.0.sum2.units", "block0.mlp_out")):
            units = held.units.get(group, range(32))
            narrowed |= {group} if len(units) < 32 else set()
            assert report.state[key].tolist() == sorted(units)
            bias = "blocks.0.attention.proj.bias" if "attention" in group else "blocks.0.fc2.bias"
            assert len(report.state[bias]) == len(units)
    assert narrowed == {"block0.attention_out", "block0.mlp_out"}
    for state in states_of(tmp_path / "run", 3):
        assert all(torch.equal(t, torch.arange(32)) for key, t in state.items() if key.endswith(".units"))


def test_outputs_that_nobody_leaves_out_change_nothing(tmp_path):
    plain, _ = small(10, 1, 8)
    assert not any(key.endswith(".units") for key in plain.state_dict())
    whole = {"cos2p.budgets": "1"}
    tiny_run(tmp_path / "a", **{**WRITING, **whole})
    tiny_run(tmp_path / "b", **{**WRITING, **whole, "model.residual-outputs": False})
    prunable, without = final_state(tmp_path / "a"), final_state(tmp_path / "b")
    assert equal_states({key: prunable[key] for key in without}, without)
