"""What the engine costs: CPU per trivial client and round, everything included but training.

A client adds one to a model of two small tensors. What is counted is all the rest: planning, instructions, ledger,
virtual clock, validation, merge and event log; one row has a checkpoint after each round as well. ``--grid`` also
measures Flower's simulation engine with the same client (half a minute: it starts Ray).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from torch import nn

from bench.common import finish, in_fresh_process, options, peak_bytes, print_table, settle, within
from fleet.clock import DurationModel
from fleet.fleet import make_fleet
from pruning.cost import measure_costs
from pruning.groups import Axis, Group, Layout
from server_app.checkpoint import save_checkpoint
from server_app.event_log import EventLog
from strategies.base import SubModelStrategy
from strategies.exchange import Transport
from strategies.fedavg import FedAvg, FedAvgConfig
from strategies.setting import Listener, Progress, Setting
from wire.grid import record_to_instruction, report_to_record
from wire.local import LocalTransport
from wire.message import DataConfig, Instruction, Job, ModelConfig, Report, TrainConfig
from wire.roster import partition_record

CPU_BOUND_MS = 0.5
Keep = Callable[[Progress, dict[str, Any]], None]
LAYOUT = Layout((Group("outputs", 10, (Axis("weight", 0), Axis("bias", 0)), exact=False),))


def handle(instruction: Instruction) -> Report:
    """The trivial client: every value plus one."""
    state = {key: tensor + 1 for key, tensor in instruction.state.items()}
    return Report(instruction.dispatch, instruction.partition_id, state, 10, (1,) * 10, train_macs=1e6)


def make_strategy(num_clients: int, num_rounds: int, listen: Listener, keep: Keep) -> SubModelStrategy:
    """FedAvg over a fleet on the virtual clock."""
    model = nn.Linear(10, 10)
    setting = Setting(
        job=Job(ModelConfig(), DataConfig(), TrainConfig(), num_clients, num_rounds, seed=0),
        layout=LAYOUT,
        cost=measure_costs(model, LAYOUT, torch.zeros(1, 10)),
        durations=DurationModel(make_fleet("linear:5", num_clients, seed=0), seed=0),
    )
    return FedAvg(FedAvgConfig(), setting, listen, keep)


def run(transport: Transport | Grid, num_clients: int, num_rounds: int, saves: bool = False) -> dict[str, float]:
    """CPU and wall milliseconds per client and round, and how much the memory peak rose from the second round on."""
    peaks: list[int] = []
    with tempfile.TemporaryDirectory() as folder, EventLog(Path(folder) / "events.jsonl") as log:

        def keep(progress: Progress, own: dict[str, Any]) -> None:
            if saves:
                save_checkpoint(Path(folder), progress, own, {}, log.num_rows, 2)
            peaks.append(peak_bytes())

        strategy = make_strategy(num_clients, num_rounds, log.write, keep)
        initial = ArrayRecord(nn.Linear(10, 10).state_dict())
        settle()
        cpu_began, wall_began = time.process_time(), time.perf_counter()
        strategy.start(transport, initial, num_rounds)
        cpu_s, wall_s = time.process_time() - cpu_began, time.perf_counter() - wall_began
    if strategy.progress.global_version != num_rounds:
        raise RuntimeError(f"only {strategy.progress.global_version} of {num_rounds} rounds were merged")
    each = 1e3 / (num_clients * num_rounds)
    return {
        "cpu_ms": cpu_s * each,
        "wall_ms": wall_s * each,
        "peak_mib": peaks[-1] / 2**20,
        "growth_mib": (peaks[-1] - peaks[min(1, len(peaks) - 1)]) / 2**20,
    }


def run_local(num_clients: int, num_rounds: int, saves: bool = False) -> dict[str, float]:
    """One run through ``LocalTransport`` in this process."""
    torch.set_num_threads(1)
    run(LocalTransport(handle, 2), 2, 1)  # whatever is only done once
    return run(LocalTransport(handle, num_clients), num_clients, num_rounds, saves)


def run_grid(num_clients: int, num_rounds: int, saves: bool = False) -> dict[str, float]:
    """One run through ``GridTransport`` and Flower's simulation engine; CPU is that of the server's process only."""
    from flwr.simulation import run_simulation

    torch.set_num_threads(1)
    client, server = ClientApp(), ServerApp()
    measured: dict[str, float] = {}

    @client.query()
    def who(message: Message, context: Context) -> Message:
        return Message(content=partition_record(int(context.node_config["partition-id"])), reply_to=message)

    @client.train()
    def work(message: Message, context: Context) -> Message:
        return Message(content=report_to_record(handle(record_to_instruction(message.content))), reply_to=message)

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        measured.update(run(grid, num_clients, num_rounds, saves))

    resources: dict[str, Any] = {"num_cpus": 1.0, "num_gpus": 0.0}
    run_simulation(server, client, num_clients, backend_config={"client_resources": resources})
    return measured


def main() -> dict[str, Any]:
    """Run the benchmark."""
    parser = options("engine", __doc__)
    parser.add_argument("--grid", action="store_true", help="also measure Flower's simulation engine")
    arguments = parser.parse_args()
    from bench import engine as this  # by its own name, so that other processes find its functions

    cases: list[tuple[str, Callable[..., dict[str, float]], int, int, bool]] = [
        ("LocalTransport", this.run_local, 10, 5 if arguments.quick else 100, False),
        ("LocalTransport", this.run_local, 100, 2 if arguments.quick else 10, False),
        ("LocalTransport", this.run_local, 100, 2 if arguments.quick else 10, True),
    ]
    if not arguments.quick:
        cases.append(("LocalTransport", this.run_local, 1000, 5, False))
    if arguments.grid:
        cases.append(("GridTransport", this.run_grid, 100, 5, False))
    rows: list[dict[str, Any]] = []
    for transport, function, num_clients, num_rounds, saves in cases:
        repeats = 1 if arguments.quick or function is this.run_grid else 3
        call = (lambda f, *a: f(*a)) if arguments.quick and function is this.run_local else in_fresh_process
        runs = [call(function, num_clients, num_rounds, saves) for _ in range(repeats)]
        row: dict[str, Any] = {
            "transport": transport,
            "clients": num_clients,
            "rounds": num_rounds,
            "checkpoints": saves,
        }
        row |= {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        if function is this.run_local and not saves and not arguments.quick:
            row["bound"] = within(row["cpu_ms"], CPU_BOUND_MS)
        rows.append(row)
    print_table("trivial clients: milliseconds per client and round; growth of the peak after the second round", rows)
    return finish("engine", arguments, {"rows": rows})


if __name__ == "__main__":
    main()
