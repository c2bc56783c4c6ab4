"""Over Flower's messages: the same event log as in a pool, and of split learning as many as its exchange says."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
from flwr.app import RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client_app.handler import handle
from tests.marks import slow_but
from tests.runs import OWN, equal_states, final_state, select, tiny_run, without_timings
from tests.wire.test_grid import FakeGrid, node
from wire.grid import GridTransport, report_to_record
from wire.message import Instruction

BASE: dict[str, Any] = {
    "num_clients": 2,
    "num_rounds": 3,
    "data__max_train": 160,
    "train__batch_size": 16,
    "train__local_epochs": 1,
    "train__momentum": 0.0,
    "adasplit__kappa": 0.4,
    "adasplit__eta": 1.0,
    "evaluation__every": 9,
}


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's messages belong to a task, which an engine would have set."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def over_grid(folder: Any, **settings: Any) -> tuple[list[dict[str, Any]], Counter[int]]:
    """Rows of a run, and the training messages of every round."""
    messages: Counter[int] = Counter()

    def work(instruction: Instruction) -> RecordDict:
        if instruction.action == "train":
            messages[instruction.server_round] += 1
        return report_to_record(handle(instruction))

    grid = FakeGrid({100 + pid: node(pid, work) for pid in range(2)})
    transport = GridTransport(grid, 2)  # type: ignore[arg-type]
    return tiny_run(folder, transport=transport, **{**BASE, **settings}), messages


@pytest.mark.parametrize("strategy", ["fedavg", "heterofl", "adaptcl", "scaffold", "cos2p"])
def test_messages_change_nothing(strategy, tmp_path):
    settings = {**OWN.get(strategy, {}), "strategy": strategy, "adaptcl__rates__min_timed_rounds": 1}
    settings |= {"adaptcl__pruning_interval": 1, "loop__quorum": 0}
    rows, _ = over_grid(tmp_path / "grid", **settings)
    assert without_timings(rows) == without_timings(tiny_run(tmp_path / "local", **{**BASE, **settings}))
    assert equal_states(final_state(tmp_path / "grid"), final_state(tmp_path / "local"))
    assert select(rows, "decision") or strategy != "adaptcl"


@pytest.mark.parametrize(
    ("settings", "exchanges"),
    [
        ({"strategy": "adasplit", "adasplit__exchange": "exact"}, 4),
        ({"strategy": "adasplit", "adasplit__segments": 2}, 2),
        ({"strategy": "adasplit", "adasplit__exchange": "frozen"}, 1),
        ({"strategy": "splitfed"}, 5),
        ({"strategy": "sl-basic"}, 5),
    ],
    ids=["exact", "two segments", "frozen", "splitfed", "sl-basic"],
)
def test_messages_change_nothing_and_are_as_many_as_the_exchange_says(settings, exchanges, tmp_path):
    """64 images a client in batches of 16: four steps a round."""
    rows, messages = over_grid(tmp_path / "grid", **settings)
    assert without_timings(rows) == without_timings(tiny_run(tmp_path / "local", **BASE, **settings))
    assert equal_states(final_state(tmp_path / "grid"), final_state(tmp_path / "local"))
    assert messages[3] == 2 * exchanges
    if settings["strategy"] == "adasplit":
        assert messages[1] == 2  # the local phase is one request


@pytest.mark.parametrize(("quorum", "exits"), slow_but([(1, False)], product([1, 2], [True, False])))
def test_co_s2p_cut_anywhere_and_resumed_is_the_run_that_was_not_also_amid_its_mask_phase(quorum, exits, tmp_path):
    """Quorum by exits by where it is cut, over messages; a client's scores, its turn and answers under way go on."""
    settings: dict[str, Any] = {"strategy": "cos2p", "loop__quorum": quorum, "cos2p__mask_epochs": 1}
    if exits:
        settings |= {"model__name": "tests.vits:small", "model__exits": True, "cos2p__kd_start": 1}
    settings |= {"cos2p__budgets": "0.5", "cos2p__rotate_coverage": True, "train__optimizer": "adam"}
    settings |= {"train__learning_rate": 0.003, "evaluation__every": 1, "evaluation__family_every": 1}
    whole, _ = over_grid(tmp_path / "whole", **{**settings, "num_rounds": 6})
    learning = {row["server_round"] for row in select(whole, "arrival") if "mask_loss" in row}
    phase = max(learning)
    assert 2 <= phase < 6
    for cut in sorted({1, phase - 1, 5} if not exits else {phase - 1}):
        over_grid(tmp_path / f"cut{cut}", **{**settings, "num_rounds": cut})
        again = {**settings, "num_rounds": 6, "resume": str(tmp_path / f"cut{cut}")}
        rows, _ = over_grid(tmp_path / f"resumed{cut}", **again)
        assert equal_states(final_state(tmp_path / f"resumed{cut}"), final_state(tmp_path / "whole")), cut
        assert without_timings(rows) == without_timings(whole), cut
