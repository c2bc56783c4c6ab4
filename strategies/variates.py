"""The server's half of SCAFFOLD's control variates, on sub-models that may be unequal.

For every entry k of a parameter, ``c_k = sum_i w_i c_ik / sum_i w_i`` over the clients i whose sub-model holds it: the
corrections ``c - c_i`` of those who train an entry cancel (weighted as their updates are). With full models and equal
weights this is the paper's ``c = 1/N sum_i c_i`` (Karimireddy et al. 2020, arXiv 1910.06378, section 4). The sums are
kept up by the changes ``c_i+ - c_i`` that clients send; no c_i is ever stored here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruning.extract import Selection, selection, shapes_of
from pruning.groups import Layout
from pruning.rows import add_at, gather
from pruning.spec import SubModelSpec
from strategies.robust import RobustConfig
from wire.flat import refuse
from wire.message import Job, State
from wire.training import VARIATE

PLAIN = RobustConfig()


class VariateError(ValueError):
    """A client's change of its variate does not fit; the answer is turned away."""


@dataclass(frozen=True)
class Change:
    """One client's ``c_i+ - c_i``, checked: its tensors by parameter, and where they lie in the full model."""

    partition_id: int
    tensors: Mapping[str, Tensor]
    chosen: Selection


class Variates:
    """c, what it is the mean of, and what has arrived since it was last closed.

    Parameters
    ----------
    state : full state dict; gives the shapes.
    layout : what can be pruned in it.
    trainable : keys of the parameters; buffers have no variates.
    specs : every client's sub-model, by partition id. It must stay the same: holders that change from round to round
        have corrections that do not cancel. Clients that choose a part of it themselves (``narrowed``) are fine: what
        they leave out keeps its variate.
    """

    def __init__(
        self, state: State, layout: Layout, trainable: Collection[str], specs: Mapping[int, SubModelSpec]
    ) -> None:
        self.layout, self.specs = layout, dict(specs)
        self.shapes = shapes_of(state)
        self.value = {key: torch.zeros(tensor.shape) for key, tensor in state.items() if key in trainable}
        self._totals = {key: torch.zeros(tensor.shape) for key, tensor in self.value.items()}
        self._holders: dict[str, Tensor] = {}
        self._weights: dict[int, float] = {}

    def companions(self, spec: SubModelSpec) -> Callable[[], State]:
        """Makes what goes with a request: the entries of c that ``spec`` holds, as they are now."""
        value, places = self.value, self._selection(spec).positions
        keys = [key for key in value if key in places]
        return lambda: {VARIATE + key: gather(value[key], places[key]).contiguous() for key in keys}

    def change(self, partition_id: int, companions: State, narrowed: SubModelSpec | None = None) -> Change:
        """Read and check a client's ``c_i+ - c_i`` out of the companions of its report; changes nothing.

        Parameters
        ----------
        narrowed : the part of its sub-model that it reports about; None for all of it.

        Raises
        ------
        VariateError
            If an entry is missing, unexpected or of another shape.
        """
        chosen = self._selection(narrowed or self.specs[partition_id])
        change = {key.removeprefix(VARIATE): t for key, t in companions.items() if key.startswith(VARIATE)}
        expected = self.value.keys() & chosen.positions.keys()
        if change.keys() != expected:
            missing, extra = sorted(expected - change.keys()), sorted(change.keys() - expected)
            raise VariateError(f"report: variates: missing entries {missing}, unexpected entries {extra}")
        for key, tensor in change.items():
            shape = chosen.shape_of(key, tuple(self.value[key].shape))
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise VariateError(
                    f"report: variate {key!r} should be real with shape {shape}, got {tensor.dtype} "
                    f"{tuple(tensor.shape)}"
                )
        return Change(partition_id, change, chosen)

    def add(self, change: Change, weight: float) -> None:
        """Take a change into the sums; c itself moves with ``close``.

        Parameters
        ----------
        weight : the client's in the mean, > 0; that of its first answer holds for good.
        """
        if change.partition_id not in self._weights:
            self._weights[change.partition_id] = weight
            self._holders = {}
        for key, tensor in change.tensors.items():
            places = change.chosen.positions[key]
            add_at(self._totals[key], places, tensor.float(), self._weights[change.partition_id])

    def close(self) -> None:
        """Put the changes in force: what is sent from now on carries the new c."""
        self._holders = self._holders or self._weigh()
        self.value = {key: total / self._holders[key].clamp(min=1e-30) for key, total in self._totals.items()}

    def _weigh(self) -> dict[str, Tensor]:
        """``sum_i w_i`` of every entry's holders; a client not heard of yet counts with the others' mean weight."""
        typical = sum(self._weights.values()) / len(self._weights) if self._weights else 1.0
        by_spec: dict[SubModelSpec, float] = {}
        for partition_id, spec in self.specs.items():
            by_spec[spec] = by_spec.get(spec, 0.0) + self._weights.get(partition_id, typical)
        holders = {key: torch.zeros(total.shape) for key, total in self._totals.items()}
        for spec, weight in by_spec.items():
            chosen = self._selection(spec)
            for key in holders.keys() & chosen.positions.keys():
                ones = torch.ones(chosen.shape_of(key, tuple(holders[key].shape)))
                add_at(holders[key], chosen.positions[key], ones, weight)
        return holders

    def _selection(self, spec: SubModelSpec) -> Selection:
        return selection(self.layout, spec, self.shapes)

    def export_state(self) -> dict[str, Any]:
        """For a checkpoint made after ``close``: everything but what the run's configuration says anyway."""
        totals = {key: total.clone() for key, total in self._totals.items()}  # ours go on changing in place
        return {"totals": totals, "weights": {str(pid): w for pid, w in self._weights.items()}}

    def import_state(self, own: dict[str, Any]) -> None:
        """Go on from ``export_state``."""
        self._totals = {key: total.clone() for key, total in own["totals"].items()}
        self._weights = {int(pid): weight for pid, weight in own["weights"].items()}
        self._holders = {}
        self.close()


def check_variates(name: str, job: Job, robust: RobustConfig = PLAIN) -> None:
    """Refuse what control variates cannot go with, for the method called ``name``.

    Raises
    ------
    ConfigError
        If updates are compressed or merged robustly, the optimiser is not SGD, or clients have nowhere to remember
        their variates.
    """
    refuse(
        not robust.is_plain,
        f"strategy={name} with robust.centre={robust.centre}",
        "the server's variate is a plain sum of what clients say about theirs, which one client that lies decides; use "
        "robust.centre=mean without clipping, or a method without variates",
    )
    refuse(
        job.compression.kind != "none",
        f"strategy={name} with compression.kind={job.compression.kind}",
        "the corrections of one round cancel over its clients, and compression holds another part of each back for "
        "later rounds; use compression.kind=none",
    )
    refuse(
        job.train.optimizer != "sgd",
        f"strategy={name} with train.optimizer={job.train.optimizer}",
        "a variate is the mean gradient behind (x - y_i) / (K eta), which only steps of SGD tell; use "
        "train.optimizer=sgd",
    )
    refuse(not job.store_dir, f"strategy={name}", "clients need a folder to remember their variates in (store_dir)")
