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
STEPPED = 2**18
"""The same of an optimiser's step, whose call costs as much as a thousand of them."""
MOMENTS = 2
"""Vectors that an optimiser remembers at most."""

Frozen = list[Tensor | None]
"""Of every ``STEPPED`` entries: float32, 1 for those that a hard mask holds where they are, 0 for the others; or None
where it holds none."""


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
        else:
            torch.ge(s, config.threshold, out=product).mul_(u)


def mask_gradients_(weights: Tensor, probabilities: Tensor, gradient: Tensor, config: MaskConfig) -> Frozen:
    """Gradients of one step, in place: ``gradient`` becomes dU, and ``probabilities`` becomes dV.

    Parameters
    ----------
    weights : U, [num_weights].
    probabilities : s = sigmoid(V), [num_weights].
    gradient : of the loss with respect to U * m(V), [num_weights].

    Returns
    -------
    frozen
        What a hard mask holds; of soft masks nothing.
    """
    penalty = torch.tensor(config.penalty_in_force)
    room = torch.empty(min(PIECE, len(weights)))  # fresh memory costs more than what is computed in it
    frozen: Frozen = []
    for us, ss, gs in zip(*(vector.split(STEPPED) for vector in (weights, probabilities, gradient)), strict=True):
        is_any_held = config.kind == "hard" and len(ss) > 0 and float(ss.min()) < config.threshold
        held = torch.lt(ss, config.threshold, out=torch.empty_like(ss)) if is_any_held else None
        for u, s, g in _pieces(us, ss, gs):
            of_mask = torch.addcmul(penalty, g, u, out=room[: len(s)])
            if config.kind == "soft":
                g.mul_(s)
            s.addcmul_(s, s, value=-1).mul_(of_mask)
        if held is not None:
            for slopes in (gs, ss):
                slopes.addcmul_(slopes, held, value=-1)
        frozen.append(held)
    return frozen


def _pieces(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of vectors of equal length that a processor's cache holds: each is read from memory once."""
    return zip(*(vector.split(PIECE) for vector in vectors), strict=True)


def step_(optimizer: torch.optim.Optimizer, gradient: Tensor, frozen: Frozen | None = None) -> None:
    """One step of an optimiser of a flat vector's parts, ``STEPPED`` entries each; nothing that is frozen moves.

    Everything moves and is put back, part by part: with half of all entries frozen, gathering them by index takes ten
    times as long.
    """
    parts = optimizer.param_groups[0]["params"]
    slopes = gradient.split([len(part) for part in parts])
    found = list(zip(parts, slopes, [None] * len(parts) if frozen is None else frozen, strict=True))
    room = torch.empty(1 + MOMENTS, max(map(len, parts), default=0))
    for part, slope, held in found:
        if held is not None:
            part.grad = slope
            before = [kept[: len(part)].copy_(t) for kept, t in zip(room, _moving(optimizer, part), strict=False)]
            optimizer.step()  # only of the part that has a gradient
            part.grad = None
            after = _moving(optimizer, part)
            before += [torch.zeros_like(part)] * (len(after) - len(before))  # moments that this step made
            for tensor, old in zip(after, before, strict=True):
                tensor.lerp_(old, held)  # exactly either of the two, weights being 0 and 1
    for part, slope, held in found:
        part.grad = slope if held is None else None
    optimizer.step()
    for part in parts:
        part.grad = None


def step_logits_(optimizer: torch.optim.Adam, gradient: Tensor, frozen: Frozen | None = None) -> None:
    """One step of a mask's logits [num_weights]; those that are frozen stay for good.

    The gradient must be 0 there, and the Adam without weight decay: then a logit that has lost its momentum is left
    alone, which is cheaper than putting back as ``step_`` does.
    """
    logits = optimizer.param_groups[0]["params"][0]
    momentum = optimizer.state[logits].get("exp_avg")
    if frozen is not None and momentum is not None:
        for part, held in zip(momentum.split(STEPPED), frozen, strict=True):
            if held is not None:
                part.addcmul_(part, held, value=-1)
    step_(optimizer, gradient)


def _moving(optimizer: torch.optim.Optimizer, vector: Tensor) -> list[Tensor]:
    moments = optimizer.state.get(vector, {})
    return [vector.data, *(t for t in moments.values() if isinstance(t, Tensor) and t.shape == vector.shape)]
