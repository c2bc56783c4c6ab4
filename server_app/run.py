"""One run: configuration -> model, data, fleet, strategy -> event log, checkpoints, summary, report."""

from __future__ import annotations

import copy
import os
import platform
import secrets
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from torch import nn

from client_app.data import examples_of, load_images, partitions
from client_app.model import build_model
from fleet.clock import DurationModel
from fleet.data import ImageData
from fleet.partition import label_counts
from pruning.cost import measure_costs
from pruning.groups import Layout
from pruning.unit_scale import has_scales
from reporting.progress import Progress as TerminalProgress
from reporting.report import write_report
from server_app.checkpoint import save_checkpoint
from server_app.config import Config, as_toml
from server_app.evaluation import CentralEvaluator
from server_app.event_log import EventLog, kept_messages
from server_app.precheck import make_durations
from server_app.resume import CONFIG, LINEAGE, take_over
from strategies import STRATEGIES
from strategies.base import SubModelStrategy
from strategies.exchange import Transport
from strategies.setting import Progress, Setting
from wire.flat import ConfigError
from wire.message import Job


class RunFolderError(ValueError):
    """The folder of a run cannot be written."""


def run(config: Config, transport: Grid | Transport, show: Callable[[str], None] | None = print) -> Path:
    """Carry out one run and return its folder; ``show`` is told where the report lies, None for no report.

    Raises
    ------
    ConfigError, ModelError, DataError, FleetError, CheckpointError, RunFolderError
        If the run cannot start: nothing has been trained then.
    RunStoppedError
        If it cannot go on; the folder holds the log and the last checkpoint.
    """
    if config.run.fleet.name != "none":
        torch.set_num_threads(1)  # what a simulation finds must not depend on how many cores split a sum
    folder = prepare_folder(config)
    resumed = take_over(config, folder) if config.run.resume else None
    terminal = TerminalProgress(config.run.num_rounds)
    done = (resumed.num_rows, resumed.progress.now_s, resumed.progress.server_round) if resumed else (0, 0.0, 0)
    with EventLog(folder / "events.jsonl", terminal.on_event, *done) as log:
        try:
            strategy, state = build(config, folder, log.write, log)
            initial = [ArrayRecord(state)]
            del state  # the model may be large: handed over, not kept here as well
            if resumed:
                strategy.progress = resumed.progress
                strategy.import_state(resumed.own)
                log.write(resumed.row)
            strategy.start(transport, initial.pop(), config.run.num_rounds)
        except KeyboardInterrupt:
            log.write({"event": "end", "status": "interrupted", "reason": "interrupted by the user", **_where(log)})
            raise
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            log.write({"event": "end", "status": "failed", "reason": reason, **_where(log)})
            raise
        log.write({"event": "end", "status": "completed", "reason": "", **_where(log)})
    if show is not None:
        show(f"report: {write_report(folder)}")
    return folder


