"""Files of tensors, written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any

import torch


def save(content: Any, path: Path, is_synced: bool = False) -> Path:
    """Write what ``torch.load(path, weights_only=True)`` reads, through a temporary file in the same folder.

    Parameters
    ----------
    is_synced : survives a loss of power too, which takes longer.

    Raises
    ------
    OSError
        If it cannot be written, with what is free where; then ``path`` is as it was, and no temporary file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            _write(content, file)
            if is_synced:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free / 2**20
            reason = f"{error.strerror} ({free:.1f} MiB free); make room, what was there is unharmed"
            raise OSError(error.errno, reason, str(path)) from error
        raise
    return path


def _write(content: Any, file: IO[bytes]) -> None:
    """``torch.save``, but a failure to write is the system's error and not one about positions in an archive."""
    whole = _Whole(file)
    try:
        torch.save(content, whole)  # type: ignore[arg-type]  # all that it asks of a file
    except RuntimeError:
        if whole.error is not None:
            raise whole.error from None
        raise


class _Whole:
    """Writes all or raises, and remembers why it could not."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        rest = memoryview(data).cast("B")
        num_bytes = len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = error
            raise
        return num_bytes

    def flush(self) -> None:
        self._file.flush()
