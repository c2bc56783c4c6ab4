"""One upload of smashed data: activations, labels and step numbers, as the companions of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wire.activations import BITMAP, VALUES, ActivationError, decode

LABELS, STEPS = "labels", "steps"


@dataclass(frozen=True)
class SmashedStep:
    """One step of one client.

    Attributes
    ----------
    step : its number in the round.
    activations : float32 [batch, ...].
    labels : int64 [batch].
    """

    step: int
    activations: Tensor
    labels: Tensor


def label_type(num_classes: int) -> torch.dtype:
    """The narrowest integer that holds every label."""
    return torch.uint8 if num_classes <= 256 else torch.int32


def pack_upload(activations: Mapping[str, Tensor], labels: Tensor, steps: Tensor) -> dict[str, Tensor]:
    """Companions of a report.

    Parameters
    ----------
    activations : as ``wire.activations.encode`` made them.
    labels : [samples].
    steps : int32 [num_steps, 2], number and batch size of every step.
    """
    return {**activations, LABELS: labels, STEPS: steps}


def unpack_upload(
    companions: Mapping[str, Tensor], sample_shape: Sequence[int], num_classes: int, num_steps: int, step_size: int
) -> tuple[SmashedStep, ...]:
    """The steps of an upload.

    Parameters
    ----------
    num_steps, step_size : the most steps, and samples of a step, that were asked for. A bitmap of nothing is a 32nd of
        what it unfolds to: beyond them nothing is unfolded.

    Raises
    ------
    ActivationError
        If there is more than was asked for, an entry is missing or too many, truncated, mis-shaped, of another type or
        not finite, or a label is outside the output layer.
    """
    missing, extra = {VALUES, LABELS, STEPS} - companions.keys(), companions.keys() - {VALUES, BITMAP, LABELS, STEPS}
    if missing or extra:
        raise ActivationError(f"upload: missing entries {sorted(missing)}, unexpected entries {sorted(extra)}")
    labels, steps = companions[LABELS], companions[STEPS]
    if labels.dtype != label_type(num_classes) or labels.dim() != 1:
        raise ActivationError(
            f"upload: labels should be {label_type(num_classes)} in one row, got {labels.dtype} {tuple(labels.shape)}"
        )
    if steps.dtype != torch.int32 or steps.dim() != 2 or steps.shape[1] != 2 or bool((steps < 0).any()):
        raise ActivationError(f"upload: steps should be int32 of shape (n, 2), got {steps.dtype} {tuple(steps.shape)}")
    sizes = steps[:, 1].tolist()
    if 0 in sizes:
        raise ActivationError(f"upload: step {int(steps[sizes.index(0), 0])} has no samples")
    if len(sizes) > num_steps or max(sizes, default=0) > step_size:
        raise ActivationError(
            f"upload: expected at most {num_steps} steps of at most {step_size} samples, got {len(sizes)} of up to "
            f"{max(sizes)}"
        )
    if sum(sizes) != len(labels):
        raise ActivationError(f"upload: labels should have shape ({sum(sizes)},), got ({len(labels)},)")
    labels = labels.to(torch.int64)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ActivationError(
            f"upload: labels should lie in 0 to {num_classes - 1}, the output layer, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    dense = decode({k: companions[k] for k in (VALUES, BITMAP) if k in companions}, (len(labels), *sample_shape))
    parts = zip(steps[:, 0].tolist(), dense.split(sizes), labels.split(sizes), strict=True)
    return tuple(SmashedStep(step, activations, y) for step, activations, y in parts)
