"""Answers that lie in the virtual future, on disk where they are large.

In simulation all outstanding answers are computed before the earliest is handed on. Of a model of 0.1 B parameters
sixteen of them do not fit into the server's memory, and need not: each waits as a file that is mapped when it is read.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from wire.files import save
from wire.message import Failure, Report, State, state_bytes

SHELVE_BYTES = 32 * 2**20
"""States that are smaller stay in memory."""


class ShelvedState(Mapping[str, Tensor]):
    """A state dict in a file, mapped into memory when it is first read, and let go with this object.

    Parameters
    ----------
    path : the file, as ``torch.save`` writes a dict of tensors.
    is_ours : whether the file goes with this object, too.
    """

    def __init__(self, path: Path, is_ours: bool = False) -> None:
        self.path = path
        self._state: dict[str, Tensor] | None = None
        if is_ours:
            weakref.finalize(self, _remove, str(path))

    def __getitem__(self, key: str) -> Tensor:
        return self._mapped()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapped())

    def __len__(self) -> int:
        return len(self._mapped())

    def keep_as(self, path: Path) -> None:
        """Let the file exist under a second name as well; without copying it where the file system can."""
        path.unlink(missing_ok=True)
        try:
            os.link(self.path, path)
        except OSError:
            shutil.copyfile(self.path, path)

    def _mapped(self) -> dict[str, Tensor]:
        if self._state is None:
            self._state = torch.load(self.path, weights_only=True, mmap=True)
        return self._state


class Shelf:
    """Where large answers wait.

    Parameters
    ----------
    folder : where their files lie; empty for a temporary folder that goes with the shelf.
    """

    def __init__(self, folder: str = "") -> None:
        self._folder, self._temporary = folder, ""
        self._numbers = itertools.count()

    def put(self, answer: Report | Failure) -> Report | Failure:
        """The answer, its state on disk if that is large."""
        if isinstance(answer, Failure) or state_bytes(answer.state) < SHELVE_BYTES:
            return answer
        return replace(answer, state=self._write(answer.state))

    def close(self) -> None:
        """Remove a temporary folder."""
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _write(self, state: State) -> ShelvedState:
        if not self._folder:
            self._folder = self._temporary = tempfile.mkdtemp(prefix="prunus-shelf-")
        path = Path(self._folder) / f"held-{os.getpid()}-{next(self._numbers)}.pt"
        return ShelvedState(save(dict(state), path), is_ours=True)


def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)
