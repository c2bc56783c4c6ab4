"""What merging costs: extract, validate and merge unequal sub-models of ResNet-18 (11,172,170 parameters).

Clients hold sub-models of width 1, 1/2, 1/4, 1/8 and 1/16 in equal parts, and every reply has values of its own. The
replies of a hundred clients would not fit into the memory that is allowed, so each is made when its turn comes,
outside the time that counts. Compared in the same run: plain contiguous slicing, without any check (``slicing``: the
floor), and scattering with numpy's index arrays into a full-size sum and a full-size count
(``numpy``: what one writes first).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.common import CpuTimer, finish, in_fresh_process, options, peak_bytes, print_table, settle, within
from pruning.cost import measure_costs
from pruning.extract import extract, selection, shapes_of
from pruning.groups import Layout
from pruning.merge import MaskedMean
from pruning.select import equal_widths, select_prefix, select_top
from pruning.spec import SubModelSpec
from strategies.answers import check_report
from wire.message import Report
from zoo import get_model

RATES = (1.0, 0.5, 0.25, 0.125, 0.0625)
CPU_BOUND_S = {"prefix": 0.8, "scattered": 1.6}
MEMORY_BOUND_MIB = 600
State = Mapping[str, Tensor]
Way = Callable[[State, Layout, Iterator[SubModelSpec], "Replies"], CpuTimer]


class Replies:
    """Makes replies one at a time: the sub-model plus noise of the client's own."""

    def __init__(self, seed: int, num_entries: int) -> None:
        self._noise = torch.randn(num_entries, generator=torch.Generator().manual_seed(seed)) * 0.01
        self._rng = np.random.default_rng(seed)

    def of(self, sub_state: State) -> dict[str, Tensor]:
        """One reply; all of its memory is new."""
        reply = {}
        for key, tensor in sub_state.items():
            start = int(self._rng.integers(0, self._noise.numel() - tensor.numel() + 1))
            noise = self._noise[start : start + tensor.numel()].view(tensor.shape)
            reply[key] = tensor + noise if tensor.is_floating_point() else tensor.clone()
        return reply


def specs(layout: Layout, kind: str, num_clients: int, seed: int) -> Iterator[SubModelSpec]:
    """One spec a client: the first units, or (``scattered``) units chosen by importances of the client's own."""
    rng = np.random.default_rng(seed)
    cost = measure_costs(get_model("resnet18")[0], layout, torch.zeros(1, 3, 32, 32))
    widths = [equal_widths(layout, cost, rate) for rate in RATES]
    for client in range(num_clients):
        mine = widths[client % len(RATES)]
        if kind == "prefix":
            yield select_prefix(layout, mine)
        else:
            yield select_top(layout, mine, {group.name: rng.random(group.size) for group in layout.groups})


def ours(state: State, layout: Layout, wanted: Iterator[SubModelSpec], replies: Replies) -> CpuTimer:
    """This project: every spec extracted once, every reply validated as in a run, streaming."""
    timer = CpuTimer()
    extracted: dict[SubModelSpec, dict[str, Tensor]] = {}
    with timer:
        mean = MaskedMean(state, layout)
    for spec in wanted:
        with timer:
            sub_state = extracted.get(spec)
            if sub_state is None:
                sub_state = extract(state, layout, spec)
                if len(extracted) < len(RATES):
                    extracted[spec] = sub_state
        reply = replies.of(sub_state)
        with timer:
            report = check_report(Report(0, 0, reply, 1), state, sub_state)
            mean.add(report.state, spec, 1.0)
        del report, reply, sub_state
    with timer:
        mean.finalize()
    return timer


def slicing(state: State, layout: Layout, wanted: Iterator[SubModelSpec], replies: Replies) -> CpuTimer:
    """Contiguous slices, counts for every entry, nothing checked; prefix specs only."""
    timer = CpuTimer()
    extracted: dict[SubModelSpec, tuple[dict[str, tuple[slice, ...]], dict[str, Tensor]]] = {}
    with timer:
        sums = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
        counts = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    for spec in wanted:
        with timer:
            if spec not in extracted:
                places = selection(layout, spec, shapes_of(state)).positions
                corner = {k: tuple(slice(None if p is None else len(p)) for p in kept) for k, kept in places.items()}
                extracted[spec] = corner, {key: state[key][index].clone() for key, index in corner.items()}
        corner, sub_state = extracted[spec]
        reply = replies.of(sub_state)
        with timer:
            for key, index in corner.items():
                sums[key][index] += reply[key]
                counts[key][index] += 1
        del reply
    with timer:
        for key, total in sums.items():
            torch.where(counts[key] > 0, total / counts[key], state[key])
    return timer


