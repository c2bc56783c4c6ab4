"""What the fast suite leaves out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Values of a parameter of which the fast suite takes ``quick`` and the whole suite all."""
    return [pytest.param(value, marks=() if value in quick else pytest.mark.slow) for value in values]
