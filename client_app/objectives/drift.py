"""Corrections against client drift: they change the gradients, whatever the loss is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from client_app.objectives.base import Findings, Objective, ObjectiveError, Task
from pruning.extract import Shapes, narrow, selection, shapes_of
from pruning.rows import add_at, gather
from pruning.spec import SubModelSpec
from wire.message import state_bytes
from wire.training import VARIATE, local_distances


def proximal(task: Task, inner: Objective) -> Objective:
    """FedProx (Li et al. 2020, arXiv 1812.06127, equation 2): the gradient of ``mu / 2 ||w - w_received||^2``.

    It is added to the gradients and not to the loss, so that losses compare and no graph is built. Setting: ``mu``.
    """
    mu = float(task.settings.get("mu", 0.0))
    if mu == 0:
        return inner
    _check_reachable("proximal", inner)
    trained = [parameter for parameter in inner.model.parameters() if parameter.requires_grad]
    anchors = [parameter.detach().clone() for parameter in trained]

    def correct() -> None:
        inner.correct()
        for parameter, anchor in zip(trained, anchors, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=mu)

    kept_bytes = inner.kept_bytes + sum(anchor.numel() * anchor.element_size() for anchor in anchors)
    return replace(inner, correct=correct, kept_bytes=kept_bytes)


def variates(task: Task, inner: Objective) -> Objective:
    """SCAFFOLD's local half (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1, option II).

    Every gradient becomes ``g - c_i + c``; afterwards ``c_i+ = c_i - c + (x - y_i) / (A eta)``, where A, the number of
    steps in the paper, is what the optimiser makes of them (``wire.training.local_distances``); of those that moved the
    entry, where a base keeps parts of the model still (``Objective.steps_of``), so that one that never moved keeps its
    c_i. c comes with the request (missing entries are zero), ``c_i+ - c_i`` goes back beside the weights. c_i is
    remembered for every entry that this client ever trained, in the full model's coordinates: it follows the sub-model
    wherever that goes. Buffers have no variates.
    """
    _check_reachable("variates", inner)
    shapes = shapes_of(task.full.state_dict())
    held = inner.narrowed or task.spec
    trained = {name: p for name, p in inner.model.named_parameters() if p.requires_grad}
    _check_shapes(task, trained, held, shapes)
    memory: Mapping[str, Tensor] = task.memory.get("variates", {})
    places = selection(task.layout, held, shapes).positions
    sent = {k.removeprefix(VARIATE): t for k, t in task.companions.items() if k.startswith(VARIATE)}
    server = sent if held == task.spec else narrow(sent, task.layout, task.spec, held, shapes)
    own = {name: gather(memory[name], places[name]) for name in trained if name in memory}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    nothing = torch.zeros(())
    shift = {name: server.get(name, torch.zeros_like(x)) - own.get(name, nothing).to(x) for name, x in start.items()}

    def correct() -> None:
        inner.correct()
        for name, parameter in trained.items():
            if parameter.grad is None:
                parameter.grad = shift[name].clone()
            else:
                parameter.grad.add_(shift[name])

    def finish(num_steps: int) -> Findings:
        distances = local_distances(task.train, num_steps, task.learning_rate, float(task.settings.get("mu", 0.0)))
        change, steps_of = {}, inner.steps_of()
        for name, parameter in trained.items():
            num_moves = steps_of.get(name)
            distance = distances[-1] if num_moves is None else torch.tensor(distances).to(parameter)[num_moves]
            slope = (start[name] - parameter.detach()) / (distance * task.learning_rate)
            change[name] = (slope - shift[name]).cpu() - own.get(name, nothing)
            if num_moves is not None:
                change[name] = torch.where(num_moves.cpu() > 0, change[name], 0.0)
        findings = inner.finish(num_steps)
        final = findings.narrowed or held
        if final != held:
            change = dict(narrow(change, task.layout, held, final, shapes))
        remembered = _moved(memory, change, selection(task.layout, final, shapes).positions, dict(shapes))
        return replace(
            findings,
            companions={**findings.companions, **{VARIATE + name: tensor for name, tensor in change.items()}},
            memory={**findings.memory, "variates": remembered},
        )

    kept_bytes = inner.kept_bytes + state_bytes(start) + state_bytes(shift)
    return replace(inner, correct=correct, finish=finish, kept_bytes=kept_bytes)


def _check_reachable(correction: str, inner: Objective) -> None:
    if inner.train is not None:
        raise ObjectiveError(
            f"{correction}: the base trains in a way of its own, where no correction reaches a gradient"
        )


def _check_shapes(task: Task, trained: Mapping[str, Tensor], held: SubModelSpec, shapes: Shapes) -> None:
    places, full = selection(task.layout, held, shapes), dict(shapes)
    for name, parameter in trained.items():
        if name not in places.positions or places.shape_of(name, full[name]) != tuple(parameter.shape):
            raise ObjectiveError(
                f"variates: the base trains {name!r} {tuple(parameter.shape)}, which is not what the client was sent; "
                "a base that chooses a part before training must say which (Objective.narrowed)"
            )


def _moved(
    memory: Mapping[str, Tensor],
    change: Mapping[str, Tensor],
    places: Mapping[str, tuple],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    """``memory`` in full coordinates plus ``change`` at its places."""
    moved = dict(memory)
    for name, tensor in change.items():
        moved[name] = memory[name].clone() if name in memory else torch.zeros(shapes[name])
        add_at(moved[name], places[name], tensor, 1.0)
    return moved
