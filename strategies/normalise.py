"""Normalised averaging (FedNova: Wang et al. 2020, arXiv 2007.07481): clients that step more do not count for more.

``x+ = x + tau_eff sum_i p_i d_i / a_i`` with ``d_i = y_i - x``, ``a_i`` how far client i's steps go along a constant
gradient (``wire.training.local_distance``), ``p_i`` its weight, ``tau_eff = sum_i p_i a_i`` (equation 8). Streaming:
every update is scaled by ``a_ref / a_i`` when it comes, a_ref being the round's first, and the mean by ``tau_eff /
a_ref`` at the end. Equal steps thus change nothing, to the bit. Buffers are averaged as they are.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from wire.message import Report, State, TrainConfig

SLACK = 2
"""How many times the steps that were asked for are believed: objectives may batch in their own way."""


class NormaliseError(ValueError):
    """An answer's steps cannot be normalised; it is turned away."""


@dataclass(frozen=True)
class StepTally:
    """What one round's answers came to so far; empty at its beginning.

    Attributes
    ----------
    reference : a_ref, the distance of the first answer.
    weight : sum of the weights.
    weighted_ratio : sum of ``weight * a_i / a_ref``.
    """

    reference: float = 0.0
    weight: float = 0.0
    weighted_ratio: float = 0.0

    def factor(self, distance: float) -> float:
        """What an update of ``distance`` a_i is multiplied with: ``a_ref / a_i``.

        Raises
        ------
        NormaliseError
            If the distance is not positive and finite: the client made no step.
        """
        if not 0 < distance < math.inf:
            raise NormaliseError(
                f"report: num-steps: its steps come to a distance of {distance}, expected a finite number > 0"
            )
        return (self.reference or distance) / distance

    def noted(self, distance: float, weight: float) -> StepTally:
        """The tally with one more answer."""
        reference = self.reference or distance
        return StepTally(reference, self.weight + weight, self.weighted_ratio + weight * (distance / reference))

    @property
    def effective(self) -> float:
        """``tau_eff / a_ref``, what the mean of the scaled updates is multiplied with; 1 for an empty tally."""
        return self.weighted_ratio / self.weight if self.weight else 1.0


def check_steps(report: Report, train: TrainConfig, work_ratio: float) -> None:
    """Raise ``NormaliseError`` for more steps than the request and the client's examples are good for."""
    num_batches = math.ceil(report.num_examples / train.batch_size)
    most = SLACK * max(1, math.ceil(work_ratio * train.local_epochs * num_batches))
    if report.num_steps > most:
        raise NormaliseError(
            f"report: num-steps: got {report.num_steps}, expected at most {most} with {report.num_examples} examples"
        )


def scaled(state: State, start: State, trainable: Collection[str], factor: float) -> dict[str, Tensor]:
    """``start + factor (state - start)`` for the parameters; buffers, and everything under factor 1, as they are."""
    if factor == 1.0:
        return dict(state)
    return {
        key: start[key] + factor * (tensor - start[key]) if key in trainable and key in start else tensor
        for key, tensor in state.items()
    }
