"""Memory of Co-S2P's clients: the peak of a process of its own, for each device class and phase."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.common import in_fresh_process, peak_bytes
from bench.runs import Keys, keep, load

MODEL, QUICK_MODEL, BATCH = "vit_tiny", "vit_micro", 32


def kept_memory(store: Path, *, is_quick: bool, may_measure: bool) -> list[dict[str, Any]]:
    """What the store has of ``measure_memory``, measured now where it lacks it; [] if that is not wanted."""
    path = store / f"memory_{QUICK_MODEL if is_quick else MODEL}.json"
    if may_measure and not path.exists():
        keep(path, {"rows": measure_memory(is_quick)})
    rows: list[dict[str, Any]] = load(path)["rows"] if path.exists() else []
    return rows


def measure_memory(is_quick: bool = False) -> list[dict[str, Any]]:
    """Peak of one client process per device class and phase, and the saving against the full model's training."""
    model = QUICK_MODEL if is_quick else MODEL
    rows = []
    for rate in (1.0, 0.5) if is_quick else (1.0, 0.75, 0.5, 0.25):
        for phase in ("weights", "masks + weights")[: 1 if rate == 1 else 2]:
            rows.append(
                {"rate": rate, "phase": phase, **in_fresh_process(client_peak, model, rate, phase != "weights")}
            )
    full = rows[0]
    for row in rows:
        row["against full"] = row["measured_mib"] / full["measured_mib"] - 1
        row["counted against full"] = row["counted_mib"] / full["counted_mib"] - 1
    return rows


def client_peak(model: str, rate: float, learns_masks: bool) -> dict[str, float]:
    """Peak of this process while it handles one request, above its peak before; and what the client counts."""
    import torch

    from bench.cos2p_scale import reset_peak
    from client_app.data import client_examples
    from client_app.handler import handle
    from client_app.model import build_model, full_model, sub_model
    from pruning.capability import inner_groups, solve_rate, sub_model_at
    from pruning.extract import extract
    from wire.message import DataConfig, Instruction, Job, ModelConfig, TrainConfig

    torch.set_num_threads(1)
    config = ModelConfig(model, exits=True)
    train = TrainConfig(batch_size=BATCH, optimizer="adam", learning_rate=0.001)
    job = Job(config, DataConfig(max_train=4 * BATCH * 2, partition="iid", test_ratio=0.1), train, 4, 10, 0)
    network, layout = build_model(config, 10, (1, 8, 8))
    groups = inner_groups(layout, {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()})
    depth = solve_rate(layout, rate).depth
    spec = sub_model_at(layout, groups, depth, 1.0 if learns_masks else rate)
    state = {key: tensor.clone() for key, tensor in extract(network.state_dict(), layout, spec).items()}
    del network
    settings: Keys = {"then": "deepest-teaches", "width-rate": rate, "mask-epochs": 1, "distillation-weight": 0.5}
    objective = "mask-learning" if learns_masks else "deepest-teaches"
    instruction = Instruction("train", 0, 0, 1, 0, job, state, spec, objective, settings)
    warm = replace(train, batch_size=2)  # imports and caches are not what is compared
    client_examples(job.data, 4, 0)
    full_model(config, 10, (1, 8, 8))
    sub_model(config, 10, (1, 8, 8), spec)
    tiny = replace(job, model=ModelConfig("mlp"), train=warm)
    small = build_model(tiny.model, 10, (1, 8, 8))[0].state_dict()
    handle(Instruction("train", 0, 0, 1, 0, tiny, small))
    del small
    reset_peak()
    before = peak_bytes()
    report = handle(instruction)
    return {
        "measured_mib": (peak_bytes() - before) / 2**20,
        "counted_mib": report.peak_memory_bytes / 2**20,
        "examples": float(report.num_examples),
    }
