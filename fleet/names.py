"""Errors that name what was meant: the nearest known name, and all of them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class FleetError(ValueError):
    """A fleet, a device, a partition or a data set was asked for in a way that cannot be served."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown ``name`` of kind ``what``: the nearest known name first, then all of them."""
    names = list(known)
    near = get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(names)}"


def parse_number(what: str, text: str, minimum: float, *, exclusive: bool = False) -> float:
    """Read the finite number behind a name's colon, such as the 5 of ``linear:5``.

    Raises
    ------
    FleetError : ``text`` is no finite number, or lies below ``minimum`` (or on it, where ``exclusive``).
    """
    bound = f"a number {'>' if exclusive else '>='} {minimum:g}"
    try:
        value = float(text)
    except ValueError:
        raise FleetError(f"{what}: expected {bound}, got {text!r}") from None
    if not (minimum < value if exclusive else minimum <= value) or value == float("inf"):
        raise FleetError(f"{what}: expected {bound}, got {text!r}")
    return value


def parse_count(what: str, text: str, minimum: int) -> int:
    """Read the whole number behind a name's colon, such as the 2 of ``pathological:2``.

    Raises
    ------
    FleetError : ``text`` is no whole number, or lies below ``minimum``.
    """
    try:
        value = int(text)
    except ValueError:
        value = minimum - 1
    if value < minimum:
        raise FleetError(f"{what}: expected a whole number >= {minimum}, got {text!r}")
    return value
