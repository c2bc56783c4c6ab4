"""Per-client masks over shared server weights: their values, and one training step of weights and mask logits.

The server weights of client i are U * m(V_i), element by element (AdaSplit, arXiv 2112.01637): U is shared, the logits
V_i are the client's own. With G the gradient of the loss with respect to the product, s = sigmoid(V) and the penalty
lambda * sum s::

    soft   m = s                 dU = G m      dV = (G U + lambda) s (1 - s)
    hard   m = 1 where s >= threshold, else 0; the same dV (straight through), but what is 0 is frozen: neither U nor
           its optimiser's moments move there in this client's steps, and V stays for good
    none   m = 1                 dU = G        no V

All vectors are flat [num_weights]: what a step costs beside the network is passes over memory, so there are few,
whatever the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wire.flat import kebab, require

PIECE = 2**16
"""Entries at a time: four float32 vectors of so many lie in a second-level cache."""


@dataclass(frozen=True)
class MaskConfig:
    """Settings of the masks.

    Attributes
    ----------
    kind : ``soft``, ``hard`` or ``none``.
    penalty : lambda, of the sum of a soft mask's values.
    start : first logit; sigmoid(2) = .88.
    threshold : below it an entry of a hard mask is 0; at .5 that is a logit below 0.
    learning_rate : of a soft mask's logits, under Adam.
    hard_penalty, hard_learning_rate : the same of hard masks. Under Adam a logit falls by its rate a step at most,
        whatever the penalty: it must reach the threshold within a run, and the loss must be able to hold it.
    """

    kind: str = "soft"
    penalty: float = 1e-4
    start: float = 2.0
    threshold: float = 0.5
    learning_rate: float = 1e-3
    hard_penalty: float = 1e-6
    hard_learning_rate: float = 0.1

    def __post_init__(self) -> None:
        """Check every range."""
        require(self.kind in ("soft", "hard", "none"), "kind", self.kind, "'soft', 'hard' or 'none'")
        require(0 < self.threshold < 1, "threshold", self.threshold, "in (0, 1)")
        for key in ("penalty", "hard_penalty"):
            require(getattr(self, key) >= 0, kebab(key), getattr(self, key), ">= 0")
        for key in ("learning_rate", "hard_learning_rate"):
            require(getattr(self, key) > 0, kebab(key), getattr(self, key), "> 0")
        first = self.threshold_logit
        is_on = self.kind != "hard" or self.start > first
        require(is_on, "start", self.start, f"> {first:.3g}, the threshold's logit: what begins masked stays masked")

    @property
    def threshold_logit(self) -> float:
        """V where sigmoid(V) is the threshold."""
        return math.log(self.threshold / (1 - self.threshold))

    @property
    def penalty_in_force(self) -> float:
        """lambda of this kind of mask."""
        return self.hard_penalty if self.kind == "hard" else self.penalty

    @property
    def rate_in_force(self) -> float:
        """Learning rate of this kind of mask."""
        return self.hard_learning_rate if self.kind == "hard" else self.learning_rate


def mask_weights(weights: Tensor, logits: Tensor, config: MaskConfig, seen: Tensor, probabilities: Tensor) -> None:
    """Write s = sigmoid(V) into ``probabilities`` and U * m(V) into ``seen``; all [num_weights]."""
    for u, v, product, s in _pieces(weights, logits, seen, probabilities):
        torch.sigmoid(v, out=s)
        if config.kind == "soft":
            torch.mul(u, s, out=product)
        elif (held := _held(s, config)) is None:
            product.copy_(u)
        else:
            torch.mul(u, held, out=product)


def mask_gradients_(weights: Tensor, probabilities: Tensor, gradient: Tensor, config: MaskConfig) -> Tensor | None:
    """Gradients of one step, in place: ``gradient`` becomes dU, and ``probabilities`` becomes dV.

    Parameters
    ----------
    weights : U, [num_weights].
    probabilities : s = sigmoid(V), [num_weights].
    gradient : of the loss with respect to U * m(V), [num_weights].

    Returns
    -------
    frozen
        float32 [num_weights], 1 for the entries that a hard mask holds where they are, 0 for the others; None where
        there are none.
    """
    start, penalty = 0, torch.tensor(config.penalty_in_force)
    frozen: Tensor | None = None
    for u, s, g in _pieces(weights, probabilities, gradient):
        held = _held(s, config) if config.kind == "hard" else None
        of_mask = torch.addcmul(penalty, g, u)
        if config.kind == "soft":
            g.mul_(s)
        s.addcmul_(s, s, value=-1).mul_(of_mask)
        if held is not None:
            g.mul_(held)
            s.mul_(held)
            frozen = torch.zeros_like(weights) if frozen is None else frozen
            torch.sub(1.0, held, out=frozen[start : start + len(s)])
        start += len(s)
    return frozen


def _held(probabilities: Tensor, config: MaskConfig) -> Tensor | None:
    """A hard mask, 1 or 0; None where nothing is below the threshold, which is told faster."""
    if float(probabilities.min()) >= config.threshold:
        return None
    return (probabilities >= config.threshold).to(probabilities.dtype)


def _pieces(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of vectors of equal length that a processor's cache holds: each is read from memory once."""
    return zip(*(vector.split(PIECE) for vector in vectors), strict=True)


def step_(optimizer: torch.optim.Optimizer, gradient: Tensor, frozen: Tensor | None = None) -> None:
    """One step of an optimiser of one flat vector; where it is ``frozen`` (1, not 0), neither vector nor moments move.

    Everything moves and is put back: with half of all entries frozen, gathering them by index takes ten times as long.
    """
    vector = optimizer.param_groups[0]["params"][0]
    before = [] if frozen is None else [t.clone() for t in _moving(optimizer, vector)]
    vector.grad = gradient
    optimizer.step()
    vector.grad = None
    if frozen is not None:
        after = _moving(optimizer, vector)
        before += [torch.zeros_like(vector)] * (len(after) - len(before))  # moments that this step made
        for tensor, old in zip(after, before, strict=True):
            tensor.lerp_(old, frozen)  # exactly either of the two, weights being 0 and 1


def step_logits_(optimizer: torch.optim.Adam, gradient: Tensor, frozen: Tensor | None = None) -> None:
    """One step of a mask's logits; a frozen one has no gradient, and without momentum either Adam leaves it alone.

    It never moves again, so that its momentum may be forgotten: cheaper than putting back as ``step_`` does.
    """
    logits = optimizer.param_groups[0]["params"][0]
    momentum = optimizer.state[logits].get("exp_avg")
    if frozen is not None and momentum is not None:
        momentum.addcmul_(momentum, frozen, value=-1)
    step_(optimizer, gradient)


def _moving(optimizer: torch.optim.Optimizer, vector: Tensor) -> list[Tensor]:
    moments = optimizer.state.get(vector, {})
    return [vector.data, *(t for t in moments.values() if isinstance(t, Tensor) and t.shape == vector.shape)]
