"""What a client remembers between rounds, on its own disk; a fresh process for every message loses nothing."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch


class ClientStore:
    """One client's memory, one file per request, so that an answer that was lost is forgotten with it.

    Parameters
    ----------
    folder : where the files of all clients of a run lie; empty for a client that remembers nothing.
    partition_id : whose they are.
    """

    def __init__(self, folder: str, partition_id: int) -> None:
        self.folder, self.partition_id = Path(folder) if folder else None, partition_id

    def load(self, last_dispatch: int) -> dict[str, Any]:
        """What was remembered with the last answer that the server merged; empty if there is none."""
        path = self._path(last_dispatch)
        if path is None or last_dispatch < 0 or not path.exists():
            return {}
        memory: dict[str, Any] = torch.load(path, weights_only=True)
        return memory

    def save(self, dispatch: int, last_dispatch: int, memory: dict[str, Any]) -> None:
        """Remember ``memory`` with this answer; drop what is older than the last merged one."""
        path = self._path(dispatch)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(memory, file)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        for old in path.parent.glob(f"{self.partition_id:06d}-*.pt"):
            if int(old.stem.split("-")[1]) < last_dispatch:
                old.unlink(missing_ok=True)

    def _path(self, dispatch: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{self.partition_id:06d}-{dispatch:012d}.pt"
