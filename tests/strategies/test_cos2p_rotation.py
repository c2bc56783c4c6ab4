"""Co-S2P's rotation: who takes over, in turn, what nobody holds."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
import torch

from client_app.store import ClientStore
from strategies.cos2p import CoS2P
from tests.marks import slow_but
from tests.runs import equal_states, final_state, select, tiny_run
from tests.strategies.small_cos2p import MLP, VIT, Spy, states_of, strategy_of
from zoo import get_model


def turns(strategy: CoS2P, asked: list[list[int]]) -> list[int]:
    """Versions in which somebody took a turn, where these clients are asked and answer, merge by merge."""
    found = []
    for clients in asked:
        version = strategy.progress.global_version
        orders = strategy.plan(version + 1, clients)
        found += [version] if version in strategy._turns.values() else []
        for order in orders.values():
            strategy._coverage.note(order.spec, version + 1)
        strategy.progress.global_version, strategy.progress.num_merged = (
            version + 1,
            strategy.progress.num_merged + len(orders),
        )
    return found


ROTATING: dict[str, Any] = {"cos2p.rotate-coverage": True, "cos2p.budgets": "0.5", "cos2p.masks": "first"}


@pytest.mark.parametrize(
    ("loop", "patience"),
    [({}, 1), ({"loop.clients-per-round": 1}, 4), ({"loop.concurrency": 2}, 2), ({"loop.deadline-s": 9.0}, 2)],
)
def test_a_turn_comes_once_in_as_many_merges_as_it_takes_to_hear_everybody_however_few_are_asked(loop, patience):
    at_once = 4 // patience
    asked = [list(range(4))[at_once * (k % patience) :][:at_once] for k in range(16)]
    found = turns(strategy_of({**ROTATING, "cos2p.quorum-ratio": 0.0, **loop}), asked)
    assert len(found) > 1
    assert min(b - a for a, b in pairwise(found)) >= patience


def test_rotation_covers_the_units_of_a_model_without_blocks_too():
    strategy = strategy_of({**ROTATING, "cos2p.quorum-ratio": 0.0}, has_blocks=False)
    assert turns(strategy, [[0, 1, 2, 3]] * 4)


@pytest.mark.slow
def test_rotation_covers_every_block_and_unit_where_nobody_holds_them(tmp_path):
    spy = Spy()
    settings = {"cos2p.rotate-coverage": True, "cos2p.budgets": "0.5", "cos2p.masks": "first"}
    rows = tiny_run(tmp_path / "run", spy, num_rounds=6, **VIT, **settings)
    _, layout = get_model("tests.vits:small", 10, 1, 8, exits=True)
    held = {group.name: set() for group in layout.prunable}
    for instruction, _ in spy.seen:
        depth = 4 if instruction.spec.depth is None else instruction.spec.depth
        for group in layout.prunable:
            if int(group.name[5]) < depth:
                held[group.name] |= set(instruction.spec.units.get(group.name, range(group.size)))
    assert {name: len(units) for name, units in held.items()} == {g.name: g.size for g in layout.prunable}
    tall = {i.partition_id for i, _ in spy.seen if i.spec.depth is None}
    assert len(tall) > 1, "everybody takes a turn"
    assert "depth" not in select(rows, "evaluation")[-1]


LOOPS = {
    "all": {"cos2p.quorum-ratio": 0.0},
    "half": {"cos2p.quorum-ratio": 0.5},
    "on arrival": {"loop.quorum": 2, "loop.ask": "on-arrival"},
    "fedasync": {"loop.preset": "fedasync"},
}


@pytest.mark.parametrize("loop", slow_but(("half",), LOOPS))
def test_rotation_leaves_every_client_its_own_model_and_mask_however_rounds_close(loop, tmp_path):
    """Nobody holds all units, so N* is 0: everybody takes a turn now and then, and trains its own model mostly."""
    spy = Spy()
    settings = {**MLP, **LOOPS[loop], "fleet.name": "linear:2", "cos2p.budgets": "0.5", "cos2p.mask-epochs": 1}
    settings["cos2p.masks"] = "learned"
    asked_at_once = 4 if loop == "all" else 2 if loop in ("half", "on arrival") else 1
    rows = tiny_run(tmp_path / "run", spy, num_rounds=48 // asked_at_once, **settings, cos2p__rotate_coverage=True)
    assert select(rows, "merge")[-1]["n_star"] == 0
    turns, num_turns, merged_into = 0, defaultdict(int), []
    for pid in range(4):
        mine = [(i, r) for i, r in spy.seen if i.partition_id == pid]
        masks = [(i, r) for i, r in mine if i.objective.startswith("mask-learning")]
        assert len(masks) == 2, "the mask phase ends"
        for i, _ in mine:
            if not i.objective.startswith("mask-learning") and i.spec != masks[-1][1].narrowed:
                num_turns[pid] += 1
                merged_into.append(i.global_version)
        turns += num_turns[pid]
        assert num_turns[pid] < 0.5 * len(mine)
        steps = ClientStore(mine[0][0].job.store_dir, pid).load(mine[-1][0].dispatch)["objective"]["optimizer"]["step"]
        per_phase = -(-mine[0][1].num_examples // 16)
        assert float(steps) == 2 * per_phase, "scores and their optimiser waited for the client's turns to pass"
    assert len(num_turns) == 4, "everybody takes a turn"
    patience = -(-4 // asked_at_once)
    assert all(b - a >= patience for a, b in pairwise(sorted(merged_into))), "one at a time"


@pytest.mark.parametrize("loop", slow_but(("all",), ("all", "fedasync")))
def test_a_resumed_rotation_goes_on_with_whoever_is_next(loop, tmp_path):
    settings = {**MLP, **LOOPS[loop], "fleet.name": "linear:2", "cos2p.budgets": "0.5", "cos2p.mask-epochs": 1}
    settings |= {"cos2p.rotate-coverage": True, "train.schedule": "constant"}
    rounds = (3, 6) if loop == "all" else (7, 16)
    tiny_run(tmp_path / "whole", num_rounds=rounds[1], **settings)
    tiny_run(tmp_path / "first", num_rounds=rounds[0], **settings)
    tiny_run(tmp_path / "second", num_rounds=rounds[1], resume=str(tmp_path / "first"), **settings)
    assert equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "second"))


def test_without_rotation_what_nobody_holds_stays_as_it_was_bit_for_bit(tmp_path):
    tiny_run(tmp_path / "run", num_rounds=3, **{**MLP, "cos2p.budgets": "0.5", "cos2p.masks": "first"})
    states = states_of(tmp_path / "run", 3)
    weights = [state["blocks.0.linear.weight"] for state in states]
    assert torch.equal(weights[0][100:], weights[2][100:])
    assert not torch.equal(weights[0][:100], weights[2][:100])
