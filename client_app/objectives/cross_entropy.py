"""Plain classification."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from client_app.objectives.base import Objective, Task, last_logits


def cross_entropy(task: Task) -> Objective:
    """Cross-entropy; with ``mask-missing-labels``, logits of classes the client lacks are set to 0 (HeteroFL)."""
    is_missing = task.label_counts == 0
    masks = bool(task.settings.get("mask-missing-labels", False)) and bool(is_missing.any())

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = last_logits(task.model(x))
        if masks:
            logits = logits.masked_fill(is_missing, 0.0)
        return functional.cross_entropy(logits, y, label_smoothing=task.train.label_smoothing), logits

    return Objective(task.model, loss)
