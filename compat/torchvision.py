"""One way to import torchvision, for both pairs of builds that people have.

A *matching* pair (both CPU, or both for the same CUDA) imports as usual; nothing is changed for it. But the torchvision
wheel that PyPI serves for Linux is built for CUDA, and beside a CPU-only torch it dies on import with
``RuntimeError: operator torchvision::nms does not exist``: its compiled extension wants CUDA libraries that are not
there, and its Python code then registers properties of operators that the extension would have defined. Everything
this project uses of torchvision (models, data sets, transforms on tensors) is plain Python, so it is enough to declare
those operators' signatures before the import. Calling such an operator still fails, with torch's own message.

The declaration lives in one process: whoever needs torchvision (or a package that imports it, such as timm) calls
:func:`import_torchvision` first.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""The operators whose absence stops torchvision's import, with their signatures (torchvision/csrc/ops/nms.cpp)."""

_libraries: list[Any] = []
"""torch forgets declared operators when the library object that declared them is collected: this keeps it alive."""


class TorchvisionError(ImportError, ValueError):
    """torchvision is missing, or it does not fit the installed torch."""


def import_torchvision() -> ModuleType:
    """Import torchvision and return it; may be called any number of times.

    Raises
    ------
    TorchvisionError : torchvision is not installed, or was built for another torch than the one installed.
    """
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"]
    import torch

    failure = _extension_failure()
    if failure is not None:
        if torch.version.cuda is not None or not _wants_cuda(failure):
            raise TorchvisionError(_message(f"its compiled extension does not load: {failure}"))
        _declare_operators()
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        raise TorchvisionError(_message(f"its import fails with {type(error).__name__}: {error}")) from error


def _extension_failure() -> str | None:
    """Why torchvision's compiled extension cannot be loaded; None when it can.

    Asked before the import because a torchvision import that failed half-way leaves registrations behind and cannot be
    repeated in the same process.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise TorchvisionError(_message("it is not installed"))
    candidates = sorted(
        path for path in Path(spec.origin).parent.glob("_C*") if path.suffix in {".so", ".pyd", ".dylib"}
    )
    if not candidates:
        return "no compiled extension (_C) in the package"
    try:
        torch.ops.load_library(str(candidates[0]))
    except (OSError, RuntimeError) as error:
        # torch wraps the loader's message, which names the missing library, in one that does not.
        return str(error.__cause__ or error)
    return None


def _wants_cuda(failure: str) -> bool:
    """Whether the loader's message names a CUDA library, such as libc10_cuda.so, libcudart.so or c10_cuda.dll."""
    return any(word in failure.lower() for word in ("cuda", "cudnn", "nvrtc"))


def _declare_operators() -> None:
    """Declare the signatures torchvision's Python code asks for, unless somebody in this process did already."""
    import torch

    # FRAGMENT, not DEF: only one DEF per namespace is allowed in a process, and another package may hold it.
    library: Any = torch.library.Library("torchvision", "FRAGMENT")
    for name, signature in OPERATORS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(signature)
    _libraries.append(library)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _message(reason: str) -> str:
    return (
        f"torchvision cannot be used: {reason}. Installed: torch {_installed('torch')}, torchvision "
        f"{_installed('torchvision')}. Expected: two builds that belong together (torch 2.13 with torchvision 0.28), "
        "or PyPI's torchvision beside a CPU-only torch of that pair. Remedy: pip install --force-reinstall torch "
        "torchvision from one index, e.g. --index-url https://download.pytorch.org/whl/cpu"
    )
