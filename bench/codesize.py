"""How much code a method is: lines without docstrings, comments and blank lines.

    python -m bench.codesize

Counted are the method's file, and beside it what nobody else uses: modules of strategies/ and pruning/ that this
method's file alone imports, directly or through one of those.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.common import RESULTS, finish, options, print_table
from strategies import STRATEGIES

ROOT = RESULTS.parents[1]
SHARED = ("strategies", "pruning")
_SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Count and print."""
    parsed = options("codesize", __doc__).parse_args(arguments)
    rows = count_methods()
    print_table("lines of code per method", rows)
    return finish("codesize", parsed, {"rows": rows})


def count_methods() -> list[dict[str, Any]]:
    """One row per method of the registry: lines of its file, and of what only it uses."""
    imports = {module: imports_of(path) for module, path in modules().items()}
    files = {name: kind.__module__ for name, kind in STRATEGIES.items()}
    rows = []
    for name, module in files.items():
        own = sorted(exclusive(module, imports, set(files.values())))
        rows.append(
            {
                "method": name,
                "file": lines_of(modules()[module].read_text(encoding="utf-8")),
                "of its own beside it": sum(lines_of(modules()[m].read_text(encoding="utf-8")) for m in own),
                "there": ", ".join(own),
            }
        )
    return rows


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module that methods may share."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for folder in SHARED
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "__init__.py"
    }


def imports_of(path: Path) -> set[str]:
    """Modules of the project that a file imports."""
    tree, known = ast.parse(path.read_text(encoding="utf-8")), modules()
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names & known.keys()


def exclusive(module: str, imports: Mapping[str, set[str]], methods: set[str]) -> set[str]:
    """Modules that are imported by ``module`` or by other exclusive ones, and by nothing else."""
    own: set[str] = set()
    while True:
        users = {module, *own}
        more = {
            name
            for name in set().union(*(imports[user] for user in users)) - own - methods
            if all(name not in imports[other] for other in imports.keys() - users)
        }
        if not more:
            return own
        own |= more


def lines_of(source: str) -> int:
    """Lines that hold code: no docstrings, no comments, no blank lines."""
    silent: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            silent |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - silent)


if __name__ == "__main__":
    main()
