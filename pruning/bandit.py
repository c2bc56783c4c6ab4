"""Pruning rates by a bandit: FedMP's E-UCB, a rate learner that tries rates instead of inverting a time curve.

FedMP (Jiang et al. 2022) gives every client an agent of its own. Its arms are all rates in [0, max): a tree cuts
the interval into regions; each region has an upper confidence bound from the discounted rewards of the rates tried in
it; the next rate is drawn from the region with the highest bound, and a region that was tried is split there, until
regions are as narrow as the granularity. The reward of a rate is the loss decrease it brought per distance of the
client's update time from the mean of all: rates that make everybody equally fast are worth most. What is ours (bounded
rewards, the floor of the distance, defaults): docs/fidelity.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

MAX_TRIALS = 512
"""Trials an agent remembers; older ones are discounted to nothing anyway."""


class BanditError(ValueError):
    """A setting of the bandit is out of range."""


@dataclass(frozen=True)
class BanditParams:
    """Knobs of the agents.

    Attributes
    ----------
    max_pruning_rate : rates lie in [0, this).
    granularity : regions at most this wide are not split any more.
    discount : of a reward per further trial of the same client, in (0, 1]: devices change.
    exploration : xi of the padding ``sqrt(xi log n / n_j)``. UCB1 has 2; rewards here have a sharp peak and a low mean,
        and an agent gets one trial a round: with 2 it does not learn in 400 rounds (docs/decisions/0011).
    min_gap : least distance from the mean update time that a reward is divided by, as a share of the mean.
    """

    max_pruning_rate: float = 0.8
    granularity: float = 0.1
    discount: float = 0.995
    exploration: float = 0.02
    min_gap: float = 0.05

    def __post_init__(self) -> None:
        """Check every range."""
        checks = {
            "max-pruning-rate": (self.max_pruning_rate, 0 <= self.max_pruning_rate < 1, "in [0, 1)"),
            "granularity": (self.granularity, 0 < self.granularity <= 1, "in (0, 1]"),
            "discount": (self.discount, 0 < self.discount <= 1, "in (0, 1]"),
            "exploration": (self.exploration, self.exploration >= 0, ">= 0"),
            "min-gap": (self.min_gap, 0 < self.min_gap <= 1, "in (0, 1]"),
        }
        for name, (value, is_good, expected) in checks.items():
            if not is_good:
                raise BanditError(f"{name}: got {value}, expected a value {expected}")


@dataclass(frozen=True)
class RateAgent:
    """One client's agent.

    Attributes
    ----------
    edges : where regions meet, from 0 to the largest rate; region j is [edges[j], edges[j + 1]).
    trials : (rate, reward) pairs, oldest first.
    """

    edges: tuple[float, ...]
    trials: tuple[tuple[float, float], ...] = ()


def new_agent(params: BanditParams) -> RateAgent:
    """An agent that knows nothing: one region."""
    return RateAgent((0.0, params.max_pruning_rate))


def region_bounds(agent: RateAgent, params: BanditParams) -> list[float]:
    """Upper confidence bound of every region; infinite where nothing was tried.

    ``n_j = sum_s lambda^(k - s) [rate_s in region j]``, ``R_j`` the mean of its rewards under the same weights, divided
    by the largest discounted reward and at most 1; ``U_j = R_j + sqrt(xi log(sum_j n_j) / n_j)``.
    """
    trials = [(rate, worth, params.discount**age) for age, (rate, worth) in enumerate(reversed(agent.trials))]
    scale = max((share * worth for _, worth, share in trials), default=0.0) or 1.0  # losses fall ever less: it fades
    counts, sums = [0.0] * (len(agent.edges) - 1), [0.0] * (len(agent.edges) - 1)
    for rate, worth, share in trials:
        region = region_of(agent, rate)
        counts[region] += share
        sums[region] += share * min(1.0, worth / scale)
    padding = params.exploration * math.log(max(1.0, sum(counts)))
    return [s / n + math.sqrt(padding / n) if n else math.inf for n, s in zip(counts, sums, strict=True)]


def region_of(agent: RateAgent, rate: float) -> int:
    """Index of the region that holds ``rate``."""
    inner = agent.edges[1:-1]
    return int(np.searchsorted(inner, rate, side="right"))


def choose_rate(agent: RateAgent, params: BanditParams, rng: np.random.Generator) -> float:
    """A rate drawn uniformly from the region with the highest bound; the lowest rates of several."""
    bounds = region_bounds(agent, params)
    best = bounds.index(max(bounds))
    return float(rng.uniform(agent.edges[best], agent.edges[best + 1]))


def learn(agent: RateAgent, params: BanditParams, rate: float, reward: float) -> RateAgent:
    """The agent after one more trial; its region is split at ``rate``, unless it or a part of it is too narrow."""
    trials = (*agent.trials, (rate, reward))[-MAX_TRIALS:]
    region = region_of(agent, rate)
    low, high = agent.edges[region], agent.edges[region + 1]
    if high - low <= params.granularity or min(rate - low, high - rate) < params.granularity / 10:
        return replace(agent, trials=trials)
    return RateAgent((*agent.edges[: region + 1], rate, *agent.edges[region + 1 :]), trials)


def reward(loss_decrease: float, update_time_s: float, mean_time_s: float, params: BanditParams) -> float:
    """What a trial was worth: ``max(0, loss decrease) / max(|T_i - mean T|, min_gap * mean T)``, per second.

    Parameters
    ----------
    loss_decrease : of the client's loss since its last answer.
    update_time_s, mean_time_s : of the client, and over all clients; > 0.
    """
    gap_s = max(abs(update_time_s - mean_time_s), params.min_gap * mean_time_s)
    return max(0.0, loss_decrease) / gap_s
