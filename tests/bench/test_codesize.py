"""Lines of code: what is no code does not count."""

from __future__ import annotations

from bench.codesize import count_methods, exclusive, lines_of
from strategies import STRATEGIES

SOURCE = '''"""Docstring
of two lines."""

import os  # counted, with its comment

# a comment


def f(a,
      b):
    """One more."""
    text = """this is
    code"""
    return (a +

            b)


WIDTH = 3
"""An attribute's docstring."""
'''


def test_docstrings_comments_and_blank_lines_do_not_count():
    assert lines_of(SOURCE) == 1 + 2 + 2 + 2 + 1


def test_what_only_one_method_uses_is_its_own_however_deep():
    imports = {"a": {"x", "shared"}, "b": {"shared"}, "x": {"y"}, "y": set(), "shared": {"z"}, "z": set()}
    assert exclusive("a", imports, {"a", "b"}) == {"x", "y"}
    assert exclusive("b", imports, {"a", "b"}) == set()


def test_every_method_is_counted_with_modules_of_its_own():
    rows = {row["method"]: row for row in count_methods()}
    assert rows.keys() == STRATEGIES.keys()
    assert all(row["file"] > 5 for row in rows.values())
    assert "pruning.rates" in rows["adaptcl"]["there"]
    assert rows["fedasync"]["there"] == ""
