"""What the owner of a device says about it, and what a server may therefore not decide: paths and memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wire.message import Job

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class SiteError(ValueError):
    """The run asks for something that the owner of this device does not give."""


@dataclass(frozen=True)
class Site:
    """A device as its owner configured it; in simulation, where everything lies on one machine, empty.

    Attributes
    ----------
    data : folder with the data sets of this device, or an ``.npz`` file (``x``, ``y``) that is this device's share.
    state_dir : folder for what must survive between rounds; empty in simulation: the run's own.
    memory_bytes : sub-models that need more memory to train are refused; 0 for no limit.
    """

    data: str = ""
    state_dir: str = ""
    memory_bytes: int = 0

    @classmethod
    def of(cls, node_config: Mapping[str, Any]) -> Site:
        """The site that a SuperNode's ``--node-config`` describes: ``data``, ``state-dir``, ``memory-bytes``."""
        return cls(
            str(node_config.get("data", "")),
            str(node_config.get("state-dir", "")),
            int(node_config.get("memory-bytes", 0)),
        )

    @property
    def is_device(self) -> bool:
        """Whether this is a device of somebody, and not one of many clients on the server's machine."""
        return bool(self.state_dir)

    def localized(self, job: Job) -> Job:
        """The job with the device's own paths.

        Raises
        ------
        SiteError
            If the job names a path outside the folder that the owner gave, or code that is not part of the app.
        """
        if not self.is_device:
            return job
        keys = [key for key in job.lineage.split(",") if NAME.fullmatch(key)]
        if not keys:
            raise SiteError("run: it has no name under which this device could keep what it remembers")
        kind, colon, rest = job.data.name.partition(":")
        data = replace(job.data, download=False, dir=self.data)
        if job.data.partition == "own":
            if not self.data.endswith(".npz"):
                raise SiteError("data: the run trains on every device's own share; set PRUNUS_DATA to an .npz file")
            data = replace(data, name=f"npz:{self.data}", dir="")
        elif self.data.endswith(".npz"):
            raise SiteError("data: this device has a share of its own; the run must be started with data.partition=own")
        elif colon and kind in ("npz", "folder"):
            data = replace(data, name=f"{kind}:{self._inside(rest)}")
        elif colon:
            raise SiteError(f"data: {job.data.name!r} is not a file; devices read data sets from their owner's folder")
        return replace(job, data=data, store_dir=str(Path(self.state_dir) / keys[0]), lineage=",".join(keys))

    def _inside(self, path: str) -> Path:
        """``path`` below the owner's data folder: the whole of a relative one, the name of an absolute one."""
        if not self.data:
            raise SiteError(f"data: the run reads {path}, and this device's owner gave no data folder (PRUNUS_DATA)")
        home = Path(self.data).resolve()
        found = (home / (Path(path).name if Path(path).is_absolute() else path)).resolve()
        if not found.is_relative_to(home):
            raise SiteError(f"data: {path} lies outside the folder that this device's owner gave")
        return found

    def check_memory(self, needed_bytes: int) -> None:
        """Refuse a sub-model that does not fit.

        Raises
        ------
        SiteError
            If it needs more than the owner allows.
        """
        if self.memory_bytes and needed_bytes > self.memory_bytes:
            raise SiteError(
                f"memory: training this sub-model takes {needed_bytes} bytes, this device's owner allows "
                f"{self.memory_bytes}; give it a smaller one"
            )


NOWHERE = Site()
"""Of a simulated client."""
