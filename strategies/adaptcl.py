"""AdaptCL (Zhou et al. 2021, arXiv 2106.14126): learn each client's pruning rate until all are as fast as the fastest.

The server knows nothing about devices but their update times. Every ``pruning-interval`` rounds it cuts the clients
that are slower than the fastest unpruned one (``pruning.rates``), along one frozen order of all units, so that
sub-models are nested. The paper aggregates by worker: theta_k = sum_w n_w m_wk theta_wk / sum_w n_w, an entry that a
client does not hold counts as zero; the default here is ``by-coverage``, the mean over holders where most of the weight
holds an entry. What is the paper's and what is ours: docs/fidelity.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pruning.importance import METHODS, score_units
from pruning.merge import AggregateResult, MaskedMean, coverage_mean, everybody_mean, holders_mean, residual_mean
from pruning.rates import ClientRate, RateDecision, RateParams, RateState, record_time, update_rates
from pruning.select import NestedFamily, nested_family
from pruning.spec import SubModelSpec
from strategies.base import SubModelStrategy
from strategies.exchange import Arrival
from strategies.setting import Order
from wire.flat import refuse, require, require_choice
from wire.message import Report
from wire.spec import spec_to_json


@dataclass(frozen=True)
class AdaptCLConfig:
    """Settings of AdaptCL.

    Attributes
    ----------
    pruning_interval : rounds between two decisions.
    rates : the rate learner's knobs.
    importance : ``bn-scale``, ``l1`` or ``l2``.
    order : ``constant`` (ranked once, at the first decision) or ``refreshed`` (at every decision; ablation).
    identical : one order for all clients; if not, each client's is shuffled by its own seed (ablation: not nested).
    scope : ``bounded``, ``global`` or ``per-layer`` (see ``pruning.select.nested_family``).
    layer_bound : of the bounded scope.
    round_to : wide layers keep a multiple of this.
    aggregation : ``by-worker``, ``by-unit``, ``by-worker-residual`` or ``by-coverage``.
    coverage_threshold : of ``by-coverage``.
    local_objective : ``plain`` cross-entropy, or ``nested``: also train, inside each sub-model, the smallest in use.
    """

    pruning_interval: int = 2
    rates: RateParams = RateParams()
    importance: str = "bn-scale"
    order: str = "constant"
    identical: bool = True
    scope: str = "bounded"
    layer_bound: float = 0.5
    round_to: int = 8
    aggregation: str = "by-coverage"
    coverage_threshold: float = 0.6
    local_objective: str = "nested"

    def __post_init__(self) -> None:
        """Check every range."""
        require(self.pruning_interval >= 1, "pruning-interval", self.pruning_interval, ">= 1")
        require(0 < self.layer_bound <= 1, "layer-bound", self.layer_bound, "in (0, 1]")
        require(0 < self.coverage_threshold <= 1, "coverage-threshold", self.coverage_threshold, "in (0, 1]")
        require(self.round_to >= 1, "round-to", self.round_to, ">= 1")
        require_choice("importance", self.importance, tuple(m for m in METHODS if m != "taylor"))
        require_choice("order", self.order, ("constant", "refreshed"))
        require_choice("scope", self.scope, ("bounded", "global", "per-layer"))
        require_choice("local-objective", self.local_objective, ("plain", "nested"))
        require_choice("aggregation", self.aggregation, ("by-worker", "by-unit", "by-worker-residual", "by-coverage"))


class AdaptCL(SubModelStrategy):
    """Learned rates, nested sub-models."""

    name = "adaptcl"
    Config = AdaptCLConfig
    config: AdaptCLConfig

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._rates: RateState = {}
        self._scores: Mapping[str, np.ndarray] | None = None
        self._families: dict[int, NestedFamily] = {}
        self._decided_in = 0

    def check(self) -> None:
        """There must be something to learn a rate of."""
        refuse(
            not self.layout.prunable,
            f"strategy=adaptcl with model.name={self.setting.job.model.name}",
            "no unit of the model can be left out, so that there is no rate to learn; use another model, or "
            "strategy=fedavg",
        )

    def begin(self) -> None:
        """Starting at the floor needs an order at once; before training, any units are as good as others."""
        if self.config.rates.direction != "prune":
            self._scores = {g.name: np.linspace(2, 1, g.size) for g in self.layout.prunable}

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Decide the rates when it is time; then everybody trains the member of the family that its rate names."""
        is_due = server_round > 1 and (server_round - 1) % self.config.pruning_interval == 0
        if is_due and server_round != self._decided_in:  # a round may ask several times
            self._decide(server_round)
            self._decided_in = server_round
        orders = {
            pid: Order(self._spec_of(pid), work_ratio=self._rates[pid].work_ratio if pid in self._rates else 1.0)
            for pid in clients
        }
        if self.config.local_objective == "plain" or self._scores is None or not self.config.identical:
            return orders
        # Who is asked for the first time may hold less than anybody heard of; the core lies inside every sub-model.
        core = self._family_of(0).member(min(map(self._ratio_of, {*self._rates, *clients}), default=1.0))
        settings = {"core": spec_to_json(core)}
        return {pid: replace(order, objective="nested", settings=settings) for pid, order in orders.items()}

    def vet(self, arrival: Arrival, report: Report) -> None:
        """An update that took no time says nothing about a device."""
        self._with_time(arrival)

    def observe(self, arrival: Arrival, report: Report) -> None:
        """Note the update time; the only thing AdaptCL ever learns about a device."""
        self._rates = self._with_time(arrival)

    def observe_late(self, arrival: Arrival, report: Report) -> None:
        """Who misses every deadline is the one to prune: its time counts, though its weights do not."""
        self.observe(arrival, report)

    def _with_time(self, arrival: Arrival) -> RateState:
        """What is known with this answer's time; one of another sub-model than its client has now says nothing.

        Where rounds do not wait for everybody, who was asked before a decision answers after it.
        """
        pid, time_s = arrival.entry.partition_id, arrival.duration.update_time_s
        rates = record_time(self._rates, pid, time_s, self._first_ratio(pid), arrival.entry.work_ratio)
        return rates if arrival.entry.spec == self._spec_of(pid) else self._rates

    def merge(self, mean: MaskedMean) -> AggregateResult:
        """Under the configured aggregation."""
        rule = {
            "by-unit": holders_mean,
            "by-worker": everybody_mean,
            "by-worker-residual": residual_mean,
            "by-coverage": coverage_mean(self.config.coverage_threshold),
        }[self.config.aggregation]
        return mean.finalize(self.loop.mixing_rate, rule)

    def evaluation_order(self, partition_id: int) -> Order:
        """The sub-model of the client's present rate."""
        return Order(self._spec_of(partition_id))

    def family(self) -> dict[str, SubModelSpec]:
        """One member for each rate in use."""
        ratios = sorted({client.retention_ratio for client in self._rates.values()})
        if self._scores is None or not self.config.identical:
            return {}
        return {f"{ratio:.2f}": self._family_of(0).member(ratio) for ratio in ratios if ratio < 1}

    def _ratio_of(self, partition_id: int) -> float:
        """Retention ratio in force; of a client never heard of, the one that everybody starts at."""
        known = self._rates.get(partition_id)
        return self._first_ratio(partition_id) if known is None else known.retention_ratio

    def _spec_of(self, partition_id: int) -> SubModelSpec:
        ratio = self._ratio_of(partition_id)
        return SubModelSpec() if ratio >= 1 or self._scores is None else self._family_of(partition_id).member(ratio)

    def _decide(self, server_round: int) -> None:
        if self._scores is None or self.config.order == "refreshed":
            self._scores = score_units(self.progress.state, self.layout, self.config.importance)
            self._families = {}
        params = replace(self.config.rates, min_retention_ratio=self._floor(0))
        self._rates, decision = update_rates(self._rates, params, self._achievable)
        for pid in decision.newly_floored:
            self.warn(
                server_round,
                f"client {pid} stays slower than the target ({decision.update_times_s[pid]:.3g} s, target "
                f"{decision.target_s:.3g} s) at the floor of {params.min_retention_ratio:.3g}, the smallest that "
                "min-retention-ratio and round-to allow; part of its update time does not shrink with the model, or "
                "they are too high",
            )
        self._log(server_round, decision)

    def _achievable(self, partition_id: int, ratio: float) -> float:
        return self._family_of(partition_id).achievable(ratio, self.config.rates.min_retention_ratio)

    def _floor(self, partition_id: int) -> float:
        """Ratio of the smallest sub-model that a client may get."""
        return self._achievable(partition_id, self.config.rates.min_retention_ratio)

    def _first_ratio(self, partition_id: int) -> float:
        return 1.0 if self.config.rates.direction == "prune" else self._floor(partition_id)

    def _log(self, server_round: int, decision: RateDecision) -> None:
        order = json.dumps(dict(self._family_of(0).order))
        self.listen(
            {
                "event": "decision",
                "server_round": server_round,
                "reference": decision.reference,
                "reference_s": decision.target_s,
                "rates": {str(pid): client.retention_ratio for pid, client in sorted(self._rates.items())},
                "update_times_s": {str(pid): time_s for pid, time_s in decision.update_times_s.items()},
                "work_ratios": {str(pid): client.work_ratio for pid, client in sorted(self._rates.items())},
                "floors": [pid for pid, client in sorted(self._rates.items()) if client.is_floored],
                "order_hash": hashlib.sha256(order.encode()).hexdigest()[:16],
            }
        )

    def _family_of(self, partition_id: int) -> NestedFamily:
        """The client's family; the same for all when orders are identical."""
        key = 0 if self.config.identical else partition_id
        if key not in self._families:
            assert self._scores is not None
            scores = dict(self._scores)
            if not self.config.identical:
                rng = np.random.default_rng((self.seed, partition_id))
                scores = {name: rng.permutation(score) for name, score in scores.items()}
            c = self.config
            self._families = {
                **self._families,
                key: nested_family(self.layout, self.cost, scores, c.scope, c.layer_bound, c.round_to),
            }
        return self._families[key]

    def export_state(self) -> dict[str, Any]:
        """Rates, histories and the frozen scores."""
        scores = None if self._scores is None else {name: score.tolist() for name, score in self._scores.items()}
        return {"rates": {str(pid): asdict(client) for pid, client in self._rates.items()}, "scores": scores}

    def import_state(self, own: dict[str, Any]) -> None:
        """Go on from ``export_state``."""
        self._rates = {
            int(pid): ClientRate(
                raw["retention_ratio"],
                tuple(raw["times_s"]),
                tuple((float(phi), float(gamma)) for phi, gamma in raw["history"]),
                raw["is_floored"],
                raw["work_ratio"],
            )
            for pid, raw in own["rates"].items()
        }
        scores = own["scores"]
        self._scores = None if scores is None else {name: np.array(score) for name, score in scores.items()}
        self._families = {}
