"""Frozen dataclasses <-> flat kebab-case keys: the form of the run config, of Flower records and of the event log."""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, TypeVar

Scalar = bool | int | float | str
T = TypeVar("T")


class ConfigError(ValueError):
    """A key is unknown or a value has the wrong type or range."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the known word that looks most like ``word``, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def kebab(name: str) -> str:
    """``min_retention_ratio`` -> ``min-retention-ratio``."""
    return name.replace("_", "-")


def to_flat(value: Any, prefix: str = "") -> dict[str, Scalar]:
    """Flatten a dataclass: nested ones become dotted tables."""
    flat: dict[str, Scalar] = {}
    for field in fields(value):
        key, item = prefix + kebab(field.name), getattr(value, field.name)
        flat |= to_flat(item, key + ".") if is_dataclass(item) else {key: item}
    return flat


def from_flat(kind: type[T], flat: Mapping[str, Any], prefix: str = "") -> T:
    """Build ``kind`` from flat keys; keys that are absent take the defaults.

    Raises
    ------
    ConfigError
        If a key below ``prefix`` is unknown, or a value has the wrong type or range.
    """
    known = known_keys(kind, prefix)
    for key in flat:
        if key.startswith(prefix) and key not in known:
            raise ConfigError(f"config: unknown key {key!r}{nearest(key, known)}")
    return _build(kind, flat, prefix)


def known_keys(kind: type, prefix: str = "") -> dict[str, type]:
    """Flat key -> scalar type of everything ``kind`` holds."""
    hints = _hints_of(kind)
    known: dict[str, type] = {}
    for field in fields(kind):
        key, hint = prefix + kebab(field.name), hints[field.name]
        known |= known_keys(hint, key + ".") if is_dataclass(hint) else {key: hint}  # type: ignore[arg-type]
    return known


@lru_cache(maxsize=256)
def _hints_of(kind: Any) -> dict[str, Any]:
    """Types of a dataclass's fields; resolving their names takes most of the time that parsing takes."""
    return typing.get_type_hints(kind)


def _build(kind: type[T], flat: Mapping[str, Any], prefix: str) -> T:
    hints = _hints_of(typing.cast(Any, kind))
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        key, hint = prefix + kebab(field.name), hints[field.name]
        if is_dataclass(hint):
            values[field.name] = _build(hint, flat, key + ".")  # type: ignore[arg-type]
        elif key in flat:
            values[field.name] = cast_scalar(key, flat[key], hint)
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"config: {prefix}{error}") if not str(error).startswith("config: ") else error from None
    except ValueError as error:
        raise ConfigError(f"config: {prefix}{error}") from error


def cast_scalar(key: str, value: Any, kind: type) -> Scalar:
    """Return ``value`` as ``kind``; an integer is a fine float, nothing else is converted silently."""
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"config: {key}: expected a finite number, got {value!r}")
        return float(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return typing.cast(Scalar, value)
    raise ConfigError(f"config: {key}: expected {kind_name(kind)}, got {type(value).__name__} {value!r}")


def kind_name(kind: type) -> str:
    """``float (a number)``: a type as Python calls it and in plain words."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return f"{kind.__name__} ({words[kind]})" if kind in words else kind.__name__


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise ``ConfigError`` saying what was expected of ``key`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"{key}: got {value!r}, expected {expected}")


def require_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raise ``ConfigError`` with the nearest choice unless ``value`` is one of ``choices``."""
    if value not in choices:  # only then: a search for the nearest costs more than all else about reading a config
        expected = " or ".join(map(repr, choices)) + nearest(value, choices)
        raise ConfigError(f"{key}: got {value!r}, expected {expected}")


def refuse(condition: bool, keys: str, reason: str) -> None:
    """Raise ``ConfigError`` where settings that are fine alone make no sense together.

    Parameters
    ----------
    condition : whether they do not.
    keys : the settings as the user wrote them, ``loop.quorum=5 with strategy=only-capable``.
    reason : why, and what to do instead.
    """
    if condition:
        raise ConfigError(f"config: {keys}: {reason}")
