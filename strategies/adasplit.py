"""AdaSplit (Chopra et al. 2021, arXiv 2112.01637): split learning in which no gradient comes down.

Client i learns f_i from a local supervised NT-Xent loss; for the first floor(kappa R) rounds nothing crosses the
network. Then a bandit picks k = max(1, round(eta N)) clients at a time, whose activations a = f_i(x) train the server:
mean CE(g(a; U * m(V_i)), y) + lambda * sum sigmoid(V_i), with U shared and V_i the client's own. What is the paper's
and what is ours: docs/fidelity.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pruning.merge import AggregateResult, MaskedMean
from strategies.base import SubModelStrategy
from strategies.exchange import Entry
from strategies.idle import idle_settings
from strategies.setting import Order
from strategies.split.conversation import Conversation
from strategies.split.halves import (
    Halves,
    add_half,
    average,
    check_split,
    common_settings,
    count_of,
    halves_of,
    largest_batch,
    merged,
)
from strategies.split.masks import MaskConfig
from strategies.split.orchestrator import SELECTIONS
from strategies.split.replay import Replay, as_work
from strategies.split.schedule import num_local_rounds
from strategies.split.server import SplitServer
from strategies.split.server_tests import ServerTests
from wire.activations import PRECISIONS, ActivationError
from wire.flat import ConfigError, Scalar, refuse, require
from wire.message import Report
from wire.training import learning_rate

SENDS = {"none": "never", "average": "end", "handoff": "always"}
"""``client-sync`` -> when clients send their weights."""


@dataclass(frozen=True)
class AdaSplitConfig:
    """Settings of AdaSplit.

    Attributes
    ----------
    cut : last layer on the client; for zoo models also the number of blocks there.
    kappa : share of the rounds that are local, in [0, 1); less than one round is none, with a warning unless it is 0.
    eta : share of the clients that may upload per decision, in (0, 1].
    selection : ``ucb``, ``random``, ``round-robin`` or ``all``.
    gamma : the bandit's discount, in (0, 1].
    exchange : ``segment`` (decisions and uploads a few times a round), ``exact`` (every step) or ``frozen`` (clients
        finish their round, then pass their data through once).
    segments : decisions a round, of ``segment``.
    precision : of activations on the wire, ``fp32`` or ``fp16``.
    max_upload_bytes : of the activations of one upload, counted dense in fp32; a longer one is split, in training and
        in tests.
    pipeline : the server trains on one stretch while the clients make the next (not in ``exact``).
    client_sync : ``none``, ``average`` (client halves, every round) or ``handoff`` (each step begins with the weights
        of the client before; only with ``exact``).
    temperature, beta : of the client's loss: tau, and the factor of sum |a|.
    mask : of the server's weights.
    evaluate : ``server`` (clients upload the activations of their tests) or ``client`` (gets its masked server half).
    train_client, server_gradient : ablations: leave the client's half as it is; let the server's gradient come down
        (only with ``exact``).
    """

    cut: str = "1"
    kappa: float = 0.6
    eta: float = 0.6
    selection: str = "ucb"
    gamma: float = 0.87
    exchange: str = "segment"
    segments: int = 4
    precision: str = "fp32"
    max_upload_bytes: int = 64 * 2**20
    pipeline: bool = True
    client_sync: str = "none"
    temperature: float = 0.07
    beta: float = 0.0
    mask: MaskConfig = MaskConfig()
    evaluate: str = "server"
    train_client: bool = True
    server_gradient: bool = False

    def __post_init__(self) -> None:
        """Check every range."""
        require(0 <= self.kappa < 1, "kappa", self.kappa, "in [0, 1): at 1 the server learns nothing")
        require(0 < self.eta <= 1, "eta", self.eta, "in (0, 1]")
        require(0 < self.gamma <= 1, "gamma", self.gamma, "in (0, 1]")
        require(self.segments >= 1, "segments", self.segments, ">= 1")
        require(self.max_upload_bytes >= 1, "max-upload-bytes", self.max_upload_bytes, ">= 1")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.beta >= 0, "beta", self.beta, ">= 0")
        for key, value, choices in (
            ("selection", self.selection, tuple(SELECTIONS)),
            ("exchange", self.exchange, ("segment", "exact", "frozen")),
            ("precision", self.precision, tuple(PRECISIONS)),
            ("client-sync", self.client_sync, ("none", "average", "handoff")),
            ("evaluate", self.evaluate, ("server", "client")),
        ):
            require(value in choices, key, value, " or ".join(map(repr, choices)))
        for key, is_on in (("client-sync", self.client_sync == "handoff"), ("server-gradient", self.server_gradient)):
            require(not is_on or self.exchange == "exact", "exchange", self.exchange, f"'exact' with this {key}")
        is_both = self.client_sync == "handoff" and self.server_gradient
        require(not is_both, "server-gradient", True, "false with client-sync = 'handoff'")


class AdaSplit(SubModelStrategy):
    """Local losses on clients, masked shared weights on the server, a bandit between them."""

    name = "adasplit"
    Config = AdaSplitConfig
    config: AdaSplitConfig
    has_global_model = False
    needs_barrier = True

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        c, train = self.config, self.setting.job.train
        self.halves: Halves = halves_of(self.setting, c.cut)
        # A last batch of one joins the batch before it.
        max_steps = c.max_upload_bytes // (largest_batch(train.batch_size) * self.halves.sample_bytes)
        if max_steps < 1:
            raise ConfigError(
                f"config: adasplit.max-upload-bytes: got {c.max_upload_bytes}, but one batch takes up to "
                f"{largest_batch(train.batch_size) * self.halves.sample_bytes}; raise it, or lower train.batch-size"
            )
        self.num_local = num_local_rounds(c.kappa, self.setting.job.num_rounds)
        self.talk = Conversation(c.exchange, c.segments, max_steps, c.selection, c.eta, c.gamma, self.seed)
        self.tests = ServerTests(self.halves, c.max_upload_bytes, self.setting.own_classes)
        self.is_synced = False

    def check(self) -> None:
        """Refuse what split learning cannot do."""
        check_split(self.setting, self.name)
        refuse(
            self.setting.own_statistics,
            "strategy=adasplit with evaluation.own-statistics=true",
            "both halves have the statistics of the client's own images already; leave it out",
        )

    def begin(self) -> None:
        """The server's half begins as the model was made; the clients draw theirs from the same seed."""
        c = self.config
        self.server = SplitServer(self.halves.cut, self.progress.state, c.mask, self.setting.job.train)
        self.replay = Replay(self.server, self.seed, c.server_gradient)
        if not self.progress.server_round:
            self._warn_of_idle()

    def _warn_of_idle(self) -> None:
        """Say so where settings were changed that do nothing beside others."""
        c = self.config
        of_soft, of_hard = ("mask.penalty", "mask.learning-rate"), ("mask.hard-penalty", "mask.hard-learning-rate")
        rules = (
            (c.exchange != "segment", f"adasplit.exchange={c.exchange}", ("segments",)),
            (c.exchange == "exact", "adasplit.exchange=exact", ("pipeline",)),
            (c.selection != "ucb", f"adasplit.selection={c.selection}", ("gamma",)),
            (c.selection == "all", "adasplit.selection=all", ("eta",)),
            (not c.train_client, "adasplit.train-client=false", ("temperature", "beta")),
            (c.mask.kind == "none", "adasplit.mask.kind=none", ("mask.start", "mask.threshold", *of_soft, *of_hard)),
            (c.mask.kind == "soft", "adasplit.mask.kind=soft", ("mask.threshold", *of_hard)),
            (c.mask.kind == "hard", "adasplit.mask.kind=hard", of_soft),
        )
        for sentence in idle_settings(c, rules, self.name):
            self.warn(0, sentence)

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Nobody until the last local round, whose one request covers all of them; then the first stretch."""
        if server_round == 1 and self.num_local == 0 < self.config.kappa:
            num_rounds = self.setting.job.num_rounds
            least = (
                f"set it to {math.ceil(1000 / num_rounds) / 1000:g} or more" if num_rounds > 1 else "raise num-rounds"
            )
            self.warn(
                1,
                f"adasplit.kappa = {self.config.kappa:g} of {num_rounds} rounds is less than one: there is no local "
                f"phase; {least} for one, or set it to 0 if none is wanted",
            )
        if server_round < self.num_local:
            return {}
        self.replay.start()
        self.mean: MaskedMean | None = None
        self.talk.open(clients, is_sequential=self.config.client_sync == "handoff")
        if server_round == self.num_local:
            return {pid: self._order(pid, server_round) for pid in self.talk.close()}
        return self._next(server_round)

    def follow_up(self, server_round: int) -> dict[int, Order]:
        """The next stretch of the round, once the answers to this one are in."""
        if server_round <= self.num_local:
            return {}
        if self.talk.settle():
            self._serve(server_round)
        return self._next(server_round)

    def _next(self, server_round: int) -> dict[int, Order]:
        owed = self.replay.gradients
        self.replay.gradients = {}
        asked = self.talk.next(owed)
        return {pid: self._order(pid, server_round, owed.get(pid)) for pid in asked}

    def _serve(self, server_round: int) -> None:
        """Train the server on a finished stretch: at once, or beside the clients' next one."""
        is_beside = self.config.pipeline and self.config.exchange != "exact"
        losses = self.replay.collect() if is_beside else {}
        self.replay.put(self.talk.take_inbox(), self._rate(server_round), server_round)
        if not is_beside:
            losses = self.replay.collect()
        elif not self.talk.is_over():
            self.replay.start()  # otherwise the next round's plan does, beside the next round
        self.talk.learn(losses)
        self._note_server()

    def _order(self, pid: int, server_round: int, owed: tuple[int, torch.Tensor] | None = None) -> Order:
        c, is_local = self.config, server_round <= self.num_local
        settings = self._settings(pid, server_round) | {
            **self.talk.wish(pid),
            "round": server_round,
            "temperature": c.temperature,
            "beta": c.beta,
            "train-client": c.train_client,
            "wait": c.server_gradient and self.talk.may_upload(pid),
            "owed": owed[0] if owed else -1,
            "send-weights": "never" if is_local or self.talk.is_asking_sizes else SENDS[c.client_sync],
        }
        takes = self.is_synced and (c.client_sync == "handoff" or self.talk.is_first(pid))
        takes = takes and not is_local and not self.talk.is_asking_sizes
        return Order(
            objective="contrastive",
            settings=settings | {"take-weights": takes},
            companions=lambda: {"gradient": owed[1]} if owed else {},
            travels=(lambda key: key in self.halves.client_keys) if takes else (lambda key: False),
        )

    def _settings(self, pid: int, server_round: int) -> dict[str, Scalar]:
        common = common_settings(self.setting, self.halves, pid, self._rate(server_round))
        return common | {"local-rounds": min(server_round, self.num_local), "precision": self.config.precision}

    def _rate(self, server_round: int) -> float:
        """Constant in the local phase, on schedule in the global one."""
        train, num_rounds = self.setting.job.train, self.setting.job.num_rounds
        if server_round <= self.num_local:
            return train.learning_rate
        return learning_rate(train, server_round - self.num_local, num_rounds - self.num_local)

    def add(self, mean: MaskedMean, entry: Entry, report: Report, staleness: int) -> None:
        """Check an upload and put it in line for the server's training."""
        pid, work = entry.partition_id, []
        num_steps = count_of(report, "round_steps", self.setting.job.train.local_epochs)
        if self.talk.may_upload(pid):
            most = self.talk.num_granted_steps, largest_batch(self.setting.job.train.batch_size)
            work = as_work(pid, self.halves.unpack(report.companions, *most))
            self.talk.check(pid, work, num_steps)
        elif report.companions:
            raise ActivationError(f"upload: client {pid} sent {sorted(report.companions)} without a grant")
        if report.state:
            self._take_half(report)
        self.talk.answered(pid, work, num_steps)

    def _take_half(self, report: Report) -> None:
        self.halves.check_weights(report.state, self.progress.state)
        if self.config.client_sync == "handoff":
            self.progress.state = {**self.progress.state, **report.state}
            self.is_synced = True
        elif self.config.client_sync == "average":
            self.mean = self.mean or average(self.halves, self.progress.state)
            add_half(self.mean, report.state, self.weigh(report, 0))
        else:
            raise ConfigError("report: sent weights that nobody asked for")

    def merge(self, mean: MaskedMean) -> AggregateResult:
        """Close the round; what was uploaded last is replayed beside the next one, if there is one."""
        if self.progress.server_round + 1 == self.setting.job.num_rounds:
            self.drain()
        if self.mean is not None:
            self.progress.state = {**self.progress.state, **self.mean.finalize().state}
            self.is_synced = True
        return merged(self.progress.state, self.talk.num_answered)

    def drain(self) -> None:
        """Have the server finish everything it was given."""
        self.replay.finish()
        self._note_server()

    def _note_server(self) -> None:
        if not self.replay.is_running:
            self.progress.state = {**self.progress.state, **self.server.state()}

    def evaluation_order(self, partition_id: int) -> Order:
        """The client's own half, under its own mask of the server's."""
        self.drain()
        is_here = self.config.evaluate == "client"
        takes = self.is_synced and self.config.client_sync == "average"
        piece = {} if is_here else self.tests.wish(partition_id, self.progress.server_round)
        return Order(
            objective="contrastive",
            settings=self._settings(partition_id, self.progress.server_round) | piece | {"take-weights": takes},
            companions=(lambda: self.server.state_for(partition_id)) if is_here else dict,
            travels=(lambda key: key in self.halves.client_keys) if takes else (lambda key: False),
        )

    def judge(self, report: Report) -> Report | None:
        """Pass uploaded test activations through the client's masked server half."""
        return report if self.config.evaluate == "client" else self.tests.judge(report, self.server)

    def close(self) -> None:
        """End the server's training beside the clients, in the middle if the run failed."""
        self.replay.close()

    def export_state(self) -> dict[str, Any]:
        """Masks, optimisers, the bandit, and uploads that wait."""
        return {
            "server": self.server.export_state(),
            "replay": self.replay.export_state(),
            "talk": self.talk.export_state(),
            "is_synced": self.is_synced,
            "num_local": self.num_local,
        }

    def import_state(self, own: dict[str, Any]) -> None:
        """Go on from ``export_state``."""
        if own["num_local"] != self.num_local:
            raise ConfigError(
                f"config: num-rounds: with it the local phase would have {self.num_local} rounds, it had "
                f"{own['num_local']}; change adasplit.kappa in a fresh run instead"
            )
        self.begin()
        self.server.import_state(own["server"])
        self.replay.import_state(own["replay"])
        self.talk.import_state(own["talk"])
        self.is_synced = own["is_synced"]
