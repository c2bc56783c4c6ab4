"""ADP (Yu, Nguyen, Anwar, Jannesari 2021, arXiv 2106.06921): clients train the channels that their inputs make salient.

A gate per layer, ``g = ReLU(mean|x| Wg^T + bg)``, lets the k most salient units win; only they are computed, only their
gradients are kept, and only a part of a client's units is sent back (``pruning.gates``). Dense for a warm-up, then
linearly down to ``density``. It sits on FedAvg, FedProx, SCAFFOLD or FedNova. ``magnitude`` is what one published
snapshot does, ``static`` the control: as many units, chosen once for everybody and every input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruning.gates import (
    BITMAP,
    PLAN,
    PREFIX,
    SALIENCE,
    SHARES,
    GateError,
    check_bitmap,
    find_sites,
    gated_groups,
    gates_of,
    key_of,
    num_winners,
)
from pruning.groups import Group
from pruning.importance import score_units
from pruning.merge import AggregateResult, MaskedMean, holders_mean, residual_mean
from pruning.select import select_top
from pruning.spec import FULL, SubModelSpec
from strategies.base import SubModelStrategy
from strategies.base_algorithms import BASES, Base
from strategies.exchange import Arrival, Entry
from strategies.gate_rows import GateRows, check_evidence, plan_row, slower_gated
from strategies.idle import changed
from strategies.setting import Order
from wire.flat import ConfigError, Scalar, refuse, require, require_choice
from wire.message import Report
from wire.spec import spec_from_json, spec_to_json


@dataclass(frozen=True)
class ADPConfig:
    """Settings of ADP.

    Attributes
    ----------
    mode : ``gate`` (winners by input), ``magnitude`` (small weights are zeroed) or ``static`` (units chosen once).
    density : share of a layer's units that win, in (0, 1].
    share : who shares winners: ``sample``, ``group`` (samples with like winners), ``batch``, or ``client``: a client
        trains an ordinary sub-model of the units that were most salient on its data.
    num_groups : groups of a batch, a power of two.
    warmup_rounds, ramp_rounds : dense at first, then linearly down to ``density``.
    sparsity : factor of an L1 term on the gates.
    optimizer_mask : whether units that nobody in a batch selected stay where they are in the optimiser's step.
    compact : whether only winners are computed; if not, everything is, and masked: the reference.
    upload : ``salient`` (the units most salient on a client's data), ``changed`` (those that changed most since it last
        sent them: changes wait for their turn, and who did not send an entry counts as no change) or ``all``.
    upload_density : share of a layer's units that is sent; 0 for ``density``.
    gates : ``global`` (averaged) or ``personal`` (they stay on the client).
    plan : gate ``all`` layers, or those in which gating pays on the clients' devices, ``measured`` once on each
        device that is asked before pruning begins.
    threshold : of ``magnitude``.
    base : ``fedavg``, ``fedprox``, ``scaffold`` or ``fednova``; mu: of ``fedprox``.
    """

    mode: str = "gate"
    density: float = 0.5
    share: str = "group"
    num_groups: int = 4
    warmup_rounds: int = 5
    ramp_rounds: int = 5
    sparsity: float = 0.0
    optimizer_mask: bool = True
    compact: bool = True
    upload: str = "salient"
    upload_density: float = 0.0
    gates: str = "global"
    plan: str = "all"
    threshold: float = 1e-3
    base: str = "fedavg"
    mu: float = 0.01

    def __post_init__(self) -> None:
        """Check every range."""
        require(0 < self.density <= 1, "density", self.density, "in (0, 1]")
        require(0 <= self.upload_density <= 1, "upload-density", self.upload_density, "in [0, 1]")
        is_power = self.num_groups >= 1 and self.num_groups & (self.num_groups - 1) == 0
        require(is_power, "num-groups", self.num_groups, "a power of two")
        for name in ("warmup_rounds", "ramp_rounds", "sparsity", "threshold", "mu"):
            require(getattr(self, name) >= 0, name.replace("_", "-"), getattr(self, name), ">= 0")
        require_choice("mode", self.mode, ("gate", "magnitude", "static"))
        require_choice("share", self.share, SHARES)
        require_choice("upload", self.upload, ("salient", "changed", "all"))
        require_choice("gates", self.gates, ("global", "personal"))
        require_choice("plan", self.plan, ("all", "measured"))
        require_choice("base", self.base, BASES)

    def density_at(self, server_round: int) -> float:
        """Density of one round, counted from 1."""
        into = server_round - self.warmup_rounds
        if into <= 0:
            return 1.0
        return self.density if into >= self.ramp_rounds else 1 - (1 - self.density) * into / self.ramp_rounds


class ADP(SubModelStrategy):
    """Dynamic pruning on top of a base algorithm."""

    name = "adp"
    Config = ADPConfig
    config: ADPConfig

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._base = Base(self.config.base, self.setting, self.config.mu)
        self._salience: dict[int, Tensor] = {}
        self._times: dict[int, Tensor] = {}
        self._static: SubModelSpec = FULL
        self._density = 1.0
        self._dense: list[str] = []
        self._rows = GateRows()

    def check(self) -> None:
        """Gates need a network that has them; what contradicts each other, or would do nothing, is refused."""
        c, job = self.config, self.setting.job
        self._base.check(self.name)
        refuse(
            c.mode == "gate" and not job.model.gates,
            "strategy=adp with model.gates=false",
            "the model has no gates; use model.gates=true (or adp.mode=magnitude or static, which need none)",
        )
        refuse(
            c.base == "scaffold" and (c.share == "client" or c.gates == "personal"),
            f"adp.base=scaffold with adp.share={c.share}, adp.gates={c.gates}",
            "control variates are means over clients that hold the same entries round after round; use adp.share=group "
            "and adp.gates=global, or another base",
        )
        refuse(
            c.gates == "personal" and self.setting.evaluate is not None,
            "adp.gates=personal with a central evaluation",
            "the server has no gates that were trained; use evaluation.where=federated",
        )
        refuse(
            c.mode == "gate" and c.share == "client" and c.plan == "measured",
            "adp.plan=measured with adp.share=client",
            "clients train sub-models without gathering anything, so there is nothing to measure; use adp.plan=all",
        )
        if c.mode == "static":
            refuse(not self._groups, "adp.mode=static", "the model has nothing that can be left out")
        if c.mode == "gate" and c.share == "group" and self.setting.network is not None:
            refuse(
                not gates_of(self.setting.network).can_group,
                "adp.share=group",
                "the model is no chain of blocks (traced models never are); use adp.share=batch or sample",
            )
        is_waiting, robust = c.upload == "changed", self.setting.robust
        refuse(
            is_waiting and (job.compression.kind != "none" or not robust.is_plain),
            f"adp.upload=changed with compression.kind={job.compression.kind}, robust.centre={robust.centre}",
            "a part of what clients believe to have arrived is held back or left out; use adp.upload=salient",
        )
        reason = "clients need a folder to remember in what they did not send (store_dir)"
        refuse(is_waiting and not job.store_dir, "adp.upload=changed", reason)
        self._check_idle()

    def _check_idle(self) -> None:
        """Refuse settings that were changed and would do nothing beside others."""
        c = self.config
        of_uploads = ("upload", "upload-density")
        of_winners = ("optimizer-mask", "compact", *of_uploads)
        of_gates = ("share", "num-groups", "sparsity", *of_winners, "gates", "plan")
        for is_idle, names, beside, instead in (
            (c.mode != "gate", of_gates, f"mode={c.mode}", "mode=gate"),
            (c.mode == "magnitude", ("density",), "mode=magnitude", "mode=gate or static"),
            (c.mode != "magnitude", ("threshold",), f"mode={c.mode}", "mode=magnitude"),
            (c.share != "group", ("num-groups",), f"share={c.share}", "share=group"),
            (c.share == "client", of_winners, "share=client", "share=group, batch or sample"),
            (c.upload == "all", ("upload-density",), "upload=all", "upload=salient"),
            (c.density == 1, of_uploads, "density=1", "density below 1"),
            (c.upload_density == 1, ("upload",), "upload-density=1", "upload-density below 1"),
            (c.base != "fedprox", ("mu",), f"base={c.base}", "base=fedprox"),
        ):
            found = changed(c, names, self.name) if is_idle else []
            keys = f"{', '.join(found)} with adp.{beside}"
            refuse(bool(found), keys, f"has no effect; leave it out, or use adp.{instead}")

    def begin(self) -> None:
        """The base algorithm starts from the initial model."""
        self._base.begin(self.progress.state, self.layout)
        if not self.progress.server_round:
            self._warn_of_schedule()

    def _warn_of_schedule(self) -> None:
        """Say so where the schedule does not get to the density that is asked for."""
        c, num_rounds = self.config, self.setting.job.num_rounds
        if c.mode == "magnitude":
            found = changed(c, ("warmup-rounds", "ramp-rounds"), self.name)
            if found:
                self.warn(0, f"{', '.join(found)}: has no effect with adp.mode=magnitude, which zeroes from round 1 on")
            return
        last = c.density_at(num_rounds)
        if last > c.density:
            how = "nothing is ever pruned" if last == 1 else f"pruning ends at density {last:.3g}"
            enough = c.warmup_rounds + max(1, c.ramp_rounds)
            self.warn(
                0,
                f"{how} instead of adp.density={c.density:g}: num-rounds={num_rounds} with {c.warmup_rounds} rounds of "
                f"warm-up and {c.ramp_rounds} of going down; raise num-rounds to {enough} or more, or "
                "lower adp.warmup-rounds and adp.ramp-rounds",
            )

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Set the round's density; everybody trains the whole model through its gates, or its own sub-model."""
        self._density = self.config.density_at(server_round)
        if self.config.mode == "gate":
            self._set_winners()
        if self.config.mode == "static" and self._density < 1:
            self._static = self._static_spec(self._density)
        return {pid: self._order(pid) for pid in clients}

    def observe(self, arrival: Arrival, report: Report) -> None:
        """Remember what was salient, and what the client's gates did."""
        if self.config.mode != "gate":
            return
        self._salience[arrival.entry.partition_id] = report.companions[SALIENCE]
        self._rows.note(report.companions)
        if PLAN in report.companions:
            times = self._times[arrival.entry.partition_id] = report.companions[PLAN]
            who = {"partition_id": arrival.entry.partition_id}
            row = plan_row(times, [group.name for group in self._groups])
            self.listen({"event": "plan", "server_round": arrival.entry.server_round, **who, **row})

    def add(self, mean: MaskedMean, entry: Entry, report: Report, staleness: int) -> None:
        """Average what was sent, unit by unit."""
        held = report.narrowed or entry.spec
        start = self.present(held)
        if self.config.mode == "gate":
            check_evidence(report.companions, [group.size for group in self._groups])
            if report.narrowed is not None:
                check_bitmap(report.companions.get(BITMAP), self.layout, report.narrowed)
        if self.config.gates == "personal":
            own = {key: start[key] for key in start if key.startswith(PREFIX) and key not in report.state}
            report = replace(report, state={**report.state, **own})
        answer = self._base.read(entry, report, start)
        super().add(mean, entry, answer.report, staleness)
        answer.note(self.weigh(report, staleness))

    def merge(self, mean: MaskedMean) -> AggregateResult:
        """As the base does it; and say what the gates did."""
        self._base.prepare(mean)
        rule = residual_mean if self.config.upload == "changed" else holders_mean
        merged = self._base.close(mean.finalize(self.loop.mixing_rate, rule), self.progress.state)
        if self.config.gates == "personal":  # the mean of equal numbers may differ from them in its last bit
            kept = {key: tensor for key, tensor in self.progress.state.items() if key.startswith(PREFIX)}
            merged = replace(merged, state={**merged.state, **kept})
        if self.config.mode == "gate":
            row = self._rows.close([group.name for group in self._groups])
            where = {"server_round": self.progress.server_round + 1, "density": self._density}
            self.listen({"event": "gates", **where, "dense": self._dense, **row})
        return merged

    def deployed(self) -> SubModelSpec:
        """Units that ``static`` left out are no longer part of the model."""
        return self._static

    def evaluation_order(self, partition_id: int) -> Order:
        """What the client trains."""
        return self._order(partition_id)

    def _order(self, partition_id: int) -> Order:
        c, base = self.config, self._base
        if c.mode != "gate":
            inner = "cross-entropy+magnitude" if c.mode == "magnitude" else "cross-entropy"
            settings: dict[str, Scalar] = {"threshold": c.threshold, **base.settings()}
            return Order(self._static, base.objective(inner), settings, base.companions(self._static))
        spec = self._client_spec(partition_id) if c.share == "client" else FULL
        sends_all = c.upload == "all" or c.share == "client" or self._density == 1
        settings = {
            "share": c.share,
            "num-groups": c.num_groups,
            "compact": c.compact,
            "sparsity": c.sparsity,
            "optimizer-mask": c.optimizer_mask,
            "upload": c.upload,
            "upload-density": 1.0 if sends_all else c.upload_density or self._density,
            "personal": c.gates == "personal",
            "measure": self._is_measured_now and partition_id not in self._times,
            "density": c.density,
        }
        is_known = c.gates == "personal" and partition_id in self.progress.last_dispatch
        return Order(
            spec,
            base.objective("gated"),
            {**settings, **base.settings()},
            base.companions(spec),
            travels=_without_gates if is_known else None,
        )

    @property
    def _is_measured_now(self) -> bool:
        """Whether clients measure: until pruning begins, for a layer whose gate comes or goes is another function."""
        c = self.config
        return c.plan == "measured" and (not self._times or self.progress.server_round < max(1, c.warmup_rounds))

    def _set_winners(self) -> None:
        """Write into the model how many units of each layer win, 0 where gating does not pay on the clients' devices.

        Integer entries are never averaged.
        """
        names = [group.name for group in self._groups]
        slower = slower_gated(list(self._times.values()), names)
        self._dense = [name for name in names if name in slower]
        entries = {
            f"{PREFIX}{key_of(group.name)}.num_winners": torch.tensor(
                0 if group.name in slower else num_winners(group.size, self._density)
            )
            for group in self._groups
        }
        if any(not torch.equal(self.progress.state[key], entry) for key, entry in entries.items()):
            self.progress.state = {**self.progress.state, **entries}
            if len(slower) == len(names):
                self.warn(
                    self.progress.server_round + 1,
                    "adp.plan=measured leaves every layer dense: gating pays in none of them on the measured clients, "
                    "so that nothing is pruned; use a wider model or larger batches, or adp.plan=all",
                )

    def _client_spec(self, partition_id: int) -> SubModelSpec:
        """The units most salient on a client's data; of a client not heard of yet, on everybody's."""
        groups = self._groups
        known = self._salience.get(partition_id)
        if known is None:
            total = torch.zeros(sum(group.size for group in groups))
            known = torch.stack(list(self._salience.values())).mean(0) if self._salience else total
        scores = known.split([group.size for group in groups])
        widths = {group.name: num_winners(group.size, self._density) for group in groups}
        return select_top(self.layout, widths, {g.name: np.asarray(s) for g, s in zip(groups, scores, strict=True)})

    def _static_spec(self, density: float) -> SubModelSpec:
        """The most important units, out of those that an earlier, wider choice kept; the last choice holds for good."""
        widths = {group.name: num_winners(group.size, density) for group in self._groups}
        if all(self._static.width(self.layout, name) == width for name, width in widths.items()):
            return self._static
        scores = score_units(self.progress.state, self.layout)
        for name, units in self._static.arrays.items():
            scores[name][np.setdiff1d(np.arange(len(scores[name])), units)] = -np.inf
        return select_top(self.layout, widths, scores)

    @cached_property
    def _groups(self) -> tuple[Group, ...]:
        """The groups that have a gate, or would have one."""
        gated = gated_groups(self.layout)
        if gated or self.setting.network is None:
            return gated
        try:
            sites = find_sites(self.setting.network, self.layout, self.setting.image_shape)
        except GateError as error:
            name = self.setting.job.model.name
            raise ConfigError(f"config: adp.mode={self.config.mode} with model.name={name}: {error}") from error
        return tuple(self.layout.by_name[site.group] for site in sites)

    def export_state(self) -> dict[str, Any]:
        """The base's state, what was salient to whom, and the static choice."""
        return {
            "base": self._base.export_state(),
            "salience": {str(pid): salience for pid, salience in self._salience.items()},
            "times": {str(pid): times for pid, times in self._times.items()},
            "static": spec_to_json(self._static),
        }

    def import_state(self, own: dict[str, Any]) -> None:
        """Go on from ``export_state``."""
        self.begin()
        self._base.import_state(own["base"])
        self._salience = {int(pid): salience for pid, salience in own["salience"].items()}
        self._times = {int(pid): times for pid, times in own["times"].items()}
        self._static = spec_from_json(own["static"]) or FULL
        self._density = self.config.density_at(self.progress.server_round)


def _without_gates(key: str) -> bool:
    """Everything but what gates have learned."""
    return not (key.startswith(PREFIX) and key.endswith((".weight", ".bias")))
