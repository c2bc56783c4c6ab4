"""Who is asked, when a merge happens, with what weight: three choices that go with every method, or are refused."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from server_app.config import parse
from strategies import LOOPS, STRATEGIES
from strategies.loop import LoopConfig, in_force
from tests.marks import slow_but
from tests.runs import equal_states, final_state, select, tiny_run, without_timings
from tests.strategies.scalar import World
from wire.flat import ConfigError
from wire.message import Failure, Instruction, Report

SUB_MODELS = [name for name, kind in STRATEGIES.items() if name not in LOOPS and not kind.needs_barrier]


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ({"quorum": 5}, r"loop\.quorum=5: only 4 clients take part; a round would never reach its quorum"),
        ({"quorum": 3, "clients_per_round": 2}, r"loop\.quorum=3 with loop\.clients-per-round=2: .* at most 2"),
        ({"quorum": 3, "concurrency": 2}, r"loop\.quorum=3 with loop\.concurrency=2: .*raise loop\.concurrency"),
        ({"ask": "on-arrival"}, r"loop\.ask=on-arrival: needs rounds that close .*loop\.quorum or loop\.deadline-s"),
        ({"max_lead": 1}, r"loop\.max-lead=1: a bound on leads needs rounds that close"),
        (
            {"ask": "on-arrival", "quorum": 2, "clients_per_round": 2},
            r"loop\.clients-per-round=2 with loop\.ask=on-arrival: .*loop\.concurrency",
        ),
        ({"quorum": 2, "staleness": "polynomial:1"}, r"loop\.staleness=polynomial:1: has no effect .*max-staleness=0"),
        ({"quorum": 2, "compensation": 2.0}, r"loop\.compensation=2: has no effect while loop\.max-staleness=0"),
        (
            {"quorum": 1, "max_staleness": -1, "merge_as": "values"},
            "stale weights would replace newer ones; lower loop.mixing-rate",
        ),
        (
            {"quorum": 1, "max_staleness": -1, "merge_as": "values", "mixing_rate": 0.5, "compensation": 1.0},
            "only steps can be compensated",
        ),
        ({"quorum": 1, "merge_as": "values", "mixing_rate": 1.5}, r"loop\.mixing-rate=1\.5 with loop\.merge-as=values"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_the_reason(loop, message):
    flat = {"strategy": "fedavg", "num-clients": 4}
    flat |= {f"loop.{key.replace('_', '-')}": value for key, value in loop.items()}
    with pytest.raises(ConfigError, match=message) as caught:
        parse(flat)
    assert str(caught.value).startswith("config: ")
    with pytest.raises(ConfigError, match=message):
        World([0.0] * 4, lambda pid, dispatch: 1.0).run(1, loop=LoopConfig(**loop))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ask", "always", "ask: got 'always', expected 'at-merge' or 'on-arrival'"),
        ("staleness_scales", "steps", "did you mean 'step'"),
        ("client_weight", "uniform", "expected 'examples' or 'equal'"),
        ("merge_as", "weights", "expected 'steps' or 'values'"),
        ("max_lead", -2, "max-lead: got -2, expected >= 0, or -1 for no bound"),
        ("max_staleness", -2, "max-staleness: got -2"),
        ("concurrency", -1, "concurrency: got -1"),
        ("compensation", -1.0, "compensation: got -1"),
        ("compensation_momentum", 1.0, r"compensation-momentum: got 1\.0, expected in \[0, 1\)"),
    ],
)
def test_values_out_of_range_are_named(field, value, message):
    with pytest.raises(ConfigError, match=message):
        LoopConfig(**{field: value})


def test_answers_that_are_always_steps_cannot_be_merged_as_values():
    with pytest.raises(ConfigError, match=r"loop\.merge-as=values with compression: its answers are steps"):
        parse({"strategy": "fedasync", "compression.kind": "dgc"})


# --- presets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOOPS)
def test_a_preset_gives_any_method_the_loop_of_the_one_that_it_is_named_after(name):
    own = parse({"strategy": name, "num-clients": 12})
    lent = parse({"strategy": "heterofl", "loop.preset": name, "num-clients": 12})
    assert own.run.loop == lent.run.loop != LoopConfig()
    assert lent.preset == own.method
    assert lent.flat()[f"{name}.{next(iter(LOOPS[name].Config.__dataclass_fields__)).replace('_', '-')}"] is not None
    assert parse(lent.flat()) == lent


def test_a_presets_own_settings_are_its_table_and_what_it_does_not_set_stays_free():
    flat = {"strategy": "heterofl", "loop.preset": "fedbuff", "fedbuff.buffer": 4, "loop.concurrency": 7}
    loop = parse(flat).run.loop
    assert (loop.quorum, loop.concurrency, loop.ask) == (4, 7, "on-arrival")


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"loop.preset": "fedbuf"}, "loop.preset: got 'fedbuf', expected .*did you mean 'fedbuff'"),
        ({"strategy": "ssp", "loop.preset": "fedbuff"}, "loop.preset=fedbuff with strategy=ssp: ssp has its own loop"),
        ({"strategy": "fedbuff", "loop.quorum": 4}, r"loop\.quorum=4: fedbuff sets it to 10; change fedbuff\.\*"),
        ({"loop.preset": "fedbuff", "fedbuff.buffer": 0}, r"fedbuff\.buffer: got 0, expected >= 1"),
        ({"loop.preset": "semi-async", "semi-async.quorum-ratio": 0.0}, "or a deadline-s > 0"),
    ],
)
def test_a_preset_that_makes_no_sense_is_refused(flat, message):
    with pytest.raises(ConfigError, match=message):
        parse(flat)


def test_a_method_made_by_hand_brings_its_loop_with_it():
    kind = LOOPS["ssp"]
    loop = in_force(LoopConfig(), "ssp", kind.Config(), 8)
    assert (loop.quorum, loop.max_lead, loop.mixing_rate) == (1, 3, 1 / 8)
    assert in_force(loop, "ssp", kind.Config(), 8) == loop


# --- who is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", ["at-merge", "on-arrival"])
def test_no_more_than_the_concurrency_are_at_work_at_once_and_all_get_their_turn(ask):
    world = World([0.0] * 6, lambda pid, dispatch: 1.0 + pid / 10 + dispatch / 1000)
    world.run(30, loop=LoopConfig(ask=ask, concurrency=2, quorum=2, max_staleness=-1))
    rows = select(world.rows, "arrival")
    for moment in {row["start_s"] for row in rows}:
        assert sum(row["start_s"] <= moment < row["finish_s"] for row in rows) <= 2
    assert {row["partition_id"] for row in rows} == set(range(6))


def test_asked_on_arrival_nobody_idles_and_one_client_may_answer_twice_in_a_round():
    world = World([0.0] * 3, lambda pid, dispatch: (1.0, 1.7, 5.0)[pid])
    world.run(3, loop=LoopConfig(ask="on-arrival", quorum=4, max_staleness=-1))
    assert [(pid, finish_s) for pid, finish_s, _ in world.arrivals()][:5] == [
        (0, 1.0),
        (1, 1.7),
        (0, 2.0),
        (0, 3.0),
        (1, 3.4),
    ]
    for pid in range(3):
        rows = sorted(select(world.rows, "arrival", partition_id=pid), key=lambda row: row["start_s"])
        assert all(later["start_s"] == row["finish_s"] for row, later in pairwise(rows))


def test_who_fails_is_not_asked_again_before_somebody_has_answered():
    """Nobody works: a round that asks on arrival ends all the same."""
    asked: list[int] = []

    class Broken(World):
        def handle(self, instruction: Instruction) -> Report | Failure:  # type: ignore[override]
            asked.append(instruction.partition_id)
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no usable answer in 3 rounds"):
        Broken([0.0] * 3, lambda pid, dispatch: 1.0).run(
            9, loop=LoopConfig(ask="on-arrival", quorum=2, max_staleness=-1)
        )
    assert len(asked) == 9


def test_without_a_bound_no_answer_is_too_old():
    world = World([0.0, 1.0], lambda pid, dispatch: (1.0, 30.0)[pid])
    world.run(31, loop=LoopConfig(quorum=1, max_staleness=-1))
    assert max(staleness for _, _, staleness in world.arrivals()) >= 29
    assert {row["status"] for row in select(world.rows, "arrival")} == {"merged"}


# --- with every method ----------------------------------------------------------------------------------------------


def _combined(tmp_path, strategy, preset, **settings):
    return tiny_run(
        tmp_path / f"{strategy}-{preset}", strategy=strategy, loop__preset=preset, fedbuff__buffer=2, **settings
    )


@pytest.mark.parametrize("preset", slow_but(("semi-async",), LOOPS))
def test_every_rule_goes_with_learned_rates(preset, tmp_path):
    rows = _combined(tmp_path, "adaptcl", preset, num_rounds=16)
    assert select(rows, "end")[0]["status"] == "completed"
    assert len({row["retention_ratio"] for row in select(rows, "arrival")}) > 1
    assert max(row["accuracy"] for row in select(rows, "evaluation")) > 0.5
    rounds = [row["server_round"] for row in select(rows, "decision")]
    assert len(rounds) == len(set(rounds)), "one round decided twice"


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "preset"), list(product(SUB_MODELS, LOOPS)))
def test_every_rule_goes_with_every_method(strategy, preset, tmp_path):
    rows = _combined(tmp_path, strategy, preset, num_rounds=6)
    assert select(rows, "end")[0]["status"] == "completed"
    assert len(select(rows, "merge")) == 6
    assert {row["status"] for row in select(rows, "arrival")} <= {"merged", "late"}


@pytest.mark.slow
def test_arrivals_versions_and_models_do_not_depend_on_the_number_of_workers(tmp_path):
    """HeteroFL under FedBuff; the loops by themselves are held to this by the contract tests."""
    settings = {"strategy": "heterofl", "loop.preset": "fedbuff", "fedbuff.buffer": 3, "num-rounds": 5}
    alone = tiny_run(tmp_path / "alone", **settings)
    shared = tiny_run(tmp_path / "shared", num_workers=2, **settings)
    assert without_timings(shared) == without_timings(alone)
    assert equal_states(final_state(tmp_path / "shared"), final_state(tmp_path / "alone"))
