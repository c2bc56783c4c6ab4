"""Co-S2P (Li et al. 2024, arXiv 2410.08457): semi-asynchronous training of depth- and width-pruned models.

Client i of rate r_i keeps the first ``floor(r_i L)`` blocks and, in each, the share r_i of the units. Which of them
matter, it learns on its own data with the weights frozen, the first two times it is asked; then it keeps those that
most clients have chosen (``masks = agreed``) or its own. The deepest exit that it holds teaches its shallower ones.
The server merges as soon as a quorum has answered::

    theta_k += sum_{i holds k} c_i delta_ik / sum_{all i} c_i                            (``coverage-norm = global``)
    c_i = (||delta_i||_1 / n_i) / (||theta_now - theta_sent_to_i||_1 / ||delta_i||_1 + 1)   (``client-weight = co-s2p``)

n_i entries that client i holds.

What is the paper's and what is ours: docs/fidelity.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

from pruning.capability import Capability, exit_depths, groups_within, inner_groups
from pruning.merge import AggregateResult, MaskedMean, holders_mean, residual_mean
from pruning.spec import SubModelSpec
from strategies.base import SubModelStrategy
from strategies.cos2p_masks import KINDS, LEARNED, NESTED, Masks
from strategies.cos2p_rule import (
    Coverage,
    budgets_of,
    co_s2p_weight,
    covering_spec,
    full_depth_capabilities,
    l1_distance,
    num_trained,
    parse_budgets,
    published_weight,
    solve_budgets,
)
from strategies.exchange import Arrival, Entry
from strategies.idle import changed, idle_settings
from strategies.loop import quorum_of
from strategies.setting import Order
from wire.flat import Scalar, refuse, require, require_choice
from wire.message import Report

OF_MASKS = ("mask-receptions", "mask-epochs", "mask-learning-rate", "mask-penalty", "mask-select")
OF_TEACHING = ("temperature", "kd-weight", "kd-start")
"""Settings of the mask phase, and of exits that teach others."""
BY_STEPS = ("co-s2p", "published")
"""Client weights that are made of how far the client and the global model have moved."""


@dataclass(frozen=True)
class CoS2PConfig:
    """Settings of Co-S2P.

    Attributes
    ----------
    budgets : what devices can spend, comma-separated: rates in (0, 1], bytes of memory (``2GiB,800MB``), or
        ``device:SHARE`` of each simulated device's own memory.
    assignment : ``capability`` (equal parts of the clients per budget, faster devices the larger) or ``cycle``.
    solver : ``paper`` (one rate for depth and width) or ``fit`` (the deepest exit whose training fits, then the width).
    masks : ``agreed`` (clients learn which units matter on their data, and keep those that most of them chose),
        ``learned`` (each keeps its own choice, as in the paper), ``random`` or ``first`` units.
    mask_receptions : merged answers in which a client learns its mask, before it is fixed.
    mask_epochs : passes over its examples by which a client learns its mask, at each of these.
    mask_learning_rate : of the scores.
    mask_penalty : lambda of ``|mean(gates) - width rate|``.
    mask_select : final mask: ``top-k`` of the scores per group, or drawn (``bernoulli``), which misses the rate.
    transfer : ``deepest-teaches``, ``mutual`` or ``none``; for models with exits (``model.exits``).
    temperature, kd_weight : of the distillation, beside each exit's own cross-entropy.
    kd_start : first round with distillation.
    client_weight : ``co-s2p``; ``published``, which depends on the sizes of the model and the sub-model; ``samples``,
        ``uniform`` or ``polynomial`` (n (1 + staleness)^-0.5).
    coverage_norm : ``global`` divides by the weight of the whole merge, so that what few have tried moves little;
        ``per-entry`` by that of an entry's holders.
    rotate_coverage : one client at a time takes over, in turn, what nobody has held since all were heard; a turn is no
        reception of its mask phase, whose scores wait.
    exit_choice : clients deploy the exit that is best on their own data (``personal``), or the ``deepest``.
    quorum_ratio : merge when this share of the clients has answered, or at ``loop.deadline-s`` if that is earlier,
        unless ``loop.quorum`` says otherwise; 0 leaves it to the loop's settings.
    max_staleness : of rounds that close before everybody has answered: older answers are dropped, unless
        ``loop.max-staleness`` says otherwise.
    """

    budgets: str = "1,0.75,0.5,0.25"
    assignment: str = "capability"
    solver: str = "paper"
    masks: str = "agreed"
    mask_receptions: int = 2
    mask_epochs: int = 20
    mask_learning_rate: float = 0.01
    mask_penalty: float = 1.0
    mask_select: str = "top-k"
    transfer: str = "deepest-teaches"
    temperature: float = 3.0
    kd_weight: float = 0.5
    kd_start: int = 10
    client_weight: str = "co-s2p"
    coverage_norm: str = "global"
    rotate_coverage: bool = False
    exit_choice: str = "personal"
    quorum_ratio: float = 0.5
    max_staleness: int = 10

    def __post_init__(self) -> None:
        """Check every range."""
        parse_budgets(self.budgets)
        require(0 <= self.quorum_ratio <= 1, "quorum-ratio", self.quorum_ratio, "in [0, 1]")
        for key, least in (("mask_receptions", 1), ("mask_epochs", 1), ("max_staleness", 0), ("kd_start", 0)):
            require(getattr(self, key) >= least, key.replace("_", "-"), getattr(self, key), f">= {least}")
        for key in ("mask_learning_rate", "temperature"):
            require(getattr(self, key) > 0, key.replace("_", "-"), getattr(self, key), "> 0")
        for key in ("mask_penalty", "kd_weight"):
            require(getattr(self, key) >= 0, key.replace("_", "-"), getattr(self, key), ">= 0")
        for key, value, choices in (
            ("assignment", self.assignment, ("capability", "cycle")),
            ("solver", self.solver, ("paper", "fit")),
            ("masks", self.masks, KINDS),
            ("mask-select", self.mask_select, ("top-k", "bernoulli")),
            ("transfer", self.transfer, ("deepest-teaches", "mutual", "none")),
            ("client-weight", self.client_weight, (*BY_STEPS, "samples", "uniform", "polynomial")),
            ("coverage-norm", self.coverage_norm, ("global", "per-entry")),
            ("exit-choice", self.exit_choice, ("personal", "deepest")),
        ):
            require_choice(key, value, choices)


class CoS2P(SubModelStrategy):
    """Depth by capability, learned width masks, exits, a quorum."""

    name = "cos2p"
    Config = CoS2PConfig
    config: CoS2PConfig

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        c, num_clients = self.config, self.setting.job.num_clients
        if self.loop.quorum == 0 and c.quorum_ratio:
            self.loop = replace(self.loop, quorum=quorum_of(c.quorum_ratio, num_clients))
        if not self.loop.is_barrier:
            self.loop = replace(self.loop, max_staleness=self.loop.max_staleness or c.max_staleness)
        self.needs_versions = c.client_weight in BY_STEPS and self.loop.max_staleness != 0
        self._groups = inner_groups(self.layout, self.cost.shapes)
        self._full_depth = exit_depths(self.layout)[-1]
        self._budgets = budgets_of(c.budgets, self.setting, c.assignment)
        self._learns = c.masks in LEARNED
        self._capabilities = solve_budgets(self._budgets, self.setting, self._groups, c.solver, self._learns)
        self._masks = Masks(c.masks, self.layout, self._groups, self._capabilities, c.mask_receptions, self.seed)
        self._coverage = Coverage(self.layout, self._groups)
        self._turns: dict[int, int] = {}
        self._trained_depth = 0
        self._warned: set[str] = set()

    # --- hooks -------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse a run in which nobody would ever train the end of the model, and settings that would do nothing."""
        if not self.setting.job.model.exits:
            found = changed(self.config, ("transfer", *OF_TEACHING, "exit-choice"), self.name)
            refuse(
                bool(found),
                f"{', '.join(found)} with model.exits=false",
                "blocks teach each other through exit heads; set model.exits=true, or leave it out",
            )
        if self.config.client_weight != "samples" and not self.loop.preset:  # a preset's weights are a default
            refuse(
                self.loop.client_weight != "examples",
                f"loop.client-weight={self.loop.client_weight} with cos2p.client-weight={self.config.client_weight}",
                "one rule says what an answer weighs; set cos2p.client-weight=samples to use the loop's",
            )
            refuse(
                self.loop.staleness != "constant" and self.loop.staleness_scales == "weight",
                f"loop.staleness={self.loop.staleness} with cos2p.client-weight={self.config.client_weight}",
                "one rule says what an answer weighs; set cos2p.client-weight=samples to use the loop's, or "
                "loop.staleness-scales=step to scale its step",
            )
        deepest = max(capability.depth for capability in self._capabilities)
        if deepest == self._full_depth:
            return
        refuse(
            not self.config.rotate_coverage,
            f"cos2p.budgets={self.config.budgets}",
            f"nobody can hold the full depth: of {self._full_depth} blocks the largest budget holds {deepest}; give "
            "one client more, or set cos2p.rotate-coverage=true",
        )
        refuse(
            not self._tall,
            f"cos2p.budgets={self.config.budgets}",
            "no budget holds all blocks at a quarter of the width",
        )

    def begin(self) -> None:
        """Say so where settings were changed that do nothing beside others, and where nobody will ever teach."""
        c, job = self.config, self.setting.job
        rules = (
            (not self._learns, f"cos2p.masks={c.masks}", OF_MASKS),
            (c.transfer == "none", "cos2p.transfer=none", OF_TEACHING),
        )
        for sentence in idle_settings(c, rules, self.name):
            self.warn(0, sentence)
        widest = max(capability.width_rate for capability in self._capabilities)
        if c.masks in NESTED and widest < 1 and not c.rotate_coverage:
            self.warn(
                0,
                f"cos2p.masks={c.masks}: smaller sub-models are parts of larger ones, and no client keeps more than "
                f"{widest:.2g} of a layer's units: the others are never trained. Give one client more, set "
                "cos2p.rotate-coverage=true, or cos2p.masks=learned",
            )
        robust = self.setting.robust
        if c.client_weight in BY_STEPS and robust.centre == "mean" and not robust.is_plain:
            self.warn(
                0,
                f"cos2p.client-weight={c.client_weight} with robust.clip-*: an answer counts by the length of its step "
                "before it is shortened, so that who lies about it outweighs the others; set robust.centre=median, or "
                "cos2p.client-weight=uniform",
            )
        teaches = job.model.exits and c.transfer != "none" and c.kd_weight > 0
        if teaches and c.kd_start > job.num_rounds:
            self.warn(
                0,
                f"cos2p.transfer={c.transfer}: no exit ever teaches another: cos2p.kd-start={c.kd_start} is behind the "
                f"last of num-rounds={job.num_rounds}; lower it, or set cos2p.transfer=none",
            )

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Everybody's own sub-model; one client in turn takes over what nobody holds, if so configured."""
        orders = {pid: self._order(pid, server_round) for pid in clients}
        rotated = self._rotated(clients)
        if rotated is not None:
            pid, spec = rotated
            orders[pid] = Order(spec, self._objective(), self._settings(server_round))
        return orders

    def add(self, mean: MaskedMean, entry: Entry, report: Report, staleness: int) -> None:
        """Under the configured client weight."""
        held = report.narrowed or entry.spec
        mean.check(report.state, held)
        mean.add(report.state, held, self._client_weight(entry, report, held, staleness))
        self._coverage.note(held, self.progress.global_version + 1)
        self._trained_depth = max(self._trained_depth, len(self.layout.blocks) if held.depth is None else held.depth)

    def observe(self, arrival: Arrival, report: Report) -> None:
        """Note the mask that the client has learned."""
        if report.narrowed is not None:
            self._masks.note(arrival.entry.partition_id, report.narrowed)

    def merge(self, mean: MaskedMean) -> AggregateResult:
        """Under the configured norm; entries without a holder are warned about with their blocks' names."""
        rule = holders_mean if self.config.coverage_norm == "per-entry" else residual_mean
        merged = mean.finalize(self.loop.mixing_rate, rule)
        missed = self._missed_blocks(merged) if merged.n_star == 0 else ""
        if missed and missed not in self._warned:
            self._warned.add(missed)
            self.warn(self.progress.server_round + 1, f"N* is 0: nobody in this merge held all of {missed}")
        return merged

    def family(self) -> dict[str, SubModelSpec]:
        """The model up to every exit that somebody has trained; the deepest of them is what is deployed."""
        depths = [depth for depth in exit_depths(self.layout) if depth < self._trained_depth]
        return {f"exit {number}": SubModelSpec(depth=depth) for number, depth in enumerate(depths, start=1)}

    def deployed(self) -> SubModelSpec:
        """The model up to the deepest exit that has been trained."""
        depth = self._trained_depth or len(self.layout.blocks)
        return SubModelSpec(depth=None if depth == len(self.layout.blocks) else depth)

    def evaluation_order(self, partition_id: int) -> Order:
        """The client's sub-model, and the exit it has found best."""
        spec = self._masks.of(partition_id)
        depth = len(self.layout.blocks) if spec.depth is None else spec.depth
        if 0 < self._trained_depth < depth:  # an exit that nobody has trained says nothing
            within = {group.name for group in groups_within(self._groups, self.layout, self._trained_depth)}
            spec = SubModelSpec(tuple(pair for pair in spec.kept if pair[0] in within), self._trained_depth)
        return Order(spec, self._objective(), self._settings(1))

    def export_state(self) -> dict[str, Any]:
        """Masks, how often each was learned, coverage and whose turn it was when."""
        return {
            **self._masks.export(),
            "coverage": self._coverage.export(),
            "turns": {str(pid): version for pid, version in self._turns.items()},
            "trained_depth": self._trained_depth,
            "warned": sorted(self._warned),
        }

    def import_state(self, own: dict[str, Any]) -> None:
        """Go on from ``export_state``."""
        self._masks.restore(own)
        self._coverage.restore(own["coverage"])
        self._turns = {int(pid): version for pid, version in own.get("turns", {}).items()}  # older checkpoints: none
        self._trained_depth, self._warned = own["trained_depth"], set(own["warned"])

    @cached_property
    def _tall(self) -> dict[int, Capability]:
        return full_depth_capabilities(self._budgets, self.setting, self._groups, self._full_depth)

    # --- orders ------------------------------------------------------------------------------------------------------

    def _order(self, pid: int, server_round: int) -> Order:
        settings, objective = self._settings(server_round), self._objective()
        if not self._masks.is_learning(pid):
            return Order(self._masks.of(pid), objective, settings)
        base, *corrections = objective.split("+")
        settings = settings | {
            "then": base,
            "width-rate": self._capabilities[pid].width_rate,
            "mask-epochs": self.config.mask_epochs,
            "mask-learning-rate": self.config.mask_learning_rate,
            "mask-penalty": self.config.mask_penalty,
            "mask-select": self.config.mask_select,
        }
        return Order(self._masks.whole(pid), "+".join(["mask-learning", *corrections]), settings)

    def _objective(self) -> str:
        if not self.setting.job.model.exits:
            return "cross-entropy"
        base = "exits" if self.config.transfer == "none" else self.config.transfer
        return f"{base}+exit-choice" if self.config.exit_choice == "personal" else base

    def _settings(self, server_round: int) -> dict[str, Scalar]:
        weight = self.config.kd_weight if server_round >= self.config.kd_start else 0.0
        return {"temperature": self.config.temperature, "distillation-weight": weight}

    def _rotated(self, clients: Sequence[int]) -> tuple[int, SubModelSpec] | None:
        """Who takes over what no merge has held since everybody was heard; and which sub-model that is.

        One turn in as many merges as it takes to hear everybody, so that where clients are asked one by one they still
        train mostly what is theirs; never the same client twice running, while there are others.
        """
        if not self.config.rotate_coverage:
            return None
        num_clients, version = self.setting.job.num_clients, self.progress.global_version
        patience = ceil(num_clients / self._answers_a_merge())
        last = max(self._turns.values(), default=-patience)
        wanted, depth = self._coverage.starved(version - patience)
        if not (wanted or depth) or version < patience or version < last + patience:
            return None
        able = {p for p in range(num_clients) if depth <= self._capabilities[p].depth or p in self._tall}
        if len(able) > 1 and version < last + 2 * patience:
            able -= {p for p, turn in self._turns.items() if turn == last}
        ready = sorted(able & set(clients), key=lambda p: (self._turns.get(p, -1), -self._capabilities[p].rate, p))
        if not ready:
            return None
        pid = ready[0]
        self._turns[pid] = version
        own = self._capabilities[pid]
        capability = own if depth <= own.depth else self._tall[pid]
        return pid, covering_spec(self.layout, self._groups, capability, self._masks.of(pid), wanted)

    def _answers_a_merge(self) -> float:
        """How many clients a merge hears: of rounds that only a deadline closes, as many as it was so far."""
        loop, num_clients = self.loop, self.setting.job.num_clients
        if loop.quorum:
            return loop.quorum
        if loop.is_barrier:
            return min(bound or num_clients for bound in (loop.clients_per_round, loop.concurrency))
        return self.progress.num_merged / max(1, self.progress.global_version) or num_clients

    # --- merging -----------------------------------------------------------------------------------------------------

    def _client_weight(self, entry: Entry, report: Report, held: SubModelSpec, staleness: int) -> float:
        rule = self.config.client_weight
        if rule == "uniform":
            return 1.0
        if rule == "polynomial":
            return float(report.num_examples * (1 + staleness) ** -0.5)
        if rule == "samples":
            return self.weigh(report, staleness)
        now = self.present(held)
        step = l1_distance(now, report.state)
        drift = l1_distance(now, self.sent_state(entry, held)) if staleness else 0.0
        if rule == "published":
            weight = published_weight(step, self._capabilities[entry.partition_id].rate, drift)
        else:
            weight = co_s2p_weight(step, num_trained(report.state), drift)
        return max(weight, 1e-12)  # who changed nothing still counts as somebody who holds these entries

    def _missed_blocks(self, merged: AggregateResult) -> str:
        blocks = {self.layout.block_of(key) for key, holders in merged.holders.items() if float(holders.min()) == 0}
        names = {b: "the shared part" if b is None else self.layout.blocks[b].name for b in blocks}
        return ", ".join(names[b] for b in sorted(names, key=lambda b: -1 if b is None else b))
