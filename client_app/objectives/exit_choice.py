"""Which exit a client deploys: the one that is best on its own data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from client_app.objectives.base import Findings, Objective, Task
from client_app.objectives.distillation import exit_logits


def exit_choice(task: Task, inner: Objective) -> Objective:
    """Train as before and note how often each exit was right; evaluate by the exit that was right most often.

    Counted in the first pass over the client's examples, before each batch is trained on: what was just received is
    judged, not what was fitted since. Ties go to the deeper exit.
    """
    num_examples = 0 if task.examples is None else len(task.examples)
    outputs: list[Tensor] = []
    correct: list[int] = []
    num_seen = 0

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training:
            outputs[:] = exit_logits(output)

    inner.model.register_forward_hook(keep)

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal num_seen, correct
        value, logits = inner.loss(x, y)
        if num_seen < num_examples:
            right = [int((z.detach().argmax(1) == y).sum()) for z in outputs]
            correct = [a + b for a, b in zip(correct or [0] * len(right), right, strict=True)]
            num_seen += len(y)
        outputs.clear()
        return value, logits

    def predict(x: Tensor) -> Tensor:
        logits = exit_logits(inner.model(x))
        return logits[best_exit(task.memory.get("exit_accuracy", []), len(logits))]

    def finish(num_steps: int) -> Findings:
        found = inner.finish(num_steps)
        accuracy = [count / max(1, num_seen) for count in correct]
        metrics = {f"exit_{index + 1}_accuracy": value for index, value in enumerate(accuracy)}
        memory = {**found.memory, "exit_accuracy": accuracy}
        return replace(found, memory=memory, metrics={**found.metrics, **metrics})

    return replace(inner, loss=loss, predict=predict, finish=finish)


def best_exit(accuracy: list[float], num_exits: int) -> int:
    """Index of the exit that was right most often, the deeper of equals; the deepest where nothing is known."""
    known = accuracy[:num_exits]
    if not known:
        return num_exits - 1
    return max(range(len(known)), key=lambda index: (known[index], index))
