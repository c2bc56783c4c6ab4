"""What a client remembers between rounds, on its own disk; a fresh process for every message loses nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from wire.files import save


class ClientStore:
    """One client's memory, one file per request, so that an answer that was lost is forgotten with it.

    Parameters
    ----------
    folder : where the files of all clients of a run lie; empty for a client that remembers nothing.
    partition_id : whose they are.
    lineage : names of folders beside ``folder``, of the runs that this one continues.
    """

    def __init__(self, folder: str, partition_id: int, lineage: Sequence[str] = ()) -> None:
        self.folder, self.partition_id, self.lineage = Path(folder) if folder else None, partition_id, lineage

    def load(self, last_dispatch: int) -> dict[str, Any]:
        """What was remembered with the last answer that the server merged; empty if there is none."""
        path = self._path(last_dispatch)
        if path is None or last_dispatch < 0:
            return {}
        return self._read(path)

    def save(self, dispatch: int, last_dispatch: int, memory: dict[str, Any], kept: Collection[int] = ()) -> None:
        """Remember ``memory`` with this answer; drop what nobody can go back to any more.

        Parameters
        ----------
        dispatch, last_dispatch : this request, and the last one whose answer was merged.
        kept : earlier ones that are not dropped: those of the run's checkpoints.
        """
        path = self._path(dispatch)
        if path is None:
            return
        save(memory, path)
        for old in path.parent.glob(f"{self.partition_id:06d}-*.pt"):
            number = old.stem.split("-")[1]
            if number.isdigit() and int(number) < last_dispatch and int(number) not in kept:
                old.unlink(missing_ok=True)

    def load_draft(self) -> dict[str, Any]:
        """What was saved in the middle of a request; empty if there is nothing."""
        return {} if self._draft is None else self._read(self._draft)

    def save_draft(self, draft: dict[str, Any]) -> None:
        """Keep work that does not depend on any answer being merged; it survives the server."""
        if self._draft is not None:
            save(draft, self._draft)

    def _read(self, path: Path) -> dict[str, Any]:
        """The file of this run, or of the latest that it continues; empty if there is none."""
        earlier = [path.parent.parent / name / path.name for name in self.lineage]
        found = next((place for place in (path, *earlier) if place.exists()), None)
        memory: dict[str, Any] = {} if found is None else torch.load(found, weights_only=True)
        return memory

    @property
    def _draft(self) -> Path | None:
        return None if self.folder is None else self.folder / f"{self.partition_id:06d}-draft.pt"

    def _path(self, dispatch: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{self.partition_id:06d}-{dispatch:012d}.pt"