def numpy_scatter(state: State, layout: Layout, wanted: Iterator[SubModelSpec], replies: Replies) -> CpuTimer:
    """Index arrays into full-size float64 sums and counts, nothing checked."""
    timer = CpuTimer()
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    with timer:
        sums = {key: np.zeros(array.shape) for key, array in arrays.items()}
        counts = {key: np.zeros(array.shape) for key, array in arrays.items()}
    for spec in wanted:
        with timer:
            places = selection(layout, spec, shapes_of(state)).positions
            mesh = {
                key: np.ix_(*(np.arange(n) if p is None else p for p, n in zip(kept, arrays[key].shape, strict=True)))
                for key, kept in places.items()
            }
            sub_state = {key: torch.from_numpy(np.array(arrays[key][index])) for key, index in mesh.items()}
        reply = replies.of(sub_state)
        with timer:
            for key, index in mesh.items():
                sums[key][index] += reply[key].numpy()
                counts[key][index] += 1
        del reply, sub_state
    with timer:
        for key, total in sums.items():
            np.where(counts[key] > 0, total / np.maximum(counts[key], 1), arrays[key])
    return timer


WAYS: dict[str, Way] = {"ours": ours, "slicing": slicing, "numpy": numpy_scatter}


def measure(way: str, kind: str, num_clients: int, width: float, seed: int) -> dict[str, float]:
    """CPU seconds and peak memory of one merge; to be called in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, layout = get_model("resnet18", width=width)
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    if way == "slicing":
        state = {key: tensor for key, tensor in state.items() if tensor.is_floating_point()}
    replies = Replies(seed, max(tensor.numel() for tensor in state.values()))
    settle()
    timer = WAYS[way](state, layout, specs(layout, kind, num_clients, seed), replies)
    return {"cpu_s": timer.cpu_s, "peak_mib": peak_bytes() / 2**20}


def main() -> dict[str, Any]:
    """Run the benchmark."""
    arguments = options("merge", __doc__).parse_args()
    width, repeats, sizes = (0.125, 1, (10, 20)) if arguments.quick else (1.0, 3, (100, 1000))
    cases = [("ours", "prefix", sizes[0]), ("slicing", "prefix", sizes[0]), ("numpy", "prefix", sizes[0])]
    cases += [("ours", "scattered", sizes[0]), ("numpy", "scattered", sizes[0])]
    cases += [("ours", "prefix", sizes[1]), ("ours", "scattered", sizes[1])]
    runs: dict[tuple[str, str, int], list[dict[str, float]]] = {case: [] for case in cases}
    for repeat in range(repeats):  # in turn, so that a busy machine is busy for all
        for case in cases:
            if repeat == 0 or (case[0] != "numpy" and case[2] == sizes[0]):
                setting = (*case, width, arguments.seed + repeat)
                runs[case].append(measure(*setting) if arguments.quick else in_fresh_process(measure, *setting))
    rows: list[dict[str, Any]] = []
    for (way, kind, num_clients), measured in runs.items():
        cpu_s = statistics.median(run["cpu_s"] for run in measured)
        peak = max(run["peak_mib"] for run in measured)
        row = {"way": way, "units": kind, "clients": num_clients, "cpu_s": cpu_s, "peak_mib": peak}
        if way == "ours" and not arguments.quick:
            row |= {
                "bound": within(cpu_s, CPU_BOUND_S[kind] * num_clients / 100),
                "memory": within(peak, MEMORY_BOUND_MIB),
            }
        rows.append(row)
    print_table("extract + validate + merge, ResNet-18, widths 1 to 1/16 (CPU seconds, one thread)", rows)
    of = {(row["way"], row["units"], row["clients"]): row for row in rows}
    floor = of["slicing", "prefix", sizes[0]]["cpu_s"]
    ratios: dict[str, float] = {}
    for kind in ("prefix", "scattered"):
        mine = of["ours", kind, sizes[0]]["cpu_s"]
        ratios[f"{kind}_over_slicing"] = mine / floor
        ratios[f"numpy_over_{kind}"] = of["numpy", kind, sizes[0]]["cpu_s"] / mine
        ratios[f"{kind}_{sizes[1]}_over_{sizes[0]}_clients"] = of["ours", kind, sizes[1]]["cpu_s"] / mine
    print_table("ratios", [{"ratio": name, "value": value} for name, value in ratios.items()])
    return finish("merge", arguments, {"rows": rows, "ratios": ratios})


if __name__ == "__main__":
    main()
