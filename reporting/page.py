"""Filling the templates. Everything is escaped except the SVG that ``reporting.style.render`` made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from reporting.template import BASE, COMPARISON, REPORT, STYLE
from reporting.view import Picture

Column = tuple[str, bool]
"""Heading of a table column, and whether it holds text (set to the left) or numbers."""


@dataclass(frozen=True)
class Section:
    """One panel of a page: a picture, a table, or both."""

    name: str
    title: str
    picture: Picture | None = None
    columns: tuple[Column, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    total: tuple[str, ...] = ()
    table_note: str = ""


@cache
def _environment() -> Environment:
    loader = DictLoader({"base": BASE, "report": REPORT, "comparison": COMPARISON})
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def fill(template: str, **values: Any) -> str:
    """Return the page made from ``template`` (report or comparison)."""
    return _environment().get_template(template).render(style=Markup(STYLE), **values)
