"""What the fast suite leaves out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Values of a parameter of which the fast suite takes ``quick`` and the whole suite all; tuples are of several."""
    cases = [(value, value if isinstance(value, tuple) else (value,)) for value in values]
    return [pytest.param(*case, marks=() if value in quick else pytest.mark.slow) for value, case in cases]
