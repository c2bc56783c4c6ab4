"""How a run's requests travel over Flower's grid."""

from __future__ import annotations

from typing import Any

from strategies.setting import Setting
from wire.grid import GridTransport


def over_grid(grid: Any, setting: Setting) -> GridTransport:
    """The transport of a run: in simulation with few requests at a time, in deployment with one for each device."""
    num_clients, real = setting.job.num_clients, setting.deployment
    if setting.durations is not None:  # requests queue for few workers: their time in the queue is no delay
        return GridTransport(grid, num_clients, limits=setting.limits)
    return GridTransport(
        grid,
        num_clients,
        window=num_clients,
        time_to_live_s=setting.reply_timeout_s,  # one request at a time, so a node's own turn
        join_timeout_s=real.join_timeout_s,
        limits=setting.limits,
        num_probes=real.num_probes,
        min_clients=min(real.min_clients, num_clients),
    )
