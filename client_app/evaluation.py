"""Testing a model: loss and accuracy, and the statistics that its normalisation layers test with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from client_app.data import Examples
from client_app.objectives.base import last_logits


@torch.no_grad()
def evaluate(
    model: nn.Module, examples: Examples, batch_size: int = 256, predict: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float]:
    """Mean loss and accuracy on ``examples``; of the model's deepest exit, or of what ``predict`` makes of images."""
    model.eval()
    predict = predict or (lambda x: last_logits(model(x)))
    total_loss, num_correct = 0.0, 0
    for start in range(0, len(examples), batch_size):
        x, y = examples.batch(slice(start, start + batch_size))
        logits = predict(x)
        total_loss += float(functional.cross_entropy(logits, y, reduction="sum"))
        num_correct += int((logits.argmax(1) == y).sum())
    return {"loss": total_loss / len(examples), "accuracy": num_correct / len(examples)}


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, examples: Examples, batch_size: int = 256) -> None:
    """Replace all BatchNorm running statistics by the means over batches of ``examples``.

    A gated unit's are the means over the batches that it won in; one that won in none keeps the statistics that it has.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.zero_()  # the first batch replaces what is there, if it is a number
        for statistic in (norm.running_mean, norm.running_var):
            if statistic is not None:
                statistic.nan_to_num_()
        norm.momentum = None  # cumulative mean
    model.train()
    for start in range(0, max(1, len(examples) - 1), batch_size):
        model(examples.batch(slice(start, start + batch_size))[0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
