"""SubModelStrategy: the one event loop of every method.

plan -> send -> arrivals -> check, weigh, add, observe -> merge -> evaluate -> log -> checkpoint. A method says *which
units, for whom, when, and with what weight* in a few hooks; it never sees a message, a grid or a record.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from pruning.extract import extract
from pruning.merge import MaskedMean, is_finite
from pruning.spec import SubModelSpec
from pruning.tally import add_holders
from strategies.answers import (
    FAULTS,
    arrival_row,
    check_narrowed,
    check_report,
    combined_row,
    describe,
    merge_row,
    rebase,
)
from strategies.asking import choose
from strategies.client_tests import ask_tests, evaluation_request
from strategies.closing import EmptyRounds, RunStoppedError, arrivals
from strategies.delay import compensate_report, first_mean_square
from strategies.exchange import Arrival, Entry, Exchange, Transport
from strategies.extracts import Extracts
from strategies.hooks import Hooks
from strategies.kept import KeptDispatches
from strategies.loop import has_own_loop, in_force
from strategies.over_grid import over_grid
from strategies.setting import Listener, Order, Progress, Setting
from strategies.shelf import Shelf
from strategies.versions import VersionStore
from wire.flat import refuse
from wire.message import Failure, Instruction

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]
logger = logging.getLogger(__name__)

__all__ = ["RunStoppedError", "SubModelStrategy"]


class SubModelStrategy(Hooks, Strategy):
    """Trains one global model on clients that hold parts of it.

    Subclasses set ``name`` and ``Config`` and override hooks (``strategies.hooks``); the defaults are FedAvg.

    Parameters
    ----------
    config : the method's own settings, an instance of ``Config``.
    setting : the run.
    listen : receives every row of the event log.
    keep : called after every merge with the progress and the method's state; writes the checkpoint.
    """

    def __init__(
        self,
        config: Any,
        setting: Setting,
        listen: Listener = lambda row: None,
        keep: Callable[[Progress, dict[str, Any]], None] = lambda progress, own: None,
    ) -> None:
        self.config, self.setting, self.listen, self.keep = config, setting, listen, keep
        self.layout, self.cost, self.loop = setting.layout, setting.cost, setting.loop
        if has_own_loop(type(self)):
            self.loop = in_force(setting.loop, self.name, config, setting.job.num_clients)
        self.seed = setting.job.seed
        self.progress = Progress({})
        self._round_began_s, self._num_merged = 0.0, 0
        self._kept = KeptDispatches(setting.keep_checkpoints)
        self._extracts = Extracts(setting.layout)
        self._versions: VersionStore | None = None

    # --- the loop ----------------------------------------------------------------------------------------------------

    def start(
        self,
        grid: Grid | Transport,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Evaluate | None = None,
    ) -> Result:
        """Run until round ``num_rounds`` and return Flower's result. ``grid`` may be any transport.

        ``timeout``, ``train_config`` and ``evaluate_config`` belong to Flower's round loop and are not read:
        ``Setting.reply_timeout_s`` and ``Setting.job`` say here how long to wait and how to train.

        Raises
        ------
        ConfigError
            If what is configured makes no sense together.
        RunStoppedError
            If several rounds in a row brought no usable answer, or none of the run did.
        """
        self.check()
        early, waits = "loop.quorum, loop.deadline-s", "its rounds wait for everybody; set 0"
        refuse(self.needs_barrier and not self.loop.is_barrier, early, f"not with strategy {self.name!r}: {waits}")
        num_asked = sum(map(self.takes_part, range(self.setting.job.num_clients)))
        refuse(num_asked == 0, f"strategy={self.name}", "no client may take part")
        is_compressed = self.setting.job.compression.kind != "none"
        self.loop.check(num_asked, self.name if self.sends_deltas else "compression" if is_compressed else "")
        transport = over_grid(grid, self.setting) if isinstance(grid, Grid) else grid
        if initial_arrays is not None and not self.progress.state:
            self.progress.state = dict(initial_arrays.to_torch_state_dict())
            initial_arrays = None  # as large as the model
            self.begin()
        progress, result = self.progress, Result()
        exchange = self._open(transport)
        empty = EmptyRounds(self.loop.max_empty_rounds)
        with ExitStack() as stack:  # all of them, whatever one of them raises
            for held in (self._versions, exchange.shelf, self, transport):
                if held is not None:
                    stack.callback(held.close)
            if progress.server_round == 0:
                self._evaluate(exchange, 0, result, evaluate_fn)
            for server_round in range(progress.server_round + 1, num_rounds + 1):
                num_merged = self._round(exchange, server_round)
                empty.note(num_merged)
                progress.server_round, progress.now_s = server_round, exchange.now_s
                progress.next_dispatch = exchange.next_dispatch
                is_due = server_round % self.setting.evaluate_every == 0 and num_merged is not None
                if is_due or server_round == num_rounds:
                    self._evaluate(exchange, server_round, result, evaluate_fn)
                self._keep(exchange)
            empty.conclude(progress.num_merged)
        result.arrays = ArrayRecord(progress.state)
        return result

    def _open(self, transport: Transport) -> Exchange:
        """The exchange as the checkpoint, if any, left it."""
        progress, setting = self.progress, self.setting
        # Behind a barrier answers are handed on as they come; on the wall's clock, when they come.
        has_shelf = not self.loop.is_barrier and setting.durations is not None
        exchange = Exchange(
            transport,
            setting.durations,
            progress.now_s,
            progress.next_dispatch,
            setting.reply_timeout_s,
            Shelf(setting.versions_dir) if has_shelf else None,
        )
        exchange.hold(progress.held)
        self._kept.note(progress.last_dispatch, progress.held)
        if self.needs_versions or self.loop.compensation:
            self._versions = VersionStore(setting.versions_dir, setting.keep_checkpoints)
            self._versions.expect({arrival.entry.global_version for arrival in progress.held})
        return exchange

    def _keep(self, exchange: Exchange) -> None:
        """Write the checkpoint of a finished round."""
        self.progress.held = [] if self.loop.is_barrier or not exchange.is_virtual else exchange.held()
        self.keep(self.progress, self.export_state())
        self._kept.note(self.progress.last_dispatch, self.progress.held)
        self.progress.held = []  # the exchange has them; nobody else is to hold on to what may be large
        if self._versions is not None:
            self._versions.release(exchange.versions())

    def _round(self, exchange: Exchange, server_round: int) -> int | None:
        """One round: ask, collect, merge. Returns the number of answers merged; None if the method asked nobody."""
        self._round_began_s, self._num_merged = exchange.now_s, 0
        exchange.deadline_s = self.loop.deadline_of(self._round_began_s)
        self._extracts.clear()
        clients = choose(self.loop, exchange, self.progress.clocks, (self.seed, server_round), self.takes_part)
        orders = self.plan(server_round, clients)
        if clients and not orders and not exchange.busy():
            return None
        mean = self.setting.robust.make_mean(self.progress.state, self.layout)
        rows, cpu_s = self._collect(exchange, server_round, orders, mean)
        for row in rows:
            self.listen({"event": "arrival", "server_round": server_round, **row})
        return self._make_version(exchange, server_round, mean, cpu_s)

    def _collect(
        self, exchange: Exchange, server_round: int, orders: dict[int, Order], mean: MaskedMean
    ) -> tuple[list[dict[str, Any]], float]:
        """Send the orders and those that follow them up, and take answers until the round closes.

        Returns rows of the event log in the order of arrival, and the CPU seconds that taking the answers took.
        """
        taken: dict[int, list[dict[str, Any]]] = {}
        asked_once = self.loop.ask == "on-arrival"  # then a client's answers are independent of each other
        cpu_s = 0.0
        while True:
            for partition_id, order in orders.items():
                self._dispatch(exchange, server_round, partition_id, order)
            for arrival in arrivals(exchange, self.loop, self._round_began_s, lambda: self._num_merged):
                began = time.process_time()
                row = self._take(arrival, mean)
                taken.setdefault(arrival.entry.dispatch if asked_once else arrival.entry.partition_id, []).append(row)
                cpu_s += time.process_time() - began
                if asked_once and row["status"] == "merged" and not self._is_closed(exchange):
                    self._refill(exchange, server_round)
            exchange.advance_to(max((rows[-1]["finish_s"] for rows in taken.values()), default=self._round_began_s))
            orders = self.follow_up(server_round)
            if not orders:
                rows = map(combined_row, taken.values())
                return sorted(rows, key=lambda row: (row["finish_s"], row["partition_id"])), cpu_s

    def _make_version(self, exchange: Exchange, server_round: int, mean: MaskedMean, cpu_s: float) -> int:
        """Merge what was taken, in ``cpu_s``, into the next global version; returns the number of answers merged."""
        progress, began = self.progress, time.process_time()
        merged = self.merge(mean) if self._num_merged else None
        if merged is not None and not all(map(is_finite, merged.state.values())):
            self.warn(server_round, "the merge overflowed to infinity and was discarded; lower the learning rate")
            merged = None
        if merged is None or not merged.num_merged:  # or a conversation of several answers that nobody finished
            self.warn(server_round, "no usable answer in this round")
            return 0
        progress.state = merged.state
        progress.global_version += 1
        progress.num_merged += merged.num_merged
        progress.holders = add_holders(progress.holders, merged.holders)
        cpu_s += time.process_time() - began
        self.listen(merge_row(merged, progress, server_round, exchange.now_s, cpu_s))
        return self._num_merged

    def _refill(self, exchange: Exchange, server_round: int) -> None:
        """Ask whoever has become free. Only after an answer that counts: who fails at once is not asked for ever."""
        draw = (self.seed, server_round, exchange.next_dispatch)
        clients = choose(self.loop, exchange, self.progress.clocks, draw, self.takes_part)
        for partition_id, order in (self.plan(server_round, clients) if clients else {}).items():
            self._dispatch(exchange, server_round, partition_id, order)

    def _dispatch(self, exchange: Exchange, server_round: int, partition_id: int, order: Order) -> int:
        blank = self._instruction("train", server_round, partition_id, order)
        version, state = self.progress.global_version, self.progress.state  # however late the request is sent
        asked = (order.work_ratio, blank.wants_delta)
        entry = Entry(-1, partition_id, server_round, version, order.spec, exchange.now_s, 0, *asked)
        if self._versions is not None:
            self._versions.put(version, state)

        def make(dispatch: int) -> Instruction:
            is_present = state is self.progress.state
            sub_model = self.present(order.spec) if is_present else extract(state, self.layout, order.spec)
            return replace(
                blank,
                dispatch=dispatch,
                kept_dispatches=self._kept.of(partition_id),
                state=order.pick(sub_model),
                companions=order.companions(),
            )

        return exchange.dispatch(make, lambda dispatch: replace(entry, dispatch=dispatch))

    def _instruction(self, action: str, server_round: int, partition_id: int, order: Order) -> Instruction:
        """A request that still lacks its number and its tensors."""
        may_be_stale = self.loop.max_staleness != 0 and self.loop.merge_as == "steps"
        wants_delta = self.sends_deltas or may_be_stale or self.setting.job.compression.kind != "none"
        return Instruction(
            action=action,
            dispatch=-1,
            partition_id=partition_id,
            server_round=server_round,
            global_version=self.progress.global_version,
            job=self.setting.job,
            state={},
            spec=order.spec,
            objective=order.objective,
            settings=order.settings,
            last_dispatch=self.progress.last_dispatch.get(partition_id, -1),
            is_partial=order.travels is not None,
            wants_delta=wants_delta and action == "train",
            work_ratio=order.work_ratio,
        )

    def present(self, spec: SubModelSpec) -> dict[str, torch.Tensor]:
        """The tensors of ``spec`` as the global model has them now; nobody may change them."""
        return self._extracts.get(self.progress.state, spec)

    def _is_closed(self, exchange: Exchange) -> bool:
        return self.loop.is_closed(self._num_merged, self._round_began_s, exchange.now_s)

    def _take(self, arrival: Arrival, mean: MaskedMean) -> dict[str, Any]:
        """Check one answer, weigh it, add it to the merge and learn from it; returns its row of the event log.

        Whatever is wrong with an answer turns it away before anything has changed, and never ends the run.
        """
        entry, answer = arrival.entry, arrival.answer
        staleness = self.progress.global_version - entry.global_version
        row = partial(arrival_row, arrival, self.cost, staleness)
        if isinstance(answer, Failure):
            return row("failed", answer.reason)
        try:
            held = check_narrowed(answer, entry.spec, self.layout)
            step_scale = self.loop.step_scale(staleness)
            is_step = answer.is_delta or step_scale != 1 or self.loop.compensation > 0
            now = self.present(held) if is_step else {}  # values are merged as they are
            is_compressed = self.setting.job.compression.kind != "none"
            report = check_report(answer, self.progress.state, now, entry.wants_delta, is_compressed)
            self.vet(arrival, report)
            if self.loop.is_too_old(staleness):
                self.observe_late(arrival, report)
                return row("late", f"{staleness} versions old, {self.loop.max_staleness} allowed")
            mean_square = self.progress.mean_square
            if self.loop.compensation:
                mean_square = mean_square or first_mean_square(self.progress.state)
                sent, place = self.sent_state(entry, held), (self.layout, held)
                report, mean_square = compensate_report(report, now, sent, mean_square, place, self.loop)
            report = rebase(report, now, step_scale, staleness)
            weight_before = mean.total_weight
            self.add(mean, entry, report, staleness)
        except RunStoppedError:
            raise
        except FAULTS as error:
            return row("rejected", describe(error))
        self.observe(arrival, report)
        self._num_merged += 1
        self.progress.mean_square = mean_square
        self.progress.clocks[entry.partition_id] = self.progress.clocks.get(entry.partition_id, 0) + 1
        self.progress.last_dispatch[entry.partition_id] = entry.dispatch
        return {**row("merged", ""), "merge_weight": mean.total_weight - weight_before}

    def sent_state(self, entry: Entry, spec: SubModelSpec | None = None) -> dict[str, torch.Tensor]:
        """What a client was sent, or a part of it; of an older model as it lies on disk. Needs ``needs_versions``.

        Raises
        ------
        VersionError
            If the older model is not there.
        """
        if entry.global_version == self.progress.global_version:
            return self.present(spec or entry.spec)
        assert self._versions is not None, "a method that looks back says so with needs_versions"
        return extract(self._versions.get(entry.global_version), self.layout, spec or entry.spec)

    def warn(self, server_round: int, message: str) -> None:
        """Put a warning into the event log."""
        self.listen({"event": "warning", "server_round": server_round, "message": message})

    # --- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate(self, exchange: Exchange, server_round: int, result: Result, evaluate_fn: Evaluate | None) -> None:
        progress = self.progress
        where = {"server_round": server_round, "global_version": progress.global_version, "time_s": exchange.now_s}
        if self.setting.evaluate is not None and self.has_global_model:
            is_due = server_round % self.setting.family_every == 0 or server_round == self.setting.job.num_rounds
            family = self.family() if is_due else {}
            row = self.setting.evaluate(progress.state, family, self.deployed(), self.prediction())
            self.listen({"event": "evaluation", "where": "central", **where, **row})
            result.evaluate_metrics_serverapp[server_round] = MetricRecord(
                {k: float(row[k]) for k in ("accuracy", "loss") if k in row}
            )
        if evaluate_fn is not None:
            metrics = evaluate_fn(server_round, ArrayRecord(progress.state))
            if metrics is not None:
                result.evaluate_metrics_serverapp[server_round] = metrics
        if self.setting.evaluate_clients or not self.has_global_model:
            row = self._evaluate_clients(exchange, server_round)
            if row:
                self.listen({"event": "evaluation", "where": "federated", **where, **row})
                result.evaluate_metrics_clientapp[server_round] = MetricRecord(
                    {k: float(row[k]) for k in ("accuracy", "loss")}
                )

    def _evaluate_clients(self, exchange: Exchange, server_round: int) -> dict[str, Any]:
        """Every free client tests its own sub-model on its own test part; takes no time on the run's clock."""
        busy = exchange.busy()
        free = [pid for pid in exchange.transport.clients() if pid not in busy]

        def instruct(pid: int) -> Instruction:
            order = self.evaluation_order(pid)
            blank = self._instruction("evaluate", server_round, pid, order)
            return evaluation_request(blank, order, self.present(order.spec), self.setting)

        return ask_tests(exchange, free, instruct, self.judge, partial(self.warn, server_round))

    # --- Flower's own loop is not used ------------------------------------------------------------------------------

    def configure_train(self, *args: object, **kwargs: object) -> Any:
        """Belongs to Flower's round loop, which ``start`` replaces."""
        raise RuntimeError(f"{type(self).__name__} runs its own event loop: call start(grid, ...), not its steps")

    aggregate_train = configure_evaluate = aggregate_evaluate = configure_train

    def summary(self) -> None:
        """Say what this strategy is made of."""
        logger.info("%s: %s; %s", self.name, self.config, self.loop)
