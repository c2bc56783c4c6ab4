"""Settings that were changed and do nothing beside others: told to the user, who meant something by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from wire.flat import to_flat

Rule = tuple[bool, str, Sequence[str]]
"""Whether it applies; the setting that makes the others idle, as a user writes it; what is idle then (kebab-case)."""


def changed(config: Any, names: Sequence[str], table: str) -> list[str]:
    """Those of the settings that differ from their defaults, as a user writes them: ``adp.share=batch``.

    Parameters
    ----------
    config : a method's settings.
    names : kebab-case, ``mask.penalty`` of a nested table.
    table : the method's.
    """
    values, defaults = to_flat(config), to_flat(type(config)())
    return [f"{table}.{name}={_written(values[name])}" for name in names if values[name] != defaults[name]]


def idle_settings(config: Any, rules: Sequence[Rule], table: str) -> Iterator[str]:
    """A sentence for every rule that applies and has something to say."""
    for applies, beside, names in rules:
        found = changed(config, names, table) if applies else []
        if found:
            yield f"{', '.join(found)} with {beside}: has no effect"


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
