"""Delay compensation, DC-ASGD-a (Zheng et al. 2017, arXiv 1609.08326, algorithm 2 and equation 10), on steps.

With g the gradient, w the present weights and w_bak those that the client started from::

    MeanSquare(t) = m MeanSquare(t-1) + (1 - m) g * g            entry by entry
    lambda_t      = lambda_0 / sqrt(MeanSquare(t) + 1e-7)
    w            <- w - eta (g + lambda_t * g * g * (w - w_bak))

A client here makes many steps of SGD, not one: its whole step d = theta_new - theta_sent takes the place of -eta g.
The adaptive rule does not mind the unit: for g = -c d, the term lambda_t g * g / c is the same for every c > 0, but for
the 1e-7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pruning.extract import State, embed, extract, is_statistic
from pruning.groups import Layout
from pruning.spec import SubModelSpec
from strategies.loop import LoopConfig
from wire.message import Report

EPSILON = 1e-7


def compensate(
    step: Tensor, now: Tensor, sent: Tensor, mean_square: Tensor, strength: float, momentum: float
) -> tuple[Tensor, Tensor]:
    """Return one entry's compensated step and its new mean square; all tensors of the same shape.

    Parameters
    ----------
    step : what the client changed, theta_new - theta_sent.
    now, sent : the entry at present, and as the client received it.
    mean_square : of the steps before.
    strength, momentum : lambda_0 >= 0 and m in [0, 1) of the paper.
    """
    squared = step * step
    mean_square = momentum * mean_square + (1 - momentum) * squared
    return step - strength * squared / torch.sqrt(mean_square + EPSILON) * (now - sent), mean_square


def compensate_report(
    report: Report,
    now: State,
    sent: State,
    mean_square: Mapping[str, Tensor],
    place: tuple[Layout, SubModelSpec],
    loop: LoopConfig,
) -> tuple[Report, dict[str, Tensor]]:
    """Compensate a sub-model's step; returns the report with it, and the full model's new mean square.

    Statistics of BatchNorm are no weights that a gradient moved; they stay as they are.

    Parameters
    ----------
    report : checked; holds steps, and may leave out integer buffers.
    now, sent : the sub-model at present, and as the client received it.
    mean_square : of the full model; entries outside the sub-model keep theirs.
    place : the model's layout, and the sub-model's spec.
    loop : has the strength and the momentum.
    """
    known = extract(mean_square, *place)
    steps = dict(report.state)
    for key, step in report.state.items():
        if key in known:
            steps[key], known[key] = compensate(
                step, now[key], sent[key], known[key], loop.compensation, loop.compensation_momentum
            )
    return replace(report, state=steps), embed(known, *place, mean_square)[0]


def first_mean_square(state: State) -> dict[str, Tensor]:
    """The mean square before the first step: zero for every entry that a gradient moves."""
    return {k: torch.zeros_like(t) for k, t in state.items() if t.is_floating_point() and not is_statistic(k)}
