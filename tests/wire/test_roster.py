"""Who is who: nodes that come, go, return, claim what is not theirs, or take their time."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from tests.wire.test_grid import FakeGrid, node, task, works  # noqa: F401  (task is a fixture)
from wire.grid import GridTransport, NoClientsError
from wire.roster import HEAD, Roster, partition_record


def roster_of(nodes, num_clients=3, num_probes=0) -> tuple[Roster, FakeGrid]:
    grid = FakeGrid(nodes)
    return Roster(grid, num_clients, num_probes), grid  # type: ignore[arg-type]


def settle(roster: Roster) -> dict[int, int]:
    roster.update()
    return roster.update()


def test_a_silent_node_is_asked_once_and_its_late_answer_counts():
    """Asking again and again while the engine is still starting is how a run once found 0 of 100 clients."""
    asked = []

    def slow(message: Message) -> None:
        asked.append(message)

    roster, grid = roster_of({7: slow})
    for _ in range(20):
        assert roster.update() == {}
    assert len(asked) == 1
    grid.replies["m0"] = Message(content=partition_record(2), reply_to=asked[0])
    assert roster.update() == {2: 7}


def test_waiting_goes_on_while_clients_keep_connecting(monkeypatch):
    """Each client comes 0.8 s after the one before, later in all than the join timeout allows for one."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    grid = FakeGrid({})

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if int(now[0] / 0.8) > len(grid.nodes):
            grid.nodes[50 + len(grid.nodes)] = node(len(grid.nodes), works)

    monkeypatch.setattr("time.sleep", sleep)
    assert GridTransport(grid, 5, join_timeout_s=1.0).clients() == [0, 1, 2, 3, 4]  # type: ignore[arg-type]
    grid.nodes = dict(list(grid.nodes.items())[:5])
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    with pytest.raises(NoClientsError, match="only 5 of 9 clients"):
        GridTransport(grid, 9, join_timeout_s=1.0)  # type: ignore[arg-type]


def test_a_run_whose_clients_are_all_gone_waits_for_the_first_that_comes_instead_of_spending_its_rounds(monkeypatch):
    grid = FakeGrid({5: node(0, works)})
    transport = GridTransport(grid, 1, join_timeout_s=60.0)  # type: ignore[arg-type]
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 20:
            grid.nodes[6] = node(0, works)

    monkeypatch.setattr("time.sleep", sleep)
    grid.nodes.clear()
    assert transport.clients() == [0]
    assert 20 < now[0] < 21
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    grid.nodes.clear()
    assert transport.clients() == []
    assert 80 < now[0] < 82


def test_a_run_may_begin_with_fewer_and_the_others_join_later():
    grid = FakeGrid({5: node(1, works)})
    transport = GridTransport(grid, 3, join_timeout_s=1.0, min_clients=1)  # type: ignore[arg-type]
    assert transport.clients() == [1]
    grid.nodes[6] = node(0, works)
    transport.clients()
    assert transport.clients() == [0, 1]


def test_the_first_to_claim_a_partition_keeps_it_until_it_is_gone():
    roster, grid = roster_of({5: node(0, works)})
    assert settle(roster) == {0: 5}
    grid.nodes[4] = node(0, works)  # an impostor, or the same device under another identity
    assert settle(roster) == {0: 5}
    del grid.nodes[5]
    assert settle(roster) == {0: 4}


def test_a_node_that_returns_with_its_identity_is_asked_again_and_taken_back():
    roster, grid = roster_of({5: node(0, works)})
    assert settle(roster) == {0: 5}
    del grid.nodes[5]
    assert settle(roster) == {}
    grid.nodes[5] = node(2, works)  # its owner gave it another partition meanwhile
    assert settle(roster) == {2: 5}


@pytest.mark.parametrize("claimed", [-1, 3, 10**12, True, "0", 1.0])
def test_a_node_that_claims_a_partition_that_does_not_exist_is_left_alone(claimed):
    def stranger(message: Message) -> Message:
        return Message(content=RecordDict({HEAD: ConfigRecord({"partition-id": claimed})}), reply_to=message)

    roster, _ = roster_of({5: stranger, 6: node(1, works)})
    assert settle(roster) == {1: 6}
    assert "1 not of this run" in roster.describe()


def test_a_client_that_has_connected_makes_its_round_trips_and_the_time_of_its_process_is_no_part_of_them(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    class SlowGrid(FakeGrid):
        def pull_messages(self, ids):
            now[0] += 5.0
            return super().pull_messages(ids)

    def answers(message: Message) -> Message:
        return Message(content=partition_record(1, busy_s=3.0), reply_to=message)

    transport = GridTransport(SlowGrid({5: answers}), 2, min_clients=1, num_probes=2)  # type: ignore[arg-type]
    assert transport.empty_trips() == [(1, 2.0), (1, 2.0)]
    assert transport.empty_trips() == []
