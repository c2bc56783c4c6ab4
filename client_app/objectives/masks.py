"""Co-S2P's client: learn which units to keep with the weights frozen, then train those, as a physically small model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite, log

import torch
from torch import Tensor, nn
from torch.nn import functional

from client_app.batches import augmented, batches
from client_app.meter import MemoryMeter
from client_app.model import costs_by_spec
from client_app.objectives.base import CostOf, Findings, Objective, ObjectiveError, Task, last_logits
from client_app.objectives.cross_entropy import cross_entropy
from client_app.objectives.distillation import deepest_teaches, exits, mutual
from client_app.objectives.mask_gates import READERS, MaskGates, readers_of, writers_of
from pruning.capability import Training, groups_within, inner_groups, mask_phase_bytes, widths_at
from pruning.cost import measure_costs
from pruning.extract import narrow, resize, shapes_of
from pruning.groups import Group, Layout
from pruning.spec import FULL, SubModelSpec
from wire.training import make_optimizer, optimizer_slots

THEN = {"cross-entropy": cross_entropy, "exits": exits, "deepest-teaches": deepest_teaches, "mutual": mutual}
"""What the small model may be trained with."""


@dataclass(frozen=True)
class Learned:
    """What the mask phase came to.

    Attributes
    ----------
    spec : the part of the received sub-model that is kept.
    memory : scores, also those of blocks that were not there this time, and optimiser state, for the next time.
    loss : of the last epoch, with open and shut gates.
    num_seen : examples passed through, forward and backward.
    peak_memory_bytes : of this phase.
    """

    spec: SubModelSpec
    memory: Mapping[str, object]
    loss: float
    num_seen: int
    peak_memory_bytes: int


def mask_learning(task: Task) -> Objective:
    """Learn a width mask, cut the model down to it, and go on with the objective ``then``.

    Settings: ``then`` (``cross-entropy``, ``exits``, ``deepest-teaches`` or ``mutual``, with its own settings),
    ``width-rate``, ``mask-epochs``, ``mask-learning-rate``, ``mask-penalty`` and ``mask-select``. The small model
    starts from the weights as they were received. Who only evaluates learns nothing and keeps every unit.

    Raises
    ------
    ObjectiveError
        For an unknown ``then`` or ``mask-select``, or a model without a unit to choose.
    """
    kind = str(task.settings.get("then", "cross-entropy"))
    if kind not in THEN:
        raise ObjectiveError(f"objective: mask-learning: then: got {kind!r}, expected one of {', '.join(THEN)}")
    if task.examples is None:
        return THEN[kind](task)
    shapes = shapes_of(task.full.state_dict())
    learned = learn_mask(task)
    part = narrow(task.model.state_dict(), task.layout, task.spec, learned.spec, shapes)
    with torch.device("meta"):
        small = resize(task.full, task.layout, learned.spec)
    small.load_state_dict({key: tensor.clone().contiguous() for key, tensor in part.items()}, assign=True)
    small.requires_grad_(True).train()
    task.model.to("meta")  # the device has room for one of the two
    inner = THEN[kind](replace(task, model=small, spec=learned.spec))
    shape = tuple(task.examples.x.shape[1:])
    cost, phase_macs = costs_by_spec(task.full, task.layout, shape), mask_macs(task.full, task.layout, task.spec, shape)
    num_trained = 0

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal num_trained
        num_trained += len(y)
        return inner.loss(x, y)

    def finish(num_steps: int) -> Findings:
        found = inner.finish(num_steps)
        macs = phase_macs * learned.num_seen + cost.of(learned.spec).train_macs * num_trained
        return replace(
            found,
            memory={**found.memory, **learned.memory},
            metrics={**found.metrics, "mask_loss": learned.loss},
            narrowed=learned.spec,
            train_macs=float(macs),
            peak_memory_bytes=max(found.peak_memory_bytes, learned.peak_memory_bytes),
        )

    return replace(inner, loss=loss, finish=finish, narrowed=learned.spec)


def learn_mask(task: Task) -> Learned:
    """Train the scores for ``mask-epochs``; the model is left as it was received.

    Raises
    ------
    ObjectiveError
        If the loss is not finite: scores that are no numbers rank no units.
    """
    assert task.examples is not None
    phase = MaskPhase(task, learnable_groups(task))
    total, num_seen, num_examples = 0.0, 0, len(task.examples)
    for _ in range(int(task.settings.get("mask-epochs", 20))):
        total = 0.0
        for index in batches(num_examples, task.train.batch_size, task.generator):
            x, y = task.examples.batch(index)
            total += phase.step(augmented(x, task.train, task.generator), y) * len(y)
            num_seen += len(y)
        if not isfinite(total):
            raise ObjectiveError(
                f"objective: mask-learning: the loss became {total / num_examples}; lower the learning rate, or "
                "mask-penalty"
            )
    kept, memory = phase.close()
    spec = SubModelSpec.of({**task.spec.units, **kept}, task.spec.depth)
    return Learned(spec, memory, total / num_examples, num_seen, phase.peak_bytes)


def mask_peak_bytes(task: Task, training: Training, cost_of: CostOf) -> int:
    """Estimated peak of both phases, bytes: scores on the model as received, then training of the part they choose.

    Raises
    ------
    ObjectiveError
        If there is no unit to choose.
    """
    groups, rate = learnable_groups(task), float(task.settings["width-rate"])
    phase = mask_phase_bytes(Layout(()), cost_of(task.spec), groups, FULL, training)
    kept = {name: range(width) for name, width in widths_at(groups, rate).items()}
    small = cost_of(SubModelSpec.of({**task.spec.units, **kept}, task.spec.depth)).of(FULL)
    return max(phase, small.peak_memory_bytes(training.batch_size, training.optimizer_slots))


class MaskPhase:
    """Scores trained with the weights frozen. Loss: CE(deepest exit) + lambda |mean(gates) - width rate|.

    Trained beside the scores, and forgotten afterwards: normalisation, class token and positions (whatever belongs to
    no linear layer, convolution or attention) and the deepest head. What ``train.*`` says of batches and steps holds
    for them: optimiser, learning rate, label smoothing, augmentation, and ``max-grad-norm``, over their gradients.
    Scores have an optimiser and a rate of their own, whose steps are as long whatever the gradient's norm: they are not
    clipped.

    Parameters
    ----------
    task : with the settings of ``mask_learning``.
    groups : whose units are to be chosen.
    """

    def __init__(self, task: Task, groups: tuple[Group, ...]) -> None:
        settings, model = task.settings, task.model
        self.task, self.groups = task, groups
        self.rate, self.penalty = float(settings["width-rate"]), float(settings.get("mask-penalty", 1.0))
        device = next(model.parameters()).device
        trained = freeze(model)
        state = model.state_dict(keep_vars=True).items()
        self._before = {key: tensor.detach().clone() for key, tensor in state if _may_change(tensor, trained)}
        self.gates = MaskGates(model, groups, _first_scores(task, groups, self.rate, device))
        self._scores = torch.optim.Adam([self.gates.scores], lr=float(settings.get("mask-learning-rate", 0.01)))
        _restore(self._scores, task.memory, self.gates)
        self._beside, self._trained = make_optimizer(task.train, trained, task.learning_rate), trained
        self.meter = MemoryMeter(model, optimizer_slots(task.train))

    @property
    def peak_bytes(self) -> int:
        """Bytes at the peak: what the meter counts, a copy to go back to, and four numbers a score (Adam's two)."""
        scores = self.gates.scores
        copies = sum(tensor.numel() * tensor.element_size() for tensor in self._before.values())
        return self.meter.peak_bytes + copies + 4 * scores.numel() * scores.element_size()

    def step(self, x: Tensor, y: Tensor) -> float:
        """One batch: gates drawn, scores and what is trained beside them moved; returns the loss."""
        with self.meter:
            drawn = self.gates.draw(self.task.generator)
            logits = last_logits(self.task.model(x))
            value = functional.cross_entropy(logits, y, label_smoothing=self.task.train.label_smoothing)
            value = value + self.penalty * (drawn.mean() - self.rate).abs()
        for optimizer in (self._beside, self._scores):
            optimizer.zero_grad()
        value.backward()
        if self.task.train.max_grad_norm:
            nn.utils.clip_grad_norm_(self._trained, self.task.train.max_grad_norm)
        for optimizer in (self._beside, self._scores):
            optimizer.step()
        return float(value.detach())

    def close(self) -> tuple[dict[str, list[int]], dict[str, object]]:
        """Leave the model as it was received; returns the units kept, and what to remember."""
        self.gates.remove()
        with torch.no_grad():
            for key, tensor in self.task.model.state_dict(keep_vars=True).items():
                if key in self._before:
                    tensor.copy_(self._before[key])
        scores = self.gates.by_group()
        select = str(self.task.settings.get("mask-select", "top-k"))
        kept = choose_units(scores, self.groups, self.rate, select, self.task.generator)
        remembered = {name: score.cpu() for name, score in scores.items()}
        scores_of_others = self.task.memory.get("scores", {})
        return kept, {"scores": {**scores_of_others, **remembered}, "optimizer": _exported(self._scores, self.gates)}


def learnable_groups(task: Task) -> tuple[Group, ...]:
    """The groups a client can learn to narrow: inside blocks that it holds, where layers can be gated."""
    shapes = {key: tuple(tensor.shape) for key, tensor in task.full.state_dict().items()}
    depth = len(task.layout.blocks) if task.spec.depth is None else task.spec.depth
    modules = dict(task.model.named_modules())
    held = groups_within(inner_groups(task.layout, shapes), task.layout, depth)
    gated = [group for group in held if readers_of(group, modules) or writers_of(group, modules)]
    found = tuple(group for group in gated if group.name not in task.spec.units)
    if not found:
        raise ObjectiveError("objective: mask-learning: the model has no unit to choose; use another model or masks")
    return found


def choose_units(
    scores: Mapping[str, Tensor], groups: tuple[Group, ...], rate: float, select: str, generator: torch.Generator
) -> dict[str, list[int]]:
    """Final mask: the ``top-k`` of each group, k = round(rate * size); or drawn (``bernoulli``), one unit at least.

    Ties go to the lower index. Groups of which everything is kept are left out.
    """
    if select not in ("top-k", "bernoulli"):
        raise ObjectiveError(f"objective: mask-select: got {select!r}, expected 'top-k' or 'bernoulli'")
    widths = widths_at(groups, rate)
    kept = {}
    for group in groups:
        ranked = torch.argsort(scores[group.name].cpu(), descending=True, stable=True)
        units = ranked[: widths[group.name]]
        if select == "bernoulli":
            drawn = torch.rand(group.size, generator=generator) < torch.sigmoid(scores[group.name].cpu())
            units = torch.nonzero(drawn).flatten() if bool(drawn.any()) else ranked[:1]
        if len(units) < group.size:
            kept[group.name] = units.tolist()
    return kept


def _first_scores(task: Task, groups: tuple[Group, ...], rate: float, device: torch.device) -> dict[str, Tensor]:
    """The scores remembered, or logit(rate)."""
    remembered = task.memory.get("scores", {})
    start = log(rate / (1 - rate)) if rate < 1 else 0.0
    return {
        g.name: remembered[g.name].to(device).clone()
        if g.name in remembered and len(remembered[g.name]) == g.size
        else torch.full((g.size,), start, device=device)
        for g in groups
    }


def freeze(model: nn.Module) -> list[nn.Parameter]:
    """Freeze all but what belongs to no linear layer, convolution or attention, and the deepest head; return that.

    PyTorch's attention holds the weights of its query, key and value layers itself.
    """
    frozen = (*READERS, nn.MultiheadAttention)
    found = [p for m in model.modules() if not isinstance(m, frozen) for p in m.parameters(recurse=False)]
    heads = getattr(model, "heads", None)
    last = list(heads[-1].parameters()) if isinstance(heads, nn.ModuleList) and len(heads) else []
    trained = [*found, *(p for p in last if all(p is not other for other in found))]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for p in trained))
    return trained


