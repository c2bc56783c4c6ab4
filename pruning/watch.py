"""Watching PyTorch's operators while a model runs, and telling which memory a tensor lies in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class OperatorWatch(TorchDispatchMode):
    """A context in which ``note`` is told of every operator that PyTorch carries out, whoever calls it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; True, newer versions' default, loads the compiler: 2 s and 80 MB a process."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(func._overloadpacket.__name__, args, result)
        return result

    def note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Take in one call.

        Parameters
        ----------
        name : of the operator, without its overload: ``mm``, ``relu_``.
        args, result : its positional arguments, and what it returned.
        """
        raise NotImplementedError


def memory_of(tensor: Tensor) -> int:
    """Identity of the memory a tensor lies in, also where there is none (on ``meta``)."""
    return int(tensor.untyped_storage()._cdata)
