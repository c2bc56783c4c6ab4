"""The client handler: one instruction in, one report out. Engines only wrap it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from client_app.batches import augmented, local_batches
from client_app.data import Examples, job_examples
from client_app.evaluation import evaluate, reestimate_batch_norm
from client_app.meter import MemoryMeter
from client_app.model import build_model, costs_of, filled, full_model, price, sub_model
from client_app.objectives import Findings, Fitted, Objective, Task, last_logits, make_objective, needed_bytes
from client_app.site import NOWHERE, Site
from client_app.store import ClientStore
from pruning.capability import Training
from pruning.compress import sparsify
from pruning.cost import Cost
from pruning.extract import embed, extract, narrow, shapes_of
from pruning.groups import Layout
from pruning.spec import SubModelSpec
from wire.message import Instruction, Job, Report, State, TrainConfig
from wire.training import learning_rate, make_optimizer, optimizer_slots

NO_CHANCE = -1e4
"""Logit of a class that cannot be the answer; finite, so that a loss stays a number."""


class TrainingError(RuntimeError):
    """Training went wrong on this client; nothing is reported as trained."""


def handle(instruction: Instruction, site: Site = NOWHERE) -> Report:
    """Do what the instruction asks and report it.

    Raises
    ------
    TrainingError
        If the loss is not finite or the client has nothing to train on.
    SiteError
        If it asks for what the device's owner does not give.
    """
    job = site.localized(instruction.job)
    train, test, num_classes = job_examples(job, instruction.partition_id)
    device = pick_device(job.train)
    shape = (train.x.shape[1], train.x.shape[2], train.x.shape[3])
    store = ClientStore(job.store_dir, instruction.partition_id, job.lineage.split(",")[1:])
    memory = store.load(instruction.last_dispatch)
    blank, layout, cost = sub_model(job.model, num_classes, shape, instruction.spec)
    full, _ = full_model(job.model, num_classes, shape)
    task = Task(
        model=load(blank, instruction, device).train(),
        layout=layout,
        train=job.train,
        settings=instruction.settings,
        label_counts=torch.bincount(train.y, minlength=num_classes).to(device),
        spec=instruction.spec,
        full=full,
        companions={key: tensor.to(device) for key, tensor in instruction.companions.items()},
        memory=memory.get("objective", {}),
        examples=train.to(device) if instruction.action == "train" else None,
        learning_rate=learning_rate(job.train, instruction.server_round, job.num_rounds),
        generator=torch.Generator().manual_seed(
            hash((job.seed, instruction.partition_id, instruction.dispatch)) % 2**63
        ),
        work_ratio=instruction.work_ratio,
        build=partial(build_model, job.model, num_classes, shape),
        load_draft=store.load_draft,
        save_draft=store.save_draft,
    )
    if instruction.action == "evaluate":
        return _evaluate(instruction, task, train.to(device), test.to(device))
    if len(train) == 0:
        raise TrainingError(f"client {instruction.partition_id} has no training example; raise data.min-size")
    if site.memory_bytes:
        training = Training(min(job.train.batch_size, len(train)), optimizer_slots(job.train))
        cost_of = partial(costs_of, job.model, num_classes, shape)
        site.check_memory(needed_bytes(instruction.objective, task, training, cost_of))
    return _train(instruction, job, task, cost, store, memory)


def _evaluate(instruction: Instruction, task: Task, train: Examples, test: Examples) -> Report:
    if len(test) == 0:
        raise TrainingError(f"client {instruction.partition_id} has no test example; raise data.min-size")
    objective = make_objective(instruction.objective, task)
    if task.settings.get("own-statistics", False) and len(train) > 1:
        reestimate_batch_norm(objective.model, train)  # of the network as the objective has set it up for the test
    found = examine(task, objective, test)
    return Report(
        instruction.dispatch,
        instruction.partition_id,
        {},
        len(test),
        tuple(int(c) for c in task.label_counts),
        metrics=found.metrics,
        companions={key: tensor.detach().cpu() for key, tensor in found.companions.items()},
    )


def _train(
    instruction: Instruction, job: Job, task: Task, cost: Cost, store: ClientStore, memory: Mapping[str, Any]
) -> Report:
    assert task.examples is not None
    _, channels, height, width = task.examples.x.shape
    torch.manual_seed(int(torch.randint(2**62, (1,), generator=task.generator)))
    began = time.perf_counter()
    objective = make_objective(instruction.objective, task)
    fitted = objective.train(task.examples) if objective.train is not None else fit(task, objective, task.examples)
    if not math.isfinite(fitted.metrics.get("loss", 0.0)):
        raise TrainingError(
            f"client {instruction.partition_id}: the loss became {fitted.metrics['loss']}; lower the learning rate"
        )
    findings = objective.finish(fitted.num_steps)
    compute_s = time.perf_counter() - began
    extra = (price(network, (channels, height, width)) for network in objective.extra)
    macs = cost.train_macs + sum(each.train_macs for each in extra)
    objective.model.zero_grad()  # gradients are as large as the weights, and the answer needs room
    trained = objective.model.state_dict() if findings.state is None else findings.state
    sent = {key: tensor.detach().cpu() for key, tensor in trained.items()}  # nobody else's
    own = {**memory.get("objective", {}), **findings.memory}  # what this objective does not name waits for its own
    remembered: dict[str, Any] = {"objective": own} if own else {}
    if instruction.wants_delta:
        sent = difference(sent, instruction, findings.narrowed, task.layout, task.full)
    if job.compression.kind == "dgc":
        held = findings.narrowed or instruction.spec
        before = memory.get("compression", {})
        sent, remembered["compression"] = compress(sent, before, job, held, task.layout, task.full)
    if remembered:
        store.save(instruction.dispatch, instruction.last_dispatch, remembered, instruction.kept_dispatches)
    return Report(
        dispatch=instruction.dispatch,
        partition_id=instruction.partition_id,
        state=sent,
        num_examples=len(task.examples),
        label_counts=tuple(int(c) for c in task.label_counts),
        train_macs=float(macs * fitted.num_seen) if findings.train_macs is None else findings.train_macs,
        compute_s=compute_s,
        peak_memory_bytes=max(fitted.memory_bytes, findings.peak_memory_bytes),
        metrics={**fitted.metrics, **findings.metrics},
        is_delta=instruction.wants_delta,
        is_sparse=job.compression.kind == "dgc",
        narrowed=findings.narrowed,
        companions={key: tensor.detach().cpu() for key, tensor in findings.companions.items()},
        num_steps=fitted.num_steps,
    )


def load(model: nn.Module, instruction: Instruction, device: torch.device) -> nn.Module:
    """A copy of a model without storage, holding the weights that were received; the rest stays without storage."""
    known = model.state_dict()
    unknown = [key for key in instruction.state if key not in known]
    if unknown:
        raise TrainingError(f"instruction: the model has no entries {unknown}")
    owned = {key: tensor.to(device, copy=True) for key, tensor in instruction.state.items()}
    return filled(model, owned, is_partial=instruction.is_partial)


def fit(task: Task, objective: Objective, train: Examples) -> Fitted:
    """Train on ``train``."""
    config = task.train
    parameters = [*objective.model.parameters(), *objective.beside]
    optimizer = make_optimizer(config, parameters, task.learning_rate)
    meter = MemoryMeter(objective.model, optimizer_slots(config), objective.varies)
    total_loss, num_correct, num_seen, num_steps = 0.0, 0, 0, 0
    for index in local_batches(len(train), config, task.generator, task.work_ratio):
        x, y = train.batch(index)
        x = augmented(x, config, task.generator)
        with meter:
            loss, logits = objective.loss(x, y)
        optimizer.zero_grad()
        loss.backward()
        objective.correct()
        if config.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        objective.step(optimizer)
        total_loss += float(loss.detach()) * len(y)
        num_correct += int((logits.argmax(1) == y).sum())
        num_seen += len(y)
        num_steps += 1
    metrics = {"loss": total_loss / num_seen, "accuracy": num_correct / num_seen}
    return Fitted(metrics, meter.peak_bytes + objective.kept_bytes, num_seen, num_steps)


def examine(task: Task, objective: Objective, examples: Examples) -> Findings:
    """Test as the objective wants it; with ``own-classes`` the answer is one of the classes that the client has."""
    if objective.examine is not None:
        return objective.examine(examples)
    predict = objective.predict or (lambda x: last_logits(objective.model(x)))
    if task.settings.get("own-classes", False):
        everything, is_missing = predict, task.label_counts == 0
        predict = lambda x: everything(x).masked_fill(is_missing, NO_CHANCE)  # noqa: E731
    return Findings(metrics=evaluate(objective.model, examples, predict=predict))


def difference(
    state: State, instruction: Instruction, narrowed: SubModelSpec | None, layout: Layout, full: nn.Module
) -> dict[str, Tensor]:
    """What training changed; integer buffers as they are."""
    start = instruction.state
    if narrowed is not None:
        start = narrow(start, layout, instruction.spec, narrowed, shapes_of(full.state_dict()))
    return {k: t - start[k] if t.is_floating_point() else t for k, t in state.items()}


def compress(
    delta: dict[str, Tensor], memory: Mapping[str, Any], job: Job, spec: SubModelSpec, layout: Layout, full: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Send the largest entries of the update and remember the rest, in the coordinates of the present sub-model."""
    velocity: dict[str, Tensor] = {}
    residual: dict[str, Tensor] = {}
    if memory:
        before = SubModelSpec(tuple((n, tuple(u)) for n, u in memory["kept"]), memory["depth"])
        own = memory["velocity"]  # what stays on the client has neither
        blank = {k: torch.zeros(t.shape) for k, t in full.state_dict().items() if k in own}
        velocity, residual = (
            extract(embed(memory[name], layout, before, blank)[0], layout, spec) if before != spec else memory[name]
            for name in ("velocity", "residual")
        )
    sparse, velocity, residual = sparsify(delta, velocity, residual, job.compression.density, job.compression.momentum)
    kept = [[name, list(units)] for name, units in spec.kept]
    return sparse, {"kept": kept, "depth": spec.depth, "velocity": velocity, "residual": residual}


def pick_device(config: TrainConfig) -> torch.device:
    """The configured device; ``auto`` takes the accelerator where there is one."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)
