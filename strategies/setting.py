"""What a strategy is told, and what it answers: the loop's settings, the run, orders to clients, progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fleet.clock import DurationModel
from pruning.cost import CostModel
from pruning.groups import Layout
from pruning.spec import FULL, SubModelSpec
from strategies.exchange import Arrival
from strategies.robust import RobustConfig
from wire.check import LIMITS, Limits
from wire.flat import ConfigError, Scalar, require
from wire.message import Job, State


@dataclass(frozen=True)
class LoopConfig:
    """Who is asked, when a round closes, and what late answers count. Three independent choices.

    Attributes
    ----------
    clients_per_round : free clients asked at the start of a round; 0 for all.
    quorum : close the round at this many merged answers; 0 waits for everybody.
    deadline_s : or after this long with at least one; 0 for none.
    max_staleness : answers older than this many global versions are dropped.
    staleness : weight of an answer s versions old: ``constant``, ``polynomial:A`` ((1 + s)^-A) or ``hinge:A:B``
        (1 while s <= B, then 1 / (A (s - B) + 1)) (Xie et al. 2019, section 5.2).
    mixing_rate : share of the merge that the global model takes over, in (0, 1].
    max_empty_rounds : stop after this many rounds in a row without a usable answer.
    """

    clients_per_round: int = 0
    quorum: int = 0
    deadline_s: float = 0.0
    max_staleness: int = 0
    staleness: str = "constant"
    mixing_rate: float = 1.0
    max_empty_rounds: int = 3

    def __post_init__(self) -> None:
        """Check every range."""
        require(self.clients_per_round >= 0, "clients-per-round", self.clients_per_round, ">= 0")
        require(self.quorum >= 0, "quorum", self.quorum, ">= 0")
        require(self.deadline_s >= 0, "deadline-s", self.deadline_s, ">= 0")
        require(self.max_staleness >= 0, "max-staleness", self.max_staleness, ">= 0")
        require(0 < self.mixing_rate <= 1, "mixing-rate", self.mixing_rate, "in (0, 1]")
        require(self.max_empty_rounds >= 1, "max-empty-rounds", self.max_empty_rounds, ">= 1")
        staleness_weight(self.staleness, 0)

    @property
    def is_barrier(self) -> bool:
        """Whether every round waits for everybody it asked."""
        return self.quorum == 0 and self.deadline_s == 0


@dataclass(frozen=True)
class DeploymentConfig:
    """How the server meets real devices; without meaning where time is simulated.

    Attributes
    ----------
    min_clients : connected before the first round begins; the others join when they come. 0 for all.
    join_timeout_s : give up when no further client has connected for so long.
    num_probes : round trips without content made with each client that connects, to tell the engine's overhead from
        the link's speed.
    """

    min_clients: int = 0
    join_timeout_s: float = 120.0
    num_probes: int = 2

    def __post_init__(self) -> None:
        """Check every range."""
        require(self.min_clients >= 0, "min-clients", self.min_clients, ">= 0")
        require(self.join_timeout_s > 0, "join-timeout-s", self.join_timeout_s, "> 0")
        require(self.num_probes >= 0, "num-probes", self.num_probes, ">= 0")


def staleness_weight(rule: str, staleness: int) -> float:
    """Weight of an answer ``staleness`` versions old under a rule of ``LoopConfig.staleness``."""
    kind, *numbers = rule.split(":")
    try:
        values = [float(number) for number in numbers]
        if kind == "constant" and not values:
            return 1.0
        if kind == "polynomial" and len(values) == 1 and values[0] >= 0:
            return float((1 + staleness) ** -values[0])
        if kind == "hinge" and len(values) == 2 and values[0] > 0:
            return 1.0 if staleness <= values[1] else 1 / (values[0] * (staleness - values[1]) + 1)
    except ValueError:
        pass
    raise ConfigError(f"staleness: got {rule!r}, expected 'constant', 'polynomial:A' or 'hinge:A:B'")


@dataclass(frozen=True)
class Order:
    """What a method asks of one client.

    Attributes
    ----------
    spec : the sub-model it gets.
    objective, settings : what it minimises.
    companions : makes the tensors that go with the weights, when the request is sent.
    travels : which entries of the sub-model go to the client; None for all.
    """

    spec: SubModelSpec = FULL
    objective: str = "cross-entropy"
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    companions: Callable[[], State] = dict
    travels: Callable[[str], bool] | None = None

    def pick(self, state: State) -> State:
        """What of an extracted sub-model is sent."""
        return state if self.travels is None else {k: t for k, t in state.items() if self.travels(k)}


Listener = Callable[[dict[str, Any]], None]
Evaluator = Callable[[State, Mapping[str, SubModelSpec], SubModelSpec], dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """Everything a strategy needs to know about the run it serves.

    Attributes
    ----------
    job : what clients are told about model, data and training.
    layout, cost : of the global model.
    network : the global model without storage; image_shape: what it reads, [channels, height, width].
    loop : who, when and with what weight.
    durations : of the simulated fleet; None in deployment.
    evaluate : central evaluation of (state, family of named specs, what stands for the global model), every
        ``evaluate_every`` rounds; None for none.
        The family is shown every ``family_every`` rounds.
    evaluate_clients : whether clients evaluate on their own test parts in the same rounds.
    own_classes : whether a client's test counts only the classes that it has as possible answers.
    reply_timeout_s : a client that takes longer, on the wall, has failed.
    deployment : how real devices are met.
    limits : of answers.
    robust : how answers of clients that may be malicious are merged.
    """

    job: Job
    layout: Layout
    cost: CostModel
    loop: LoopConfig = LoopConfig()
    durations: DurationModel | None = None
    evaluate: Evaluator | None = None
    evaluate_clients: bool = False
    own_classes: bool = False
    evaluate_every: int = 1
    family_every: int = 1
    reply_timeout_s: float = 600.0
    network: nn.Module | None = None
    image_shape: tuple[int, ...] = ()
    deployment: DeploymentConfig = DeploymentConfig()
    limits: Limits = LIMITS
    robust: RobustConfig = RobustConfig()


@dataclass
class Progress:
    """Where the loop stands; what a checkpoint holds beside the method's own state."""

    state: dict[str, torch.Tensor]
    server_round: int = 0
    global_version: int = 0
    now_s: float = 0.0
    next_dispatch: int = 0
    last_dispatch: dict[int, int] = field(default_factory=dict)
    held: list[Arrival] = field(default_factory=list)
