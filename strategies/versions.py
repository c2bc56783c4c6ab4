"""Older global versions that a rule needs, as files that are mapped into memory, not copies in it.

Staleness distances (Co-S2P) and delay compensation (DC-ASGD) compare the present model with the one that a client
started from. Each such version is one file, written when it is first sent, and dropped when no request under way needs
it, neither now nor in a checkpoint that is kept.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pruning.extract import State
from wire.files import save


class VersionError(ValueError):
    """An older global version is not there."""


class VersionStore:
    """Global versions on disk.

    Parameters
    ----------
    folder : where; empty for a temporary folder that goes with the store.
    keep : checkpoints kept; what one of them needs is kept as well.
    """

    def __init__(self, folder: str = "", keep: int = 1) -> None:
        self._temporary = "" if folder else tempfile.mkdtemp(prefix="prunus-versions-")
        self.folder = Path(folder or self._temporary)
        self._needed: deque[frozenset[int]] = deque(maxlen=keep)
        self._written: set[int] = set()

    def put(self, version: int, state: State) -> None:
        """Write a version, whole or not at all; once."""
        if version in self._written:  # a file may also be there from the run that this one continues
            return
        save(dict(state), self._path(version))
        self._written.add(version)

    def get(self, version: int) -> dict[str, Tensor]:
        """A version's full state dict, mapped: only what is touched is read. Not to be written to.

        Raises
        ------
        VersionError
            If it is not there or cannot be read.
        """
        path = self._path(version)
        if not path.exists():
            raise VersionError(
                f"versions: {path} is missing, and an answer that started from it cannot be merged by this rule; "
                "resume from another checkpoint"
            )
        try:
            state: dict[str, Tensor] = torch.load(path, weights_only=True, mmap=True)
        except Exception as error:
            raise VersionError(f"versions: {path} cannot be read: {type(error).__name__}: {error}") from error
        return state

    def expect(self, needed: Iterable[int]) -> None:
        """Raise ``VersionError`` unless all these versions can be read: before a run goes on that needs them."""
        for version in needed:
            self.get(version)

    def versions(self) -> list[int]:
        """The versions that are there, oldest first."""
        return sorted(int(path.stem.removeprefix("version-")) for path in self.folder.glob("version-*.pt"))

    def release(self, needed: Iterable[int]) -> None:
        """Drop what neither the requests now under way need, nor those of the newest ``keep`` times before."""
        self._needed.append(frozenset(needed))
        wanted = frozenset().union(*self._needed)
        for version in self.versions():
            if version not in wanted:
                self._path(version).unlink(missing_ok=True)
                self._written.discard(version)

    def close(self) -> None:
        """Remove a temporary folder."""
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _path(self, version: int) -> Path:
        return self.folder / f"version-{version:09d}.pt"