def _may_change(tensor: Tensor, trained: list[nn.Parameter]) -> bool:
    return not isinstance(tensor, nn.Parameter) or any(tensor is p for p in trained)


def _exported(optimizer: torch.optim.Adam, gates: MaskGates) -> dict[str, object]:
    state = optimizer.state[gates.scores]
    moments = {name: state[name].cpu() for name in ("step", "exp_avg", "exp_avg_sq")}
    return {"groups": [group.name for group in gates.groups], **moments}


def _restore(optimizer: torch.optim.Adam, memory: Mapping[str, object], gates: MaskGates) -> None:
    """Go on with the optimiser's state of the client's last mask phase, if it was over the same units."""
    kept = memory.get("optimizer")
    if not isinstance(kept, dict) or kept["groups"] != [group.name for group in gates.groups]:
        return
    if len(kept["exp_avg"]) == len(gates.scores):
        device = gates.scores.device
        moments = {name: kept[name].to(device).clone() for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[gates.scores] = {"step": kept["step"].clone(), **moments}


@lru_cache(maxsize=64)
def mask_macs(full: nn.Module, layout: Layout, spec: SubModelSpec, shape: tuple[int, ...]) -> int:
    """MACs per example of a step of the mask phase on the sub-model of ``spec``; ``full`` is without storage."""
    blank = resize(full, layout, spec)
    freeze(blank)
    return measure_costs(blank, Layout(()), torch.empty(2, *shape, device="meta")).of(FULL).train_macs
