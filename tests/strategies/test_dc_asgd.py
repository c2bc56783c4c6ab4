"""DC-ASGD-a: late steps corrected for what changed meanwhile, with the older models on disk."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import DCASGD
from strategies.loop import LoopConfig
from strategies.versions import VersionError, VersionStore
from tests.runs import equal_states, final_state, select, tiny_run, without_timings
from tests.strategies.scalar import Under, World

seconds = st.floats(0.1, 10, allow_nan=False)


def test_two_clients_by_hand():
    """Times 1 and 1.5 s: client 1's step of .1 arrives when client 0 has moved the model from 1 to .9."""
    world = World([0.0, 2.0], lambda pid, dispatch: (1.0, 1.5)[pid])
    values = world.values(2, "dc-asgd", mixing_rate=1.0, compensation=2.0, momentum=0.95)
    assert world.arrivals() == [(0, 1.0, 0), (1, 1.5, 1)]
    mean_square = 0.95 * 0.05 * 0.01 + 0.05 * 0.01
    step = 0.1 - 2 / math.sqrt(mean_square + 1e-7) * 0.01 * (0.9 - 1.0)
    assert values == pytest.approx([0.9, 0.9 + step], abs=1e-5)


def reference(
    world: World, num_merges: int, strength: float, momentum: float, rate: float
) -> tuple[list[float], list[tuple[int, float, int]]]:
    """Algorithm 2 of the paper with w_bak(m) kept by client, in gradients g = -d."""
    under, w, values, arrivals, mean_square = Under(world), 1.0, [], [], 0.0
    for pid in range(len(world.targets)):
        under.ask(pid, 0.0, 0, w)
    for version in range(num_merges):
        job = under.next()
        g = -(world.pull(job.pid, job.start) - job.start)
        mean_square = momentum * mean_square + (1 - momentum) * g * g
        w -= rate * (g + strength / math.sqrt(mean_square + 1e-7) * g * g * (w - job.start))
        values.append(w)
        arrivals.append((job.pid, job.finish_s, version - job.version))
        under.ask(job.pid, job.finish_s, version + 1, w)
    return values, arrivals


@settings(max_examples=8)
@given(
    st.lists(st.floats(-2, 2, allow_nan=False), min_size=2, max_size=4),
    st.lists(seconds, min_size=5, max_size=5),
    st.floats(0, 2),
    st.sampled_from([0.0, 0.5, 0.95]),
)
def test_it_is_the_papers_algorithm_for_any_targets_and_times(where, times, strength, momentum):
    world = World(where, lambda pid, dispatch: times[pid] + times[dispatch % 5] / 7)
    values, arrivals = reference(world, 10, strength, momentum, 0.5)
    got = world.values(10, "dc-asgd", compensation=strength, momentum=momentum, mixing_rate=0.5)
    assert got == pytest.approx(values, abs=1e-3)
    assert world.arrivals() == arrivals


def test_without_compensation_it_is_plain_and_writes_no_file(tmp_path):
    world = World([0.0, 2.0, -1.0], lambda pid, dispatch: 1.0 + pid)
    plain = world.values(8, loop=LoopConfig(quorum=1, max_staleness=-1, mixing_rate=1 / 3))
    assert world.values(8, "dc-asgd", folder=tmp_path / "versions", compensation=0.0) == plain
    assert not (tmp_path / "versions").exists()
    assert world.values(8, "dc-asgd") != plain


def test_versions_lie_on_disk_only_while_a_request_under_way_or_a_kept_checkpoint_needs_them(tmp_path, monkeypatch):
    """The slowest of three holds its version; of the others none stays longer than the two checkpoints kept."""
    seen = []
    release = VersionStore.release

    def spy(store: VersionStore, needed: set[int]) -> None:
        release(store, needed)
        seen.append((set(needed), store.versions()))

    monkeypatch.setattr(VersionStore, "release", spy)
    World([0.0, 2.0, 1.0], lambda pid, dispatch: (1.0, 1.3, 50.0)[pid]).run(20, "dc-asgd", folder=tmp_path)
    before: set[int] = set()
    for needed, kept in seen:
        assert 0 in needed, "the slowest started from version 0 and has not answered"
        assert set(kept) == needed | before
        assert len(kept) <= 4
        before = needed


def test_a_resumed_run_takes_the_older_models_along(tmp_path):
    settings = {"strategy": "dc-asgd", "dc-asgd.compensation": 2.0, "keep-checkpoints": 2}
    whole = tiny_run(tmp_path / "whole", **settings, num_rounds=10)
    tiny_run(tmp_path / "first", **settings, num_rounds=6)
    older = tmp_path / "first" / "checkpoints" / "round-000005.pt"
    for number, source in enumerate((tmp_path / "first", older)):
        again = tiny_run(tmp_path / f"second{number}", **settings, num_rounds=10, resume=str(source))
        assert equal_states(final_state(tmp_path / f"second{number}"), final_state(tmp_path / "whole"))
        assert without_timings(again) == without_timings(whole)
    assert max(row["staleness"] for row in select(whole, "arrival")) > 1


def test_a_run_whose_older_models_are_gone_is_not_resumed(tmp_path):
    tiny_run(tmp_path / "first", strategy="dc-asgd", num_rounds=4)
    for path in (tmp_path / "first" / "versions").iterdir():
        path.unlink()
    with pytest.raises(VersionError, match=r"version-0+\d+\.pt is missing.*resume from another checkpoint"):
        tiny_run(tmp_path / "second", strategy="dc-asgd", num_rounds=8, resume=str(tmp_path / "first"))


def test_its_defaults_are_the_papers():
    assert (DCASGD.Config().compensation, DCASGD.Config().momentum) == (2.0, 0.95)
