"""A world in which every entry of the model has the same value, so that a run is a sequence of numbers.

Client i moves the model that it received a tenth of the way to its target; how long each request takes is given. What a
rule makes of it is then computed a second time, by hand or by a few lines that know nothing of the event loop.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord

from fleet.clock import Duration, DurationModel
from fleet.fleet import make_fleet
from pruning.cost import CostModel, measure_costs
from pruning.groups import Layout
from strategies import STRATEGIES
from strategies.loop import LoopConfig
from strategies.setting import Progress, Setting
from wire.local import LocalTransport
from wire.message import DataConfig, Instruction, Job, ModelConfig, Report, TrainConfig
from zoo import get_model

PULL = 0.1
Times = Callable[[int, int], float]
"""(partition_id, dispatch) -> seconds that the request takes."""


@lru_cache(maxsize=1)
def small_model() -> tuple[dict[str, torch.Tensor], Layout, CostModel]:
    """A few hundred entries, all one; their layout and cost."""
    model, layout = get_model("mlp", 10, 1, 8, width=0.05)
    ones = {key: torch.ones_like(tensor) for key, tensor in model.state_dict().items()}
    return ones, layout, measure_costs(model, layout, torch.zeros(2, 1, 8, 8))


class GivenTimes:
    """Durations out of a function instead of devices; everybody is there, nobody drops out."""

    def __init__(self, times: Times, num_clients: int) -> None:
        self.times, self.fleet = times, make_fleet("linear:5", num_clients)

    def duration(self, partition_id: int, dispatch: int, *amounts: float) -> Duration:
        return Duration(0.0, self.times(partition_id, dispatch), 0.0)

    def drops_out(self, partition_id: int, dispatch: int) -> bool:
        return False

    def is_available(self, partition_id: int, time_s: float) -> bool:
        return True

    def next_available_s(self, partition_id: int, time_s: float) -> float:
        return time_s


@dataclass
class World:
    """Clients with targets, numbers of examples and times."""

    targets: Sequence[float]
    times: Times
    examples: Sequence[int] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)
    states: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def handle(self, instruction: Instruction) -> Report:
        """Move a tenth of the way."""
        pid = instruction.partition_id
        values = {k: t + PULL * (self.targets[pid] - t) for k, t in instruction.state.items()}
        sent = {k: values[k] - t for k, t in instruction.state.items()} if instruction.wants_delta else values
        number = self.examples[pid] if self.examples else 1
        return Report(
            instruction.dispatch, pid, sent, number, (number,) * 10, is_delta=instruction.wants_delta, num_steps=1
        )

    def run(
        self,
        num_rounds: int,
        strategy: str = "fedavg",
        loop: LoopConfig | None = None,
        folder: Path | None = None,
        **settings: Any,
    ) -> list[dict[str, torch.Tensor]]:
        """Return the global model after every merge; the rows of the event log are in ``rows``."""
        state, layout, cost = small_model()
        num_clients = len(self.targets)
        job = Job(ModelConfig("mlp"), DataConfig(), TrainConfig(), num_clients, num_rounds, 0)
        setting = Setting(
            job=job,
            layout=layout,
            cost=cost,
            loop=loop or LoopConfig(),
            durations=cast(DurationModel, GivenTimes(self.times, num_clients)),
            versions_dir=str(folder or ""),
        )
        kind = STRATEGIES[strategy]
        self.rows, self.states = [], []

        def keep(progress: Progress, own: dict[str, Any]) -> None:
            self.states.append({key: tensor.clone() for key, tensor in progress.state.items()})

        method = kind(kind.Config(**settings), setting, self.rows.append, keep)
        method.start(LocalTransport(self.handle, num_clients), ArrayRecord(dict(state)), num_rounds)
        return self.states

    def values(self, *arguments: Any, **keywords: Any) -> list[float]:
        """The one value of the model after every merge of ``run``."""
        states = self.run(*arguments, **keywords)
        for state in states:
            assert len({float(t) for tensor in state.values() for t in (tensor.min(), tensor.max())}) <= 2
        return [float(next(iter(state.values())).flatten()[0]) for state in states]

    def arrivals(self) -> list[tuple[int, float, int]]:
        """(partition_id, finish_s, staleness) of every answer, in order."""
        rows = [row for row in self.rows if row["event"] == "arrival"]
        return [(row["partition_id"], row["finish_s"], row["staleness"]) for row in rows]

    def pull(self, pid: int, start: float) -> float:
        """What client ``pid`` makes of ``start``."""
        return start + PULL * (self.targets[pid] - start)


@dataclass(order=True)
class Job0:
    """A request under way in the second computation."""

    finish_s: float
    dispatch: int
    pid: int = field(compare=False)
    version: int = field(compare=False)
    start: float = field(compare=False)


class Under:
    """Requests under way, in the order in which they are answered."""

    def __init__(self, world: World) -> None:
        self.world, self.queue, self.dispatch = world, list[Job0](), 0

    def ask(self, pid: int, now_s: float, version: int, theta: float) -> None:
        """Ask one client."""
        finish_s = now_s + self.world.times(pid, self.dispatch)
        heapq.heappush(self.queue, Job0(finish_s, self.dispatch, pid, version, theta))
        self.dispatch += 1

    def next(self) -> Job0:
        """The next answer."""
        return heapq.heappop(self.queue)
