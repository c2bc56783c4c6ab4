"""Every setting with its default and what it means, read from the docstrings of the dataclasses that hold them.

python -m server_app.reference > docs/settings.md
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from server_app.config import RunConfig
from strategies import STRATEGIES
from wire.flat import Scalar, kebab

HEAD = """# Settings

Written by `python -m server_app.reference` from the docstrings in the code. Every key goes to `./run.sh` as `key=value`
and into Flower's `--run-config`; settings of methods that a run does not use are checked and change nothing.
"""
NAMED = re.compile(r"(\w+(?:, \w+)*) : (.*)")
"""First line of what a docstring says of one attribute, or of several."""


def page() -> str:
    """The whole reference as Markdown, a table for each group of keys."""
    run = RunConfig()
    parts = [HEAD, section("Run", table(run, ""))]
    for name, value in ((kebab(field.name), getattr(run, field.name)) for field in fields(run)):
        if is_dataclass(value):
            parts.append(section(f"`{name}.*`", table(value, f"{name}."), first_line(type(value))))
    for name, strategy in STRATEGIES.items():
        if rows := table(strategy.Config(), f"{name}."):
            parts.append(section(f"`strategy={name}`", rows, first_line(strategy)))
    return "\n".join(parts)


def section(title: str, rows: list[str], about: str = "") -> str:
    """A heading, a sentence and a table."""
    head = [f"## {title}", ""] + ([about, ""] if about else [])
    return "\n".join([*head, "| key | default | what it means |", "|---|---|---|", *rows, ""])


def table(value: Any, prefix: str) -> list[str]:
    """Rows for what a dataclass holds, nested ones included; the parts of ``RunConfig`` have tables of their own."""
    rows = []
    for key, default, meaning in settings(value, prefix, deep=not isinstance(value, RunConfig)):
        shown = f"`{str(default).lower() if isinstance(default, bool) else default}`" if default != "" else ""
        text = meaning.replace("``", "`").replace("|", r"\|")
        rows.append(f"| `{key}` | {shown} | {text} |")
    return rows


def settings(value: Any, prefix: str = "", deep: bool = True) -> Iterator[tuple[str, Scalar, str]]:
    """Key, default and meaning of everything that a dataclass holds.

    Parameters
    ----------
    value : instance with the defaults.
    prefix : of the keys.
    deep : whether those of nested dataclasses come too.
    """
    said = meanings(type(value))
    for field in fields(value):
        item = getattr(value, field.name)
        if not is_dataclass(item):
            yield prefix + kebab(field.name), item, said.get(field.name, "")
        elif deep:
            yield from settings(item, f"{prefix}{kebab(field.name)}.")


def meanings(kind: type) -> dict[str, str]:
    """Field -> what the docstring of the class, or of one that it inherits from, says of it."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        names: list[str] = []
        _, _, attributes = inspect.cleandoc(base.__doc__ or "").partition("Attributes\n----------\n")
        for line in attributes.splitlines():
            if match := NAMED.fullmatch(line):
                names = match[1].split(", ")
                found |= dict.fromkeys(names, match[2])
            elif line.startswith(" "):
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
            else:
                names = []
    return found


def first_line(kind: type) -> str:
    """What a class is, in a sentence."""
    return inspect.cleandoc(kind.__doc__ or "").partition("\n")[0].replace("``", "`")


if __name__ == "__main__":
    print(page(), end="")
