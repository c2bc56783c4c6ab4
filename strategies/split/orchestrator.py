"""Who may upload: AdaSplit's bandit and its alternatives, as pure functions (state, losses) -> (state, chosen).

UCB (Auer et al. 2002) over discounted sums, as in AdaSplit (arXiv 2112.01637, the orchestrator's advantage function):
with L_i the loss of client i and S_i whether it was served, both per decision t,

    l_i = sum_t' gamma^(t - t') L_i(t'),   c_i = sum_t' gamma^(t - t') S_i(t'),
    score_i = l_i / c_i + sqrt(2 ln t / c_i)

and the loss of a client that was not served is imputed as the mean of its last two values, the first two being 100.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np

FIRST_LOSS = 100.0


@dataclass(frozen=True)
class Arm:
    """What is known of one client.

    Attributes
    ----------
    loss_sum, serve_count : discounted, l and c.
    last, before : its last two losses, seen or imputed.
    is_new : never served.
    chosen_at : number of the decision that chose it last, 0 for never.
    """

    loss_sum: float = 0.0
    serve_count: float = 0.0
    last: float = FIRST_LOSS
    before: float = FIRST_LOSS
    is_new: bool = True
    chosen_at: int = 0


@dataclass(frozen=True)
class Orchestrator:
    """State of the selection.

    Attributes
    ----------
    num_decisions : so far.
    arms : partition id -> what is known of it.
    """

    num_decisions: int = 0
    arms: Mapping[int, Arm] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        arms = {str(pid): astuple(a) for pid, a in self.arms.items()}
        return {"num_decisions": self.num_decisions, "arms": arms}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Orchestrator:
        """Inverse of ``to_json``."""
        return cls(raw["num_decisions"], {int(pid): Arm(*values) for pid, values in raw["arms"].items()})


def update_arm(arm: Arm, loss: float | None, gamma: float) -> Arm:
    """Discount one decision and add the next: ``loss`` of a served client, None of one that was not."""
    value = (arm.last + arm.before) / 2 if loss is None else loss
    return Arm(
        gamma * arm.loss_sum + value,
        gamma * arm.serve_count + (loss is not None),
        value,
        arm.last,
        arm.is_new and loss is None,
        arm.chosen_at,
    )


def score(arm: Arm, num_decisions: int) -> float:
    """The advantage of choosing this client now; infinite for one never served."""
    if arm.is_new:
        return math.inf
    # A client left out for very long has a count of nearly zero; it must not overflow.
    count = max(arm.serve_count, 1e-12)
    return arm.loss_sum / count + math.sqrt(2 * math.log(max(1, num_decisions)) / count)


def choose(
    kind: str,
    state: Orchestrator,
    losses: Mapping[int, float],
    clients: Sequence[int],
    num_chosen: int,
    gamma: float = 0.87,
    seed: int = 0,
) -> tuple[Orchestrator, tuple[int, ...]]:
    """Take in the losses since the last decision and choose who is served next.

    Parameters
    ----------
    kind : ``ucb``, ``random``, ``round-robin`` or ``all``.
    losses : of the clients whose uploads were used since; the others count as not served (one that died between grant
        and upload among them).
    clients : who can be chosen now.
    num_chosen : how many, at most.
    gamma : discount in (0, 1].
    seed : of ties and random choices.

    Returns
    -------
    state, chosen
        ``chosen`` is sorted.
    """
    everybody = sorted({*state.arms, *clients, *losses})
    arms = dict(state.arms)
    if state.num_decisions:
        arms |= {pid: update_arm(arms.get(pid, Arm()), losses.get(pid), gamma) for pid in everybody}
    else:
        arms |= {pid: arms.get(pid, Arm()) for pid in everybody}
    now = Orchestrator(state.num_decisions + 1, arms)
    rng = np.random.default_rng((seed, now.num_decisions))
    ranked = SELECTIONS[kind](now, sorted(clients), rng)
    chosen = ranked if kind == "all" else ranked[:num_chosen]
    arms |= {pid: replace(arms[pid], chosen_at=now.num_decisions) for pid in chosen}
    return replace(now, arms=arms), tuple(sorted(chosen))


def _ucb(state: Orchestrator, clients: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Whoever has the highest score; among those never served, the ones chosen a decision ago come last.

    A pipelined server's losses come one decision late: such an arm has only not been heard yet.
    """
    ties = rng.permutation(len(clients))
    keyed = []
    for pid, tie in zip(clients, ties, strict=True):
        arm = state.arms[pid]
        is_awaited = arm.is_new and 0 < arm.chosen_at == state.num_decisions - 1
        keyed.append((-score(arm, state.num_decisions), is_awaited, int(tie), pid))
    return [key[-1] for key in sorted(keyed)]


def _random(state: Orchestrator, clients: Sequence[int], rng: np.random.Generator) -> list[int]:
    return [int(pid) for pid in rng.permutation(list(clients))]


def _round_robin(state: Orchestrator, clients: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Whoever was chosen longest ago."""
    return sorted(clients, key=lambda pid: (state.arms[pid].chosen_at, pid))


def _all(state: Orchestrator, clients: Sequence[int], rng: np.random.Generator) -> list[int]:
    return list(clients)


SELECTIONS: Mapping[str, Callable[[Orchestrator, Sequence[int], np.random.Generator], list[int]]] = {
    "ucb": _ucb,
    "random": _random,
    "round-robin": _round_robin,
    "all": _all,
}
"""Rule -> (state, clients, generator) -> clients, best first."""


def num_granted(eta: float, num_clients: int) -> int:
    """How many may upload per decision: k = max(1, round(eta N)), halves upwards."""
    return max(1, math.floor(eta * num_clients + 0.5 + 1e-9))  # .58 of 25 is 14.5, and 14.499999999999998
