"""Per-client masks over shared server weights: their values, and one training step of weights and mask logits.

The server weights of client i are U * m(V_i), element by element (AdaSplit, arXiv 2112.01637): U is shared, the logits
V_i are the client's own. With G the gradient of the loss with respect to the product, s = sigmoid(V) and the penalty
lambda * sum s::

    soft   m = s                 dU = G m      dV = (G U + lambda) s (1 - s)
    hard   m = 1 where s >= threshold, else 0; the same dV (straight through), but what is 0 is frozen: neither U nor V
           nor their optimisers' moments move there
    none   m = 1                 dU = G        no V

All vectors are flat [num_weights], so that a step is a dozen passes over memory whatever the number of layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wire.flat import require


@dataclass(frozen=True)
class MaskConfig:
    """Settings of the masks.

    Attributes
    ----------
    kind : ``soft``, ``hard`` or ``none``.
    penalty : lambda, of the sum of the mask's values.
    start : first logit; sigmoid(2) = .88.
    threshold : below it an entry of a hard mask is 0.
    learning_rate : of the logits, under Adam.
    """

    kind: str = "soft"
    penalty: float = 1e-4
    start: float = 2.0
    threshold: float = 0.1
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        """Check every range."""
        require(self.kind in ("soft", "hard", "none"), "kind", self.kind, "'soft', 'hard' or 'none'")
        require(self.penalty >= 0, "penalty", self.penalty, ">= 0")
        require(0 < self.threshold < 1, "threshold", self.threshold, "in (0, 1)")
        require(self.learning_rate > 0, "learning-rate", self.learning_rate, "> 0")


def mask_values(probabilities: Tensor, config: MaskConfig) -> Tensor:
    """m of s = sigmoid(V), [num_weights]."""
    if config.kind == "hard":
        return (probabilities >= config.threshold).to(probabilities.dtype)
    return probabilities


def mask_gradients(
    weights: Tensor, probabilities: Tensor, gradient: Tensor, config: MaskConfig
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of one step.

    Parameters
    ----------
    weights : U, [num_weights].
    probabilities : s = sigmoid(V), [num_weights].
    gradient : of the loss with respect to U * m(V), [num_weights].

    Returns
    -------
    dU, dV, held
        ``held`` is false where a hard mask froze an entry; None where nothing is frozen.
    """
    slope = torch.addcmul(probabilities, probabilities, probabilities, value=-1)
    slope.mul_((gradient * weights).add_(config.penalty))
    if config.kind != "hard":
        return probabilities * gradient, slope, None
    held = probabilities >= config.threshold
    if bool(held.all()):
        return gradient, slope, None
    return gradient * held, slope.mul_(held), held


def step_(optimizer: torch.optim.Optimizer, gradient: Tensor, held: Tensor | None = None) -> None:
    """One step of an optimiser of one flat vector; where ``held`` is false, neither vector nor moments move."""
    vector = optimizer.param_groups[0]["params"][0]
    before = [] if held is None else [t.detach().clone() for t in _moving(optimizer, vector)]
    vector.grad = gradient
    optimizer.step()
    vector.grad = None
    if held is not None:
        after = _moving(optimizer, vector)
        before += [torch.zeros_like(vector)] * (len(after) - len(before))  # moments that this step made
        for tensor, old in zip(after, before, strict=True):
            tensor.copy_(torch.where(held, tensor, old))


def _moving(optimizer: torch.optim.Optimizer, vector: Tensor) -> list[Tensor]:
    moments = optimizer.state.get(vector, {})
    return [vector.data, *(t for t in moments.values() if isinstance(t, Tensor) and t.shape == vector.shape)]
