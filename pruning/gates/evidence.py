"""What the gates of a network do, gathered while it trains: salience, who wins for which class, who never does.

B samples, C units of a layer, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.gates.gate import Gate, top
from pruning.gates.net import Gates

SALIENCE, STATISTICS_OF, OVERLAPS = "gates.salience", "gates.statistics", "gates.overlaps"
"""Names under which tensors of evidence travel."""

MAX_CLASSES = 20
"""Up to so many, the overlaps of all pairs are sent."""

EVERY = 8
"""One batch in so many is looked at closely; salience is summed, and units in use are noted, over all."""

ABSENT = -1.0
"""Overlap of two classes of which a client does not have both; 0 is that of classes without a common winner."""

STATISTICS = ("entropy", "overlap", "never_used_ratio", "agreement")
"""What is said of a layer, all in [0, 1].

entropy : of the winners' frequencies, as a share of what equal frequencies have.
overlap : of two classes' winners, ``sum min(f_a, f_b) / sum max(f_a, f_b)``, mean over pairs of classes.
never_used_ratio : units that won for no sample in any batch, by the winners in force.
agreement : share of a sample's own winners among those that it was given, which others share.
"""


@dataclass
class _Layer:
    salience: Tensor
    counts: Tensor  # [K, C] samples of a class among whose own winners a unit was
    is_used: Tensor  # bool [C], won for any sample so far
    agreed: float = 0.0
    num_seen: int = 0


class Evidence:
    """Looks at the gates after every pass.

    Parameters
    ----------
    gates : of the network.
    num_classes : K.
    """

    def __init__(self, gates: Gates, num_classes: int) -> None:
        self.gates, self.num_classes = gates, num_classes
        self.num_samples, self._num_batches = 0, 0
        self._layers = {
            site.group: _Layer(
                torch.zeros(site.size, device=gate.bias.device),
                torch.zeros(num_classes, site.size, device=gate.bias.device),
                torch.zeros(site.size, dtype=torch.bool, device=gate.bias.device),
            )
            for site, gate in gates.pairs()
        }
        self._class_counts = torch.zeros(num_classes)

    @torch.no_grad()
    def note(self, labels: Tensor) -> None:
        """Take in the pass that was just made; ``labels`` [B] in the order of its images."""
        labels = self.gates.in_pass_order(labels)
        is_close = self._num_batches % EVERY == 0
        self._num_batches += 1
        self.num_samples += len(labels)
        if is_close:
            self._class_counts += torch.bincount(labels, minlength=self.num_classes).cpu()
        for site, gate in self.gates.pairs():
            if gate.winners is None:
                continue
            layer = self._layers[site.group]
            layer.salience += gate.winners.gates.detach().sum(0)
            if not gate.winners.is_everybody:
                won = torch.cat([part for part in gate.winners.parts if part is not None])
                layer.is_used[gate.units[won]] = True
                if is_close:
                    self._look(layer, gate, labels)

    def _look(self, layer: _Layer, gate: Gate, labels: Tensor) -> None:
        assert gate.winners is not None
        held = gate.winners.gates.detach().index_select(1, gate.units)
        own = torch.zeros_like(held).scatter_(1, top(held, gate.k), 1.0)
        given = gate.winners.mask(held.shape[1])
        layer.agreed += float((own * given).sum()) / gate.k
        layer.num_seen += len(labels)
        by_unit = torch.zeros_like(layer.counts).index_add_(
            0, labels, torch.zeros_like(gate.winners.gates).index_copy_(1, gate.units, own)
        )
        layer.counts += by_unit

    def salience(self) -> dict[str, Tensor]:
        """Group -> summed gates of all its units, float [C]."""
        return {name: layer.salience.cpu() for name, layer in self._layers.items()}

    def statistics(self) -> dict[str, dict[str, float]]:
        """Group -> ``STATISTICS``, for the layers in which somebody lost."""
        return {
            name: dict(zip(STATISTICS, self._describe(layer), strict=True))
            for name, layer in self._layers.items()
            if layer.num_seen
        }

    def summary(self) -> dict[str, float]:
        """The statistics' means over layers, for a row of the event log; empty where nobody lost."""
        layers = list(self.statistics().values())
        return {f"gate_{name}": sum(layer[name] for layer in layers) / len(layers) for name in STATISTICS if layers}

    def as_tensors(self) -> dict[str, Tensor]:
        """What a client sends of it: ``STATISTICS`` by site and overlaps by class; empty where nobody lost."""
        found = self.statistics()
        if not found:
            return {}
        blank = dict.fromkeys(STATISTICS, -1.0)
        rows = [list(found.get(site.group, blank).values()) for site in self.gates.sites]
        tensors = {STATISTICS_OF: torch.tensor(rows)}
        return tensors | ({OVERLAPS: self.overlaps()} if self.num_classes <= MAX_CLASSES else {})

    def overlaps(self) -> Tensor:
        """Overlap of the winners of any two classes, [K, K], mean over layers; ``ABSENT`` unless both were seen."""
        blank = torch.full((self.num_classes, self.num_classes), ABSENT)
        found = [self._pairs(layer) for layer in self._layers.values() if layer.num_seen]
        is_seen = self._class_counts > 0
        return torch.where(is_seen[:, None] & is_seen, torch.stack(found).mean(0), blank) if found else blank

    def _pairs(self, layer: _Layer) -> Tensor:
        frequency = layer.counts.cpu() / self._class_counts.clamp(min=1)[:, None]
        least = torch.minimum(frequency[:, None], frequency[None]).sum(2)
        return least / torch.maximum(frequency[:, None], frequency[None]).sum(2).clamp(min=1e-12)

    def _describe(self, layer: _Layer) -> tuple[float, float, float, float]:
        total = layer.counts.sum(0).cpu()
        share = total / total.sum()
        entropy = float(-(share * share.clamp(min=1e-12).log()).sum()) / math.log(len(share))
        seen = (self._class_counts > 0).nonzero().flatten()
        pairs = self._pairs(layer)[seen][:, seen]
        num = len(seen)
        overlap = float((pairs.sum() - pairs.diagonal().sum()) / (num * (num - 1))) if num > 1 else 1.0
        return entropy, overlap, float((~layer.is_used).float().mean()), layer.agreed / layer.num_seen
