"""What a pruning decision costs: learning the rates of 1,000 clients and selecting their sub-models of ResNet-50.

The first decision also ranks all units and tabulates the family of nested sub-models; the ones after it use that order.
Every client has a speed of its own, so hardly two get the same sub-model: the worst case for whatever is shared.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.common import CpuTimer, finish, options, print_table, settle, within
from pruning.cost import measure_costs
from pruning.importance import score_units
from pruning.rates import RateParams, RateState, record_time, update_rates
from pruning.select import NestedFamily, nested_family
from zoo import get_model

CPU_BOUND_MS = 100.0


def observe(state: RateState, speeds: np.ndarray, rng: np.random.Generator, num_rounds: int) -> RateState:
    """Time every client for ``num_rounds``: a part that shrinks with the model, a part that does not, 2 % noise."""
    for _ in range(num_rounds):
        for pid, speed in enumerate(speeds):
            ratio = state[pid].retention_ratio if pid in state else 1.0
            state = record_time(state, pid, float(speed * (0.1 + 0.9 * ratio) * np.exp(rng.normal(0, 0.02))))
    return state


def achievable_ratio(family: NestedFamily, floor: float, partition_id: int, ratio: float) -> float:
    """Ratio of the sub-model that a client asking for ``ratio`` would get."""
    return family.achievable(ratio, floor)


def main() -> dict[str, Any]:
    """Run the benchmark."""
    arguments = options("decide", __doc__).parse_args()
    num_clients, num_decisions, width = (50, 3, 0.125) if arguments.quick else (1000, 6, 1.0)
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    model, layout = get_model("resnet50", width=width)
    cost = measure_costs(model, layout, torch.zeros(1, 3, 32, 32))
    params, rng = RateParams(), np.random.default_rng(arguments.seed)
    speeds = np.linspace(1, 5, num_clients)
    state: RateState = {}
    family: NestedFamily | None = None
    floor = params.min_retention_ratio
    rows: list[dict[str, Any]] = []
    for decision in range(1, num_decisions + 1):
        observing, ordering, learning, selecting = (CpuTimer() for _ in range(4))
        with observing:
            state = observe(state, speeds, rng, params.min_timed_rounds)
        settle()
        if family is None:
            with ordering:
                family = nested_family(layout, cost, score_units(model.state_dict(), layout))
        with learning:
            state, decided = update_rates(state, params, partial(achievable_ratio, family, floor))
        with selecting:
            specs = {family.member(client.retention_ratio) for client in state.values()}
        parts = {"order": ordering, "rates": learning, "selection": selecting}
        row: dict[str, Any] = {"decision": decision, "changed": len(decided.changed), "sub_models": len(specs)}
        row |= {f"{name}_ms": 1e3 * timer.cpu_s for name, timer in parts.items()}
        row["total_ms"] = sum(1e3 * timer.cpu_s for timer in parts.values())
        row["observing_us_per_reply"] = 1e6 * observing.cpu_s / (num_clients * params.min_timed_rounds)
        rows.append(row)
    print_table(f"{num_clients} clients, ResNet-50: CPU milliseconds of a decision", rows)
    later = statistics.median(row["total_ms"] for row in rows[1:])
    worst = max(row["total_ms"] for row in rows)
    if not arguments.quick:
        print(f"\nmedian after the first {later:.3g} ms; worst {worst:.3g} ms: {within(worst, CPU_BOUND_MS)} ms")
    return finish("decide", arguments, {"rows": rows, "median_later_ms": later, "worst_ms": worst})


if __name__ == "__main__":
    main()
