"""Pruned-rate learning: which retention ratio makes a client as fast as the reference, from update times alone.

AdaptCL (Zhou et al. 2021, arXiv 2106.14126) learns the ratio without knowing what a device can do. The update time is
an unknown falling function of the retention ratio gamma; its inverse is interpolated with Newton's divided differences
through the points (update time, gamma) seen so far and read at the reference's update time. The guards around it are
ours (docs/fidelity.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median


class RateError(ValueError):
    """A setting of the rate learner is out of range, or an update time is not positive."""


@dataclass(frozen=True)
class RateParams:
    """Knobs of the rate learner.

    Attributes
    ----------
    alpha : step of the first, linear rule, in (0, 1].
    max_step : largest relative cut of one decision (rho-max), in (0, 1).
    min_step : smaller cuts are not made (rho-min).
    min_retention_ratio : floor of every client (gamma-min).
    dead_band : a client this much slower than the target, relatively, is left alone; before its first cut up to three
        times as much, while few rounds have been timed.
    slack : target = (1 + slack) * the reference's update time.
    min_timed_rounds : rounds a client must have been timed since its last change. Early decisions pay, since every
        round before the first runs at full cost; where times scatter by 10 % rather than 2 %, take 3 or more.
    regrow : widen a client again that has become faster than the target.
    direction : ``prune`` (the paper's): everybody starts whole, and the slower ones are cut until they are as fast as
        the fastest. ``grow`` (ours): everybody starts at the floor, and the faster ones grow until they take as long
        as the slowest; a round then takes no longer than the smallest model everywhere would. ``hold`` (ours):
        everybody stays at the floor.
    spare_time : what a client does with the time that the target leaves it once its ratio is settled: ``idle`` (the
        paper's), or ``work``: train longer.
    max_work_ratio : most local work, as a multiple of the run's local epochs.
    """

    alpha: float = 1.0
    max_step: float = 0.8
    min_step: float = 0.02
    min_retention_ratio: float = 0.2
    dead_band: float = 0.05
    slack: float = 0.0
    min_timed_rounds: int = 2
    regrow: bool = False
    direction: str = "prune"
    spare_time: str = "idle"
    max_work_ratio: float = 5.0

    def __post_init__(self) -> None:
        """Check every range."""
        checks = {
            "alpha": (self.alpha, 0 < self.alpha <= 1, "in (0, 1]"),
            "max-step": (self.max_step, 0 < self.max_step < 1, "in (0, 1)"),
            "min-step": (self.min_step, 0 <= self.min_step <= self.max_step, "between 0 and max-step"),
            "min-retention-ratio": (self.min_retention_ratio, 0 < self.min_retention_ratio <= 1, "in (0, 1]"),
            "dead-band": (self.dead_band, 0 <= self.dead_band < 1, "in [0, 1)"),
            "slack": (self.slack, self.slack >= 0, ">= 0"),
            "direction": (self.direction, self.direction in ("prune", "grow", "hold"), "'prune', 'grow' or 'hold'"),
            "spare-time": (self.spare_time, self.spare_time in ("idle", "work"), "'idle' or 'work'"),
            "max-work-ratio": (self.max_work_ratio, self.max_work_ratio >= 1, ">= 1"),
            "min-timed-rounds": (self.min_timed_rounds, self.min_timed_rounds >= 1, ">= 1"),
        }
        for name, (value, is_good, expected) in checks.items():
            if not is_good:
                raise RateError(f"{name}: got {value}, expected a value {expected}")


@dataclass(frozen=True)
class ClientRate:
    """What is known about one client.

    Attributes
    ----------
    retention_ratio : gamma in force.
    times_s : update times since gamma or the work ratio last changed, oldest first.
    history : (update time in seconds, gamma) points of earlier ratios, oldest first.
    is_floored : pruning it further was given up: its update time has a part that does not shrink.
    work_ratio : local work in force, as a multiple of the run's local epochs; above 1 only once gamma is settled.
    """

    retention_ratio: float = 1.0
    times_s: tuple[float, ...] = ()
    history: tuple[tuple[float, float], ...] = ()
    is_floored: bool = False
    work_ratio: float = 1.0

    @property
    def update_time_s(self) -> float:
        """Median since gamma last changed, without the first round (allocation, cold caches)."""
        return median(self.times_s[1:] or self.times_s)


RateState = Mapping[int, ClientRate]
"""Partition id -> what is known about it; a client never seen starts at ratio 1."""


@dataclass(frozen=True)
class RateDecision:
    """What one decision saw and did.

    Attributes
    ----------
    reference : partition id of the reference client; None if nobody has been timed yet.
    target_s : update time that everybody should reach.
    update_times_s : partition id -> median update time it was based on.
    changed : clients with a new retention ratio.
    newly_floored : clients whose pruning was given up in this decision.
    """

    reference: int | None
    target_s: float
    update_times_s: Mapping[int, float]
    changed: tuple[int, ...]
    newly_floored: tuple[int, ...]


def record_time(
    state: RateState, partition_id: int, update_time_s: float, first_ratio: float = 1.0, work_ratio: float = 1.0
) -> dict[int, ClientRate]:
    """Note one client's update time of one round; a client not seen before is held to have ``first_ratio``.

    A time that belongs to another amount of work than the one in force says nothing and is left out.

    Raises
    ------
    RateError
        If the time is not positive and finite.
    """
    if not 0 < update_time_s < float("inf"):
        raise RateError(f"client {partition_id}: update time must be positive and finite, got {update_time_s}")
    client = state.get(partition_id, ClientRate(first_ratio))
    if work_ratio != client.work_ratio:
        return dict(state)
    return {**state, partition_id: replace(client, times_s=(*client.times_s, update_time_s)[-64:])}


def update_rates(
    state: RateState, params: RateParams, achievable: Callable[[int, float], float] = lambda client, ratio: ratio
) -> tuple[dict[int, ClientRate], RateDecision]:
    """One pruning decision: (state, what was observed in it) -> (state, decision).

    ``achievable(client, ratio)`` is the ratio of the sub-model that a client would really get. Widths are whole
    numbers, often of eights; a learner that believes in the ratio it asked for runs after its own rounding.

    The reference is the fastest client *that is still unpruned*: with the minimum over all, timing noise and one-way
    pruning would ratchet everybody down. When growing it is the slowest client that is still at the
    floor and has been timed often enough.
    """
    timed = {pid: client for pid, client in sorted(state.items()) if client.times_s}
    if not timed:
        return dict(state), RateDecision(None, 0.0, {}, (), ())
    reference = _reference(timed, params)
    target_s = (1 + params.slack) * timed[reference].update_time_s
    updated, changed, floored = dict(state), [], []
    for pid, client in timed.items():
        if pid == reference or len(client.times_s) < params.min_timed_rounds:
            continue
        phi = client.update_time_s
        if client.work_ratio > 1:
            updated[pid] = _with_work(client, phi, target_s, params)
            continue
        history = _with_point(client.history, (phi, client.retention_ratio))
        is_noise = client.retention_ratio >= 1 and phi <= (1 + _first_band(client, params)) * target_s
        ratio = 1.0 if is_noise else _next_ratio(client.retention_ratio, phi, target_s, history, params)
        ratio = client.retention_ratio if ratio == client.retention_ratio else achievable(pid, ratio)
        if ratio != client.retention_ratio:
            updated[pid] = ClientRate(ratio, (), history)
            changed.append(pid)
            continue
        band = 0.0 if client.is_floored else params.dead_band  # around one bound noise would warn again and again
        at_floor = client.retention_ratio <= params.min_retention_ratio and phi > (1 + band) * target_s
        updated[pid] = _with_work(replace(client, history=history, is_floored=at_floor), phi, target_s, params)
        if at_floor and not client.is_floored:
            floored.append(pid)
    times = {pid: client.update_time_s for pid, client in timed.items()}
    return updated, RateDecision(reference, target_s, times, tuple(changed), tuple(floored))


def fill_time(work_ratio: float, update_time_s: float, target_s: float, max_work_ratio: float) -> float:
    """Local work that fills the time up to the target.

    An update takes a + b w: a (links, start-up) does not grow with the work w. From w and its time the next guess is
    w target / time, a lower bound where time <= target, so that repeated guesses rise to the target from below.
    """
    return min(max_work_ratio, max(1.0, work_ratio * target_s / update_time_s))


def _first_band(client: ClientRate, params: RateParams) -> float:
    """The dead band of a client that is still whole: wider, the fewer times its median rests on.

    Its first cut is for good, and the reference is the fastest of all: among equals one sample each would cut somebody
    sooner or later.
    """
    return params.dead_band * (1 + 2 / max(1, len(client.times_s) - 1))


def _with_work(client: ClientRate, phi: float, target_s: float, params: RateParams) -> ClientRate:
    """The client with the work that fits its time; changes within the dead band are not made.

    But a client that works only a little longer and has become slow goes back to plain work: until then it is not
    pruned.
    """
    if params.spare_time == "idle":
        return client
    work_ratio = fill_time(client.work_ratio, phi, target_s, params.max_work_ratio)
    is_given_up = work_ratio == 1 < client.work_ratio and phi > (1 + params.dead_band) * target_s
    if abs(work_ratio / client.work_ratio - 1) <= params.dead_band and not is_given_up:
        return client
    return replace(client, work_ratio=work_ratio, times_s=())


def _reference(timed: RateState, params: RateParams) -> int:
    timed = {pid: client for pid, client in timed.items() if client.work_ratio == 1} or timed
    if params.direction != "prune":
        floored = [pid for pid, client in timed.items() if client.retention_ratio <= params.min_retention_ratio]
        # One round, the first and so with all it allocates, must not pass for the slowest device's.
        sure = [pid for pid in floored if len(timed[pid].times_s) >= params.min_timed_rounds]
        return max(sure or floored or timed, key=lambda pid: (timed[pid].update_time_s, -pid))
    unpruned = [pid for pid, client in timed.items() if client.retention_ratio >= 1.0]
    return min(unpruned or timed, key=lambda pid: (timed[pid].update_time_s, pid))


def _next_ratio(
    gamma: float, phi: float, target_s: float, history: Sequence[tuple[float, float]], params: RateParams
) -> float:
    """Next retention ratio of one client; ``gamma`` itself means no change."""
    if params.direction == "hold":
        return gamma
    if phi <= (1 + params.dead_band) * target_s:
        may_grow = params.regrow or params.direction == "grow"
        if may_grow and gamma < 1 and phi < (1 - params.dead_band) * target_s:
            guess = newton_ratio(history[-2:], target_s) if len(history) > 1 else gamma * target_s / phi
            guess = guess if guess > gamma else gamma * target_s / phi
            grown = min(1.0, guess, gamma / (1 - params.max_step))
            return grown if grown >= gamma * (1 + params.min_step) else gamma
        return gamma
    if len(history) < 2:
        step = params.alpha * (phi - target_s) / phi
    else:
        guess = newton_ratio(history[-3:], target_s)
        if not 0 < guess < gamma:
            guess = newton_ratio(history[-2:], target_s)
        if not 0 < guess < gamma:
            guess = gamma * target_s / phi
        step = 1 - guess / gamma
    step = min(step, params.max_step)
    if step < params.min_step:
        return gamma
    return max(params.min_retention_ratio, gamma * (1 - step)) if gamma > params.min_retention_ratio else gamma


def newton_ratio(points: Sequence[tuple[float, float]], phi: float) -> float:
    """Newton's divided-difference polynomial through ``points`` (update time, gamma), read at ``phi``.

    ``gamma(phi) = g[0] + g[0,1] (phi - phi_0) + g[0,1,2] (phi - phi_0)(phi - phi_1) + ...``
    """
    times = [time for time, _ in points]
    table = [gamma for _, gamma in points]
    value, product = table[0], 1.0
    for order in range(1, len(points)):
        table = [
            (table[i + 1] - table[i]) / (times[i + order] - times[i]) if times[i + order] != times[i] else float("nan")
            for i in range(len(points) - order)
        ]
        product *= phi - times[order - 1]
        value += table[0] * product
    return value


def _with_point(history: Sequence[tuple[float, float]], point: tuple[float, float]) -> tuple[tuple[float, float], ...]:
    """Append a point; one with the same gamma, or an update time within 1 %, is replaced by the newer."""
    phi, gamma = point
    kept = [(p, g) for p, g in history if g != gamma and abs(p - phi) > 0.01 * phi]
    return (*kept, point)
