"""What of a run shows to be wrong before anything is started, read or built: a wrong word costs no minute."""

from __future__ import annotations

from pathlib import Path

import torch

from client_app.data import OWN
from client_app.model import model_options
from fleet.clock import DurationModel
from fleet.data import check_data, train_labels
from fleet.fleet import make_fleet
from fleet.partition import partition_labels, read_scheme
from server_app.checkpoint import find_checkpoint
from server_app.config import Config
from server_app.resume import check_settings, earlier_settings
from wire.flat import ConfigError
from wire.message import DataConfig
from zoo import check_model


def check_start(config: Config) -> None:
    """Refuse names that stand for nothing, files that are not there, and what this machine or its data cannot give.

    Also settings that a resumed run cannot have. Only for runs of this machine: a SuperLink reads its own files, and
    its clients have their own devices.

    Raises
    ------
    ConfigError, ModelError, DataError, FleetError, CheckpointError
        As the run itself would, later.
    """
    run = config.run
    if run.train.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "config: train.device: got 'cuda', but PyTorch finds no CUDA device on this machine; expected 'cpu', or "
            "'auto', which takes one where there is one"
        )
    make_durations(config)
    check_model(run.model.name, **model_options(run.model))
    check_data(run.data.name, run.data.dir, run.data.download)
    if run.data.partition != OWN:
        read_scheme(run.data.partition)
        _check_shares(run.data, run.num_clients)
    if run.resume:
        find_checkpoint(Path(run.resume))
        before = earlier_settings(Path(run.resume))
        if before:
            check_settings(before, config.flat())


def _check_shares(data: DataConfig, num_clients: int) -> None:
    """Deal the examples out as the run will, where that needs no more than their labels."""
    labels = train_labels(data.name, data.dir)
    if labels is not None:
        kept = labels[: data.max_train or None]
        partition_labels(kept, num_clients, data.partition, seed=data.seed, min_size=data.min_size)


def make_durations(config: Config) -> DurationModel | None:
    """How long the simulated devices take; None where the clock is the wall."""
    fleet, seed = config.run.fleet, config.run.seed
    if fleet.name == "none":
        return None
    devices = make_fleet(fleet.name, config.run.num_clients, seed=seed, drop_out_ratio=fleet.drop_out_ratio or None)
    return DurationModel(devices, seed=seed, noise=fleet.noise)
