"""Proof of a layout: before it is used, random sub-models must behave like the silenced full model."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor, nn

from pruning.extract import embed, extract, is_variance, resize
from pruning.groups import Group, Layout, LayoutError
from pruning.spec import SubModelSpec

logger = logging.getLogger(__name__)


def silence(state: dict[str, Tensor], layout: Layout, spec: SubModelSpec) -> dict[str, Tensor]:
    """The full state dict with everything ``spec`` does not keep set to zero."""
    zeros = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    return embed(extract(state, layout, spec), layout, spec, zeros)[0]


def proof_error(model: nn.Module, layout: Layout, spec: SubModelSpec, example: Tensor) -> str | None:
    """Say how the sub-model of ``spec`` differs from the silenced full model; None if it does not."""
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    try:
        small = resize(model, layout, spec).eval()
        small.load_state_dict(extract(state, layout, spec), strict=True)
        with torch.no_grad():
            got = small(example)
            model.load_state_dict(silence(state, layout, spec))
            expected = model.eval()(example)
    except Exception as error:  # a foreign forward may raise anything; every failure is a verdict
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        model.load_state_dict(state)
    outputs = list(got) if isinstance(got, list | tuple) else [got]
    wanted = list(expected) if isinstance(expected, list | tuple) else [expected]
    if len(outputs) != len(wanted):
        return f"{len(outputs)} outputs, the silenced full model gives {len(wanted)}"
    for mine, theirs in zip(outputs, wanted, strict=True):
        if mine.shape != theirs.shape:
            return f"logits have shape {tuple(mine.shape)}, the silenced full model gives {tuple(theirs.shape)}"
        scale = max(1.0, float(theirs.abs().max()))
        gap = float((mine - theirs).abs().max())
        if not gap <= 1e-4 * scale:
            return f"logits differ from the silenced full model by {gap:.3g}"
    return None


def prove(
    model: nn.Module, layout: Layout, example: Tensor, *, declared: bool, seed: int = 0, trials: int = 2
) -> Layout:
    """Prove ``layout`` on ``model`` and return what of it holds.

    Parameters
    ----------
    model : full model with real weights (not on ``meta``); left as it was.
    example : one batch, [batch, ...].
    declared : a group that fails is an error; otherwise it is kept whole, with a warning that names it.
    trials : random specs for all groups together.

    Raises
    ------
    LayoutError
        If a declared group fails, or nothing of the layout holds together.
    """
    layout.check({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()})
    was_training = model.training
    before = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    rng = np.random.default_rng(seed)
    try:
        _randomize(model, seed)
        for _ in range(trials):
            error = proof_error(model, layout, random_spec(layout.prunable, rng), example)
            if error is not None:
                layout = _without_failing(model, layout, example, rng, declared, error)
    finally:
        model.load_state_dict(before)
        model.train(was_training)
    return layout


def _without_failing(
    model: nn.Module, layout: Layout, example: Tensor, rng: np.random.Generator, declared: bool, error: str
) -> Layout:
    failing = {}
    for group in layout.prunable:
        reason = proof_error(model, layout, random_spec((group,), rng), example)
        if reason is not None:
            failing[group.name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in failing.items()) or error
    if declared:
        raise LayoutError(f"declared layout does not hold: {reasons}")
    reduced = layout.without(list(failing))
    again = proof_error(model, reduced, random_spec(reduced.prunable, rng), example)
    if not failing or again is not None:
        raise LayoutError(f"traced layout does not hold: {reasons if not failing else again}; use a declared layout")
    for name, reason in failing.items():
        logger.warning("group %s is kept whole: its layout could not be proved (%s)", name, reason)
    return reduced


def random_spec(groups: tuple[Group, ...], rng: np.random.Generator) -> SubModelSpec:
    """Keep a random non-empty part of each of ``groups``; never all of a group, which would prove nothing."""
    kept = {}
    for group in groups:
        width = int(rng.integers(1, max(2, group.size)))
        kept[group.name] = tuple(int(u) for u in rng.permutation(group.size)[:width])
    return SubModelSpec.of(kept)


def _randomize(model: nn.Module, seed: int) -> None:
    """Give every entry a generic value, so that a wrong pairing of units cannot hide behind ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.rand(tensor.shape, generator=generator)
            if tensor.dim() > 1:
                tensor.copy_((2 * noise - 1) * (3.0 / max(1, tensor[0].numel())) ** 0.5)
            elif is_variance(key):
                tensor.copy_(0.5 + noise)
            else:
                tensor.copy_(noise - 0.3)
