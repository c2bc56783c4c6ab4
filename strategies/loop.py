"""The one event loop's settings: who is asked, when a merge happens, and with what weight. Three independent choices.

FedAsync, FedBuff, SSP, DC-ASGD and plain semi-asynchronous training are points of this space, so each of them goes with
every sub-model method: ``strategy=heterofl loop.preset=fedbuff``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

from wire.flat import ConfigError, kebab, refuse, require, require_choice


@dataclass(frozen=True)
class LoopConfig:
    """Who is asked, when a round closes, and what late answers count.

    Attributes
    ----------
    preset : a method whose loop this is: it sets what its own table says, the other keys keep their meaning.
    ask : ``at-merge`` (free clients are asked at the start of a round) or ``on-arrival`` (also as soon as somebody has
        answered, so that nobody waits for the others' round to close).
    clients_per_round : free clients asked at the start of a round; 0 for all.
    concurrency : requests under way at once; 0 for no bound.
    max_lead : answers that a client may be ahead of the slowest and still be asked (the s of SSP); -1 for no bound.
    quorum : close the round at this many merged answers; 0 waits for everybody.
    deadline_s : or after this long with at least one; 0 for none.
    max_staleness : answers older than this many global versions are dropped; -1 for no bound.
    staleness : factor of an answer s versions old: ``constant``, ``polynomial:A`` ((1 + s)^-A) or ``hinge:A:B``
        (1 while s <= B, then 1 / (A (s - B) + 1)) (Xie et al. 2019, section 5.2).
    staleness_scales : what the factor scales: the answer's ``weight`` among the others of its merge, where a lone
        answer counts in full however old it is, or its ``step`` away from the present model, where it does not.
    client_weight : ``examples``, or ``equal`` for all.
    merge_as : an answer that may be stale is merged as the ``steps`` its client made, or as its ``values``.
    mixing_rate : share of the merge that the global model takes over; for steps, the server's learning rate.
    compensation : lambda of the delay compensation (Zheng et al. 2017); 0 for none.
    compensation_momentum : of its mean square.
    max_empty_rounds : stop after this many rounds in a row without a usable answer.
    """

    preset: str = ""
    ask: str = "at-merge"
    clients_per_round: int = 0
    concurrency: int = 0
    max_lead: int = -1
    quorum: int = 0
    deadline_s: float = 0.0
    max_staleness: int = 0
    staleness: str = "constant"
    staleness_scales: str = "weight"
    client_weight: str = "examples"
    merge_as: str = "steps"
    mixing_rate: float = 1.0
    compensation: float = 0.0
    compensation_momentum: float = 0.95
    max_empty_rounds: int = 3

    def __post_init__(self) -> None:
        """Check every range."""
        for key in ("clients_per_round", "concurrency", "quorum", "deadline_s", "compensation"):
            require(getattr(self, key) >= 0, kebab(key), getattr(self, key), ">= 0")
        for key in ("max_lead", "max_staleness"):
            require(getattr(self, key) >= -1, kebab(key), getattr(self, key), ">= 0, or -1 for no bound")
        require(self.mixing_rate > 0, "mixing-rate", self.mixing_rate, "> 0")
        require(0 <= self.compensation_momentum < 1, "compensation-momentum", self.compensation_momentum, "in [0, 1)")
        require(self.max_empty_rounds >= 1, "max-empty-rounds", self.max_empty_rounds, ">= 1")
        require_choice("ask", self.ask, ("at-merge", "on-arrival"))
        require_choice("staleness-scales", self.staleness_scales, ("weight", "step"))
        require_choice("client-weight", self.client_weight, ("examples", "equal"))
        require_choice("merge-as", self.merge_as, ("steps", "values"))
        staleness_weight(self.staleness, 0)

    def check(self, num_clients: int, always_steps: str = "") -> None:
        """Refuse settings that contradict each other.

        Parameters
        ----------
        num_clients : that take part.
        always_steps : what makes every answer a step, if anything does.

        Raises
        ------
        ConfigError
            With the keys, the reason and the remedy.
        """
        self._check_rounds_close(num_clients)
        self._check_weights_mean_something()
        refuse(
            self.merge_as == "values" and bool(always_steps),
            f"loop.merge-as=values with {always_steps}",
            "its answers are steps; use loop.merge-as=steps",
        )

    def _check_rounds_close(self, num_clients: int) -> None:
        if self.is_barrier:
            needs = "needs rounds that close before everybody has answered; set loop.quorum or loop.deadline-s"
            refuse(self.ask == "on-arrival", "loop.ask=on-arrival", needs)
            refuse(self.max_lead >= 0, f"loop.max-lead={self.max_lead}", f"a bound on leads {needs}")
        if self.ask == "on-arrival":
            refuse(
                self.clients_per_round > 0,
                f"loop.clients-per-round={self.clients_per_round} with loop.ask=on-arrival",
                "clients are not asked by the round then; bound how many are at work with loop.concurrency",
            )
            return
        never = "a round would never reach its quorum"
        refuse(
            self.quorum > num_clients, f"loop.quorum={self.quorum}", f"only {num_clients} clients take part; {never}"
        )
        for key, bound in (
            ("loop.clients-per-round", self.clients_per_round),
            ("loop.concurrency", self.concurrency),
        ):
            refuse(
                0 < bound < self.quorum,
                f"loop.quorum={self.quorum} with {key}={bound}",
                f"{never}; raise {key}, or set loop.quorum to at most {bound}",
            )

    def _check_weights_mean_something(self) -> None:
        if self.max_staleness == 0:
            never = (
                "has no effect while loop.max-staleness=0 drops every answer that is late; raise it, or set it to -1"
            )
            refuse(self.staleness != "constant", f"loop.staleness={self.staleness}", never)
            refuse(self.compensation > 0, f"loop.compensation={self.compensation:g}", never)
        if self.merge_as == "values":
            refuse(
                self.mixing_rate > 1, f"loop.mixing-rate={self.mixing_rate:g} with loop.merge-as=values", "at most 1"
            )
            refuse(
                self.compensation > 0,
                f"loop.compensation={self.compensation:g} with loop.merge-as=values",
                "only steps can be compensated; use loop.merge-as=steps",
            )
            refuse(
                self.max_staleness != 0 and self.mixing_rate == 1 and self.staleness == "constant",
                "loop.merge-as=values with loop.mixing-rate=1 and loop.staleness=constant",
                "stale weights would replace newer ones; lower loop.mixing-rate, or use loop.merge-as=steps",
            )

    @property
    def is_barrier(self) -> bool:
        """Whether every round waits for everybody it asked."""
        return self.quorum == 0 and self.deadline_s == 0

    def deadline_of(self, start_s: float) -> float:
        """When a round that began at ``start_s`` closes, if something has arrived by then; infinite for never."""
        return start_s + self.deadline_s if self.deadline_s else math.inf

    def is_closed(self, num_merged: int, start_s: float, now_s: float) -> bool:
        """Whether a round that began at ``start_s`` has what it waited for; a barrier's closes by itself."""
        return 0 < self.quorum <= num_merged or (num_merged > 0 and now_s >= self.deadline_of(start_s))

    def is_too_old(self, staleness: int) -> bool:
        """Whether an answer of this staleness is dropped."""
        return 0 <= self.max_staleness < staleness

    def weight(self, num_examples: float, staleness: int) -> float:
        """An answer's weight among those of its merge."""
        return (float(num_examples) if self.client_weight == "examples" else 1.0) * self.weight_scale(staleness)

    def weight_scale(self, staleness: int) -> float:
        """What an answer's age makes of its weight among those of its merge."""
        return staleness_weight(self.staleness, staleness) if self.staleness_scales == "weight" else 1.0

    def step_scale(self, staleness: int) -> float:
        """The share of an answer's step that counts, before it is averaged with others."""
        return staleness_weight(self.staleness, staleness) if self.staleness_scales == "step" else 1.0


def staleness_weight(rule: str, staleness: int) -> float:
    """Factor of an answer ``staleness`` versions old under a rule of ``LoopConfig.staleness``."""
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


def quorum_of(ratio: float, num_clients: int) -> int:
    """The fewest clients that are at least ``ratio`` of all, at least one unless the ratio is 0."""
    return max(int(ratio > 0), math.ceil(ratio * num_clients - 1e-9))  # 0.07 * 100 is a little more than 7


class LoopRule(Protocol):
    """Settings of a method that is a way to run the loop: it goes with every method that says what is trained."""

    def loop_settings(self, num_clients: int) -> dict[str, Any]:
        """Fields of ``LoopConfig`` that the rule sets, and their values."""


def has_own_loop(method: Any) -> bool:
    """Whether a method (a class of ``strategies.STRATEGIES``) is a ``LoopRule``."""
    return hasattr(method.Config, "loop_settings")


def in_force(loop: LoopConfig, name: str, rule: LoopRule, num_clients: int) -> LoopConfig:
    """The loop under a rule; what the rule does not set stays as it is.

    Parameters
    ----------
    name : of the rule, for ``loop.preset`` and for people.

    Raises
    ------
    ConfigError
        If another rule is asked for, or a setting that is neither the default nor the rule's.
    """
    refuse(loop.preset not in ("", name), f"loop.preset={loop.preset} with strategy={name}", f"{name} has its own loop")
    settings = rule.loop_settings(num_clients)
    plain = LoopConfig()
    for field, value in settings.items():
        given = getattr(loop, field)
        refuse(
            given not in (getattr(plain, field), value),
            f"loop.{kebab(field)}={given}",
            f"{name} sets it to {value}; change {name}.* instead, or leave {name} and set every loop.* key",
        )
    return replace(loop, preset=name, **settings)
