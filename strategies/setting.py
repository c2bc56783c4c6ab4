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
from strategies.loop import LoopConfig
from strategies.robust import RobustConfig
from wire.check import LIMITS, Limits
from wire.flat import Scalar, require
from wire.message import Job, State


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
    num_probes: int = 3

    def __post_init__(self) -> None:
        """Check every range."""
        require(self.min_clients >= 0, "min-clients", self.min_clients, ">= 0")
        require(self.join_timeout_s > 0, "join-timeout-s", self.join_timeout_s, "> 0")
        require(self.num_probes >= 0, "num-probes", self.num_probes, ">= 0")


@dataclass(frozen=True)
class Order:
    """What a method asks of one client.

    Attributes
    ----------
    spec : the sub-model it gets.
    objective, settings : what it minimises.
    companions : makes the tensors that go with the weights, when the request is sent.
    travels : which entries of the sub-model go to the client; None for all.
    work_ratio : how much it trains, as a multiple of the run's local epochs.
    """

    spec: SubModelSpec = FULL
    objective: str = "cross-entropy"
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    companions: Callable[[], State] = dict
    travels: Callable[[str], bool] | None = None
    work_ratio: float = 1.0

    def pick(self, state: State) -> State:
        """What of an extracted sub-model is sent."""
        return state if self.travels is None else {k: t for k, t in state.items() if self.travels(k)}


Listener = Callable[[dict[str, Any]], None]
Evaluator = Callable[[State, Mapping[str, SubModelSpec], SubModelSpec, str], dict[str, Any]]


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
    evaluate : central evaluation of (state, family of named specs, what stands for the global model, what models with
        exits predict with), every ``evaluate_every`` rounds; None for none. The family is shown every
        ``family_every`` rounds.
    evaluate_clients : whether clients evaluate on their own test parts in the same rounds.
    own_classes : whether a client's test counts only the classes that it has as possible answers.
    own_statistics : whether BatchNorm's statistics are those of the client's own training images in its test.
    reply_timeout_s : a client that takes longer, on the wall, has failed.
    deployment : how real devices are met.
    limits : of answers.
    robust : how answers of clients that may be malicious are merged.
    versions_dir : where older global models lie that a rule needs; empty for a temporary folder.
    keep_checkpoints : so many of the newest rounds can be gone back to, and keep the older models that they need.
    """

    job: Job
    layout: Layout
    cost: CostModel
    loop: LoopConfig = LoopConfig()
    durations: DurationModel | None = None
    evaluate: Evaluator | None = None
    evaluate_clients: bool = False
    own_classes: bool = False
    own_statistics: bool = False
    evaluate_every: int = 1
    family_every: int = 1
    reply_timeout_s: float = 600.0
    network: nn.Module | None = None
    image_shape: tuple[int, ...] = ()
    deployment: DeploymentConfig = DeploymentConfig()
    limits: Limits = LIMITS
    robust: RobustConfig = RobustConfig()
    versions_dir: str = ""
    keep_checkpoints: int = 2


@dataclass
class Progress:
    """Where the loop stands; what a checkpoint holds beside the method's own state.

    Attributes
    ----------
    state : the global model.
    server_round, global_version, now_s, next_dispatch : how far the run is.
    last_dispatch : each client's last request whose answer was merged.
    held : answers that lie in the virtual future.
    clocks : each client's number of merged answers.
    mean_square : running mean of squared steps per entry, where steps are compensated for their delay.
    num_merged : answers merged so far.
    holders : how many of them held each entry; tensors broadcast against the entries.
    """

    state: dict[str, torch.Tensor]
    server_round: int = 0
    global_version: int = 0
    now_s: float = 0.0
    next_dispatch: int = 0
    last_dispatch: dict[int, int] = field(default_factory=dict)
    held: list[Arrival] = field(default_factory=list)
    clocks: dict[int, int] = field(default_factory=dict)
    mean_square: dict[str, torch.Tensor] = field(default_factory=dict)
    num_merged: int = 0
    holders: dict[str, torch.Tensor] = field(default_factory=dict)