def prepare_folder(config: Config) -> Path:
    """Make the run's folder and write the resolved configuration into it."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(config.run.run_dir or f"results/{stamp}-{config.run.strategy}-{os.getpid()}").absolute()
    try:
        if (folder / "events.jsonl").exists():
            raise RunFolderError(f"run-dir: {folder} already holds a run; choose another, or use resume={folder}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(as_toml(config.flat()), encoding="utf-8")
        (folder / LINEAGE).write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"run-dir: cannot write to {folder}: {error.strerror}; choose another run-dir") from error
    return folder


def build(
    config: Config, folder: Path, listen: Callable[[dict[str, Any]], None], log: EventLog
) -> tuple[SubModelStrategy, dict[str, torch.Tensor]]:
    """Build the strategy and the initial model of a run, and log who takes part."""
    run_config = config.run
    data = load_images(run_config.data)
    held_out = examples_of(data, data.x_test, data.y_test)
    if len(held_out) < 4:
        raise ConfigError(f"config: data.max-test: the held-out set has {len(held_out)} examples, expected at least 4")
    shape = tuple(held_out.x.shape[1:])
    torch.manual_seed(run_config.seed)
    with kept_messages("pruning") as kept_whole:  # which groups, and why
        model, layout = make_model(config, data.num_classes, shape)
    train = run_config.train
    if train.sparsity > 0 and train.sparsity_norm == "l1" and not has_scales(model, layout):
        raise ConfigError(
            f"config: train.sparsity={train.sparsity:g}: the L1 penalty is on the scales of units, and none of model "
            f"{run_config.model.name!r} has one; set train.sparsity-norm=group-lasso, or for ViTs and the mlp "
            "model.scales=true"
        )
    cost = measure_costs(model, layout, torch.zeros(2, *shape))
    durations = make_durations(config)
    evaluation = run_config.evaluation
    evaluator = None
    if evaluation.where != "federated":
        evaluator = CentralEvaluator(model, layout, cost, held_out, evaluation.calibration)
    setting = Setting(
        job=_job(config, data, folder),
        layout=layout,
        cost=cost,
        loop=run_config.loop,
        durations=durations,
        evaluate=evaluator,
        evaluate_clients=evaluation.where != "central",
        evaluate_every=evaluation.every,
        family_every=evaluation.family_every,
        own_classes=evaluation.own_classes,
        own_statistics=evaluation.own_statistics,
        reply_timeout_s=run_config.reply_timeout_s,
        versions_dir=str(folder / "versions"),
        keep_checkpoints=run_config.keep_checkpoints,
        network=copy.deepcopy(model).to("meta"),
        image_shape=shape,
        deployment=run_config.deployment,
        limits=run_config.limits,
        robust=run_config.robust,
    )

    def keep(progress: Progress, own: dict[str, Any]) -> None:
        save_checkpoint(folder / "checkpoints", progress, own, config.flat(), log.num_rows, run_config.keep_checkpoints)

    strategy = STRATEGIES[run_config.strategy](config.method, setting, listen, keep)
    parts = partitions(run_config.data, run_config.num_clients)
    if not run_config.resume:
        counts = label_counts(data.y_train, parts, data.num_classes)
        listen(_run_row(config, data.name, model))
        listen({"event": "clients", "clients": _clients(counts, durations)})
        for message in kept_whole:
            listen({"event": "warning", "server_round": 0, "message": message})
    return strategy, {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def _job(config: Config, data: ImageData, folder: Path) -> Job:
    """What every client is told, whatever it is asked to do."""
    run_config = config.run
    return Job(
        model=run_config.model,
        data=run_config.data,
        train=run_config.train,
        num_clients=run_config.num_clients,
        num_rounds=run_config.num_rounds,
        seed=run_config.seed,
        compression=run_config.compression,
        store_dir=str(folder / "clients"),
        lineage=",".join((folder / LINEAGE).read_text(encoding="utf-8").split()),
        num_classes=data.num_classes,
        mean=",".join(map(str, data.mean)),
        std=",".join(map(str, data.std)),
    )


def make_model(config: Config, num_classes: int, shape: tuple[int, ...]) -> tuple[nn.Module, Layout]:
    """The full model of a run, with fresh weights, and its layout."""
    if shape[1] != shape[2]:
        name = config.run.data.name
        raise ConfigError(
            f"config: data.name={name}: images are {shape[1]} x {shape[2]} pixels, and models are made for square "
            f"ones; append a size, such as data.name={name}@{min(shape[1:])}"
        )
    return build_model(config.run.model, num_classes, (shape[0], shape[1], shape[2]))


def _run_row(config: Config, data_name: str, model: nn.Module) -> dict[str, Any]:
    versions = {name: version(name) for name in ("flwr", "torch", "numpy")} | {"python": platform.python_version()}
    return {
        "event": "run",
        "config": config.flat(),
        "versions": versions,
        "strategy": config.run.strategy,
        "model": config.run.model.name,
        "data": data_name,
        "num_clients": config.run.num_clients,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "seed": config.run.seed,
    }


def _clients(counts: np.ndarray, durations: DurationModel | None) -> list[dict[str, Any]]:
    rows = []
    for pid, row in enumerate(counts):
        client = {"partition_id": pid, "num_examples": int(row.sum()), "label_counts": [int(c) for c in row]}
        if durations is not None:
            device = durations.fleet.devices[pid]
            client |= {
                "device": device.name,
                "train_flops": device.train_flops,
                "uplink_bytes_per_s": device.uplink_bytes_per_s,
                "downlink_bytes_per_s": device.downlink_bytes_per_s,
                "memory_bytes": device.memory_bytes,
            }
        rows.append(client)
    return rows


def _where(log: EventLog) -> dict[str, Any]:
    return {"time_s": log.time_s, "num_rounds": log.server_round}
