"""Sub-models whose layers write only a part of the residual stream, under every method that prunes units."""

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
}


@pytest.mark.parametrize("strategy", slow_but(("cos2p", "fjord"), METHODS))
def test_places_in_the_stream_are_never_averaged_and_every_sub_model_writes_to_its_own(strategy, tmp_path):
    spy, settings = Spy(), {**WRITING, **METHODS[strategy], "strategy": strategy}
    if strategy not in ("cos2p", "scalefl"):
        settings |= {"model.exits": False}
    tiny_run(tmp_path / "run", spy, **settings)
    narrowed = set()
    for instruction, report in spy.seen:
        held = report.narrowed or instruction.spec
        for key, group in (("blocks.0.sum1.places", "block0.heads_out"), ("blocks.0.sum2.places", "block0.mlp_out")):
            units = held.units.get(group, range(32))
            narrowed |= {group} if len(units) < 32 else set()
            assert report.state[key].tolist() == sorted(units)
            weight = "blocks.0.attention.proj.weight" if "heads" in group else "blocks.0.fc2.weight"
            assert len(report.state[weight]) == len(units)
    assert narrowed == {"block0.heads_out", "block0.mlp_out"}
    for state in states_of(tmp_path / "run", 3):
        assert all(torch.equal(t, torch.arange(32)) for key, t in state.items() if key.endswith(".places"))


def test_without_the_setting_a_model_is_as_it_was(tmp_path):
    plain, _ = small(10, 1, 8)
    assert not any("places" in key for key in plain.state_dict())
    whole = {"cos2p.budgets": "1"}
    tiny_run(tmp_path / "a", **{**WRITING, **whole})
    tiny_run(tmp_path / "b", **{**WRITING, **whole, "model.residual-outputs": False})
    with_places, without = final_state(tmp_path / "a"), final_state(tmp_path / "b")
    assert equal_states({key: with_places[key] for key in without}, without)
