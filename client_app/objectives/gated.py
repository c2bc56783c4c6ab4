"""Train with gates: each sample, or those who share, with its winning units only (ADP, arXiv 2106.06921)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from client_app.objectives.base import Findings, Objective, ObjectiveError, Task, last_logits
from client_app.objectives.cross_entropy import cross_entropy
from client_app.objectives.losers import Losers
from client_app.objectives.unsent import Unsent
from pruning.extract import narrow, shapes_of
from pruning.gates import (
    BITMAP,
    PLAN,
    PREFIX,
    SALIENCE,
    Evidence,
    Gates,
    LayerPlan,
    executed_ratios,
    gates_of,
    measure_plan,
    to_bitmap,
    upload_spec,
)
from pruning.importance import score_units
from pruning.ops import trace_ops
from wire.message import State


def gated(task: Task) -> Objective:
    """Cross-entropy of a model with gates, executed compact.

    The model's own entries say how many units of each layer win. Settings: ``share`` and ``num-groups`` (who shares
    winners), ``compact`` (false: whole and masked, the reference), ``sparsity`` (L1 on the gates), ``optimizer-mask``
    (units that nobody in the batch selected do not move), ``upload-density`` (below 1: so many units go back, with a
    bitmap), ``upload`` (which: the most ``salient``, or those that have ``changed`` most since they were last sent),
    ``personal`` (gates stay on the client), ``measure`` (time every layer whole and compact at ``density``, and send
    the times).

    Raises
    ------
    ObjectiveError
        If the client should go on with gates of its own that it does not have.
    """
    settings = task.settings
    gates = gates_of(task.model)
    if settings.get("personal", False):
        _recall(gates, task.memory.get("gates", {}))
    gates.configure(
        str(settings.get("share", "group")), bool(settings.get("compact", True)), int(settings.get("num-groups", 4))
    )
    plan = _measure(task) if settings.get("measure", False) and task.examples is not None else ()
    base = cross_entropy(task)
    if task.examples is None:
        return replace(base, predict=lambda x: last_logits(task.model(packed(x))))
    evidence, work = Evidence(gates, len(task.label_counts)), _Work(task)
    losers = Losers(task, gates) if settings.get("optimizer-mask", True) else None
    density = float(settings.get("upload-density", 1.0))
    unsent = Unsent(task) if density < 1 and settings.get("upload", "salient") == "changed" else None
    sparsity = float(settings.get("sparsity", 0.0))

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        value, logits = base.loss(packed(x), y)
        active = [gate.winners.gates for _, gate in gates.pairs() if gate.winners is not None]
        if sparsity and active:
            value = value + sparsity * torch.stack([g.sum(1).mean() for g in active]).sum()
        evidence.note(y)
        work.note(len(y))
        return value, logits

    def finish(num_steps: int) -> Findings:
        return _findings(task, gates, evidence, plan, work.train_macs, density, unsent)

    if losers is not None:
        base = replace(base, step=losers.step, steps_of=losers.steps_of)
    if unsent is not None:
        base = replace(base, kept_bytes=base.kept_bytes + unsent.kept_bytes)
    return replace(base, loss=loss, finish=finish, varies=True)


def packed(x: Tensor) -> Tensor:
    """Images with their channels last: compact convolutions are faster so, and a small one suffers less."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


class _Work:
    """Multiply-accumulates that training really executed, forward and backward."""

    def __init__(self, task: Task) -> None:
        assert task.examples is not None
        image = torch.zeros_like(task.examples.x[:1], dtype=torch.float32)
        self._model, self._whole = task.model, dict[str, float]()
        self._rest, self.train_macs = 0.0, 0.0
        with gates_of(task.model).whole():  # products are recognised by the weights that they are made with
            products = trace_ops(task.model, image).products
        for product in products:
            if product.key is None:
                self._rest += product.train_macs
            else:
                self._whole[product.key] = self._whole.get(product.key, 0.0) + product.train_macs

    def note(self, num_samples: int) -> None:
        """Add the pass that was just made."""
        ratios = executed_ratios(self._model)
        per_sample = self._rest + sum(macs * ratios.get(key, 1.0) for key, macs in self._whole.items())
        self.train_macs += num_samples * per_sample


def _recall(gates: Gates, memory: Mapping[str, Tensor]) -> None:
    """Put the client's own gates in; what the server sent, if anything, is where they begin."""
    for key, gate in gates.items():
        for part in ("weight", "bias"):
            own = memory.get(f"{key}.{part}")
            if own is not None:
                setattr(gate, part, nn.Parameter(own.to(gates.device, copy=True)))
            elif getattr(gate, part).is_meta:
                raise ObjectiveError(
                    "gated: this client should go on with its own gates but remembers none; its store was lost, or it "
                    "is another client: start a new run, or use adp.gates=global"
                )


def _measure(task: Task) -> tuple[LayerPlan, ...]:
    """What every layer costs on this device, whole and compact at the density that is aimed at."""
    assert task.examples is not None
    twin = copy.deepcopy(task.model)
    gates_of(twin).set_density(float(task.settings.get("density", 1.0)))
    images, _ = task.examples.batch(slice(0, min(len(task.examples), task.train.batch_size)))
    return measure_plan(twin, packed(images), training=True)


def _findings(
    task: Task,
    gates: Gates,
    evidence: Evidence,
    plan: Sequence[LayerPlan],
    train_macs: float,
    density: float,
    unsent: Unsent | None,
) -> Findings:
    """What goes back: a part of the weights, and what was seen of the gates."""
    settings, salience = task.settings, evidence.salience()
    companions = {SALIENCE: torch.cat(list(salience.values())) / max(1, evidence.num_samples)}
    companions |= evidence.as_tensors()
    memory: dict[str, object] = {}
    if plan:
        times = {layer.group: [layer.dense_s, layer.gated_s] for layer in plan}
        companions[PLAN] = torch.tensor([times.get(site.group, [-1.0, -1.0]) for site in gates.sites])
    state = dict(task.model.state_dict())
    if settings.get("personal", False):
        own = {name: parameter.detach().cpu().clone() for name, parameter in gates.named_parameters()}
        memory["gates"] = own
        kept = {PREFIX + name for name in own}
        state = {key: tensor for key, tensor in state.items() if key not in kept}
    narrowed = None
    if density < 1:
        cpu: State = {key: tensor.detach().cpu() for key, tensor in state.items()}
        active = [site.group for site, gate in gates.pairs() if gate.k]
        if unsent is None:
            scores = {name: salience[name].cpu().double().numpy() for name in active}
            narrowed = upload_spec(task.layout, task.spec, scores, density)
        else:
            cpu, due = unsent.add_to(cpu)
            norms = score_units(due, task.layout, "l2", normalize=False)
            narrowed = upload_spec(task.layout, task.spec, {name: norms[name] for name in active}, density)
            memory["unsent"] = unsent.rest(due, narrowed)
        companions[BITMAP] = to_bitmap(task.layout, narrowed)
        shapes = shapes_of(task.full.state_dict())
        state = {key: t.contiguous() for key, t in narrow(cpu, task.layout, task.spec, narrowed, shapes).items()}
    metrics = {"gated_layers": float(sum(g.k > 0 for _, g in gates.pairs())), **evidence.summary()}
    return Findings(companions, memory, metrics, state, narrowed, train_macs)
