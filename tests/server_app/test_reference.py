"""The reference of settings: complete, and what the documents hold."""

from __future__ import annotations

from dataclasses import dataclass

from server_app import reference
from server_app.config import defaults
from tests.conftest import ROOT


def test_every_setting_is_in_the_reference_with_its_default_and_a_meaning():
    lines = [line for line in reference.page().splitlines() if line.startswith("| `")]
    cells = [line.replace(r"\|", "/").strip("| ").split(" | ") for line in lines]
    rows = {row[0].strip("`"): row[1:] for row in cells}
    assert set(rows) == set(defaults())
    assert len(lines) == len(rows), "each once"
    assert [key for key, row in rows.items() if len(row[-1].strip()) < 5] == []
    assert rows["adp.density"][0] == "`0.5`"
    assert rows["model.exits"][0] == "`false`"


def test_meanings_come_from_base_classes_too_and_a_sentence_may_take_several_lines_and_be_about_several_fields():
    @dataclass(frozen=True)
    class Base:
        """One.

        Attributes
        ----------
        kept, changed : of the
            base.

        What follows is no attribute.
        """

        kept: int = 1
        changed: int = 2

    @dataclass(frozen=True)
    class Inheriting(Base):
        """Two.

        Attributes
        ----------
        changed : by the heir.
        """

    assert reference.meanings(Inheriting) == {"kept": "of the base.", "changed": "by the heir."}
    assert list(reference.settings(Inheriting(), "x.")) == [
        ("x.kept", 1, "of the base."),
        ("x.changed", 2, "by the heir."),
    ]


def test_the_document_is_what_the_code_says():
    """Whoever changes a setting has to run ``python -m server_app.reference > docs/settings.md``."""
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == reference.page()
