"""Who is who: nodes have random ids, clients have partition ids. Asked once, never waited for."""

from __future__ import annotations

import logging
import math
import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

logger = logging.getLogger(__name__)

HEAD = "head"
PARTITION, BUSY = "partition-id", "busy-s"
QUERY_TIME_TO_LIVE_S = 600.0
"""A node that was asked and is silent is asked again after this; until then its answer counts whenever it comes."""


def partition_record(partition_id: int, busy_s: float = 0.0) -> RecordDict:
    """Answer to a query: which partition this client holds, and how long its process has been at work."""
    return RecordDict({HEAD: ConfigRecord({PARTITION: partition_id, BUSY: busy_s})})


def push(grid: Grid, node_id: int, message_type: str, content: RecordDict, time_to_live_s: float) -> str:
    """Send one message and return its id; empty if the node is not there."""
    message = Message(content=content, dst_node_id=node_id, message_type=message_type, ttl=time_to_live_s)
    return next((message_id for message_id in grid.push_messages([message]) if message_id), "")


class Roster:
    """Partition id -> node id of the clients that are connected.

    A query that was sent is never given up and repeated while it may still be answered: where all nodes share few
    workers, or the engine takes minutes to start, the repetitions would queue behind each other and their answers would
    come too late for good.

    Parameters
    ----------
    grid : Flower's grid.
    num_clients : partition ids are 0 to num_clients - 1; a node that claims another is left alone.
    num_probes : round trips made with a client that has connected, one after the other.
    """

    def __init__(self, grid: Grid, num_clients: int, num_probes: int = 0) -> None:
        self.grid, self.num_clients, self.num_probes = grid, num_clients, num_probes
        self.nodes: dict[int, int] = {}
        self.trips: list[tuple[int, float]] = []
        self._claims: dict[int, int] = {}  # node id -> partition id it claimed, -1 for none of ours; oldest first
        self._asked: dict[str, tuple[int, float]] = {}  # message id -> node id, when
        self._probes: dict[int, int] = {}  # node id -> round trips made
        self._num_online = 0

    @property
    def is_probing(self) -> bool:
        """Whether a client that is connected has not made its round trips."""
        return any(self._probes.get(node, 0) < self.num_probes for node in self.nodes.values())

    def update(self) -> dict[int, int]:
        """Take the answers that have come, ask the nodes that are new, and return who is there. Never waits."""
        online = set(self.grid.get_node_ids())
        self._num_online = len(online)
        self._take_answers()
        now = time.monotonic()
        is_asked = {node for node, sent in self._asked.values() if now - sent < QUERY_TIME_TO_LIVE_S}
        for node in sorted(online - is_asked):
            partition_id = self._claims.get(node)
            if partition_id is None or (partition_id >= 0 and self._probes.get(node, 0) < self.num_probes):
                sent = push(self.grid, node, "query", RecordDict(), QUERY_TIME_TO_LIVE_S)
                if sent:
                    self._asked[sent] = (node, time.monotonic())
        self._asked = {mid: (node, sent) for mid, (node, sent) in self._asked.items() if node in online}
        self._settle(online)
        return self.nodes

    def describe(self) -> str:
        """What is known of the nodes that are no clients yet."""
        strangers = sum(partition_id < 0 for partition_id in self._claims.values())
        return f"{self._num_online} nodes online, {len(self._asked)} asked and silent, {strangers} not of this run"

    def _take_answers(self) -> None:
        for reply in self.grid.pull_messages(list(self._asked)) if self._asked else ():
            node, sent = self._asked.pop(reply.metadata.reply_to_message_id, (0, math.nan))
            if math.isnan(sent) or reply.has_error():
                continue  # asked again next time
            head = reply.content.get(HEAD)
            claimed = head.get(PARTITION) if isinstance(head, ConfigRecord) else None
            is_ours = isinstance(claimed, int) and not isinstance(claimed, bool) and 0 <= claimed < self.num_clients
            partition_id = claimed if is_ours and isinstance(claimed, int) else -1
            if node in self._claims:  # a probe: nothing but time
                busy_s = head.get(BUSY, 0.0) if isinstance(head, ConfigRecord) else 0.0
                travel_s = time.monotonic() - sent - (busy_s if isinstance(busy_s, float) else 0.0)
                self._probes[node] = self._probes.get(node, 0) + 1
                if partition_id == self._claims[node] and math.isfinite(travel_s):
                    self.trips.append((partition_id, max(0.0, travel_s)))
                continue
            self._claims[node] = partition_id
            if partition_id < 0:
                logger.warning("node %s is no client of this run: it says partition-id=%r", node, claimed)

    def _settle(self, online: set[int]) -> None:
        """The first node that claims a partition keeps it while it is online."""
        self._claims = {node: partition_id for node, partition_id in self._claims.items() if node in online}
        self.nodes = {}
        for node, partition_id in self._claims.items():
            if partition_id >= 0:
                self.nodes.setdefault(partition_id, node)
