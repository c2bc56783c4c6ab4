"""Only capable: the full model, trained by those clients alone that can hold it. A baseline that papers omit.

Everybody else's data is lost; a method for unequal devices has to show that their part is worth more than it costs.
Capable is who is among the fastest ``share`` of the fleet *and* has memory for training the full model. Averaged as in
FedAvg; the model is tested on everybody's data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from pruning.spec import FULL
from strategies.base import SubModelStrategy
from wire.flat import refuse, require
from wire.training import optimizer_slots


@dataclass(frozen=True)
class OnlyCapableConfig:
    """Settings of only-capable.

    Attributes
    ----------
    share : of the fleet that is fast enough, in (0, 1]; the fastest devices, at least one.
    memory_share : of a device's memory that training may take up, in (0, 1].
    clients : partition ids that are capable, comma-separated, where the devices are not known (deployment); empty to
        tell by ``share`` and ``memory-share``.
    """

    share: float = 0.5
    memory_share: float = 0.5
    clients: str = ""

    def __post_init__(self) -> None:
        """Check every range."""
        require(0 < self.share <= 1, "share", self.share, "in (0, 1]")
        require(0 < self.memory_share <= 1, "memory-share", self.memory_share, "in (0, 1]")
        listed = self.clients.split(",") if self.clients else []
        require(all(p.strip().isdecimal() for p in listed), "clients", self.clients, "partition ids, comma-separated")


class OnlyCapable(SubModelStrategy):
    """FedAvg among those who can."""

    name = "only-capable"
    Config = OnlyCapableConfig
    config: OnlyCapableConfig

    def check(self) -> None:
        """Who is capable must be known, and somebody must be."""
        num_clients, listed = self.setting.job.num_clients, self._listed
        refuse(
            any(pid >= num_clients for pid in listed),
            f"only-capable.clients={self.config.clients}",
            f"partition ids are 0 to {num_clients - 1}",
        )
        refuse(
            self.setting.durations is None and not listed,
            "strategy=only-capable with fleet.name=none",
            "nobody knows the devices here; list those that can hold the full model in only-capable.clients",
        )
        refuse(
            not self._capable,
            f"only-capable.memory-share={self.config.memory_share}",
            f"training the full model takes {self._peak_bytes / 2**20:.0f} MiB, more than this share of any of the "
            "fastest devices; raise it, or take a smaller model or batch",
        )
        refuse(
            bool(self.loop.preset) and len(self._capable) < num_clients,
            f"strategy=only-capable with loop.preset={self.loop.preset}",
            f"its rule counts all {num_clients} clients, of which {len(self._capable)} take part; set the loop.* keys "
            "that you want for those",
        )

    def takes_part(self, partition_id: int) -> bool:
        """Only who is capable; its order is FedAvg's, the full model."""
        return partition_id in self._capable

    @cached_property
    def _listed(self) -> frozenset[int]:
        return frozenset(int(pid) for pid in self.config.clients.split(",")) if self.config.clients else frozenset()

    @cached_property
    def _capable(self) -> frozenset[int]:
        durations = self.setting.durations
        if self._listed or durations is None:
            return self._listed
        fleet, fastest = durations.fleet, max(1, ceil(self.config.share * len(durations.fleet) - 1e-9))
        return frozenset(
            pid
            for pid, rank in enumerate(fleet.speed_ranks)
            if rank < fastest and self._peak_bytes <= self.config.memory_share * fleet[pid].memory_bytes
        )

    @cached_property
    def _peak_bytes(self) -> int:
        train = self.setting.job.train
        return self.cost.of(FULL).peak_memory_bytes(train.batch_size, optimizer_slots(train))
