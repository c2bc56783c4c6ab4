"""Put the kept figures of bench/results into the README's tables.

python -m bench.readme
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.common import RESULTS

README = RESULTS.parents[1] / "README.md"
MICRO = ("merge", "step", "engine", "decide")


def main() -> None:
    """Rewrite every marked part for which there are results."""
    text = README.read_text(encoding="utf-8")
    text = replace_part(text, "adaptcl", adaptcl_part())
    text = replace_part(text, "micro", micro_part())
    README.write_text(text, encoding="utf-8")


def replace_part(text: str, name: str, content: str) -> str:
    """The text with what lies between the markers of ``name`` replaced."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{content}{end}{tail}"


def adaptcl_part() -> str:
    """Tables of bench.adaptcl."""
    record = load("adaptcl")
    if record is None:
        return ""
    parts = [source(record)]
    for table in record["results"]["tables"]:
        title = f"**{table['task']}, slowest/fastest device = {table['sigma']:g}, seeds: {table['seeds']}**"
        parts.append(f"{title}\n\n{markdown(table['rows'])}")
    return "\n\n".join(parts) + "\n"


def micro_part() -> str:
    """Tables of the micro-benchmarks."""
    parts = []
    for name in MICRO:
        record = load(name)
        if record is not None:
            tables = [markdown(rows) for rows in record["results"].values() if is_table(rows)]
            parts += [source(record), *tables]
    return "\n\n".join(parts) + "\n" if parts else ""


def load(name: str) -> dict[str, Any] | None:
    """A kept record, None if there is none."""
    path = Path(RESULTS / f"{name}.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def source(record: Mapping[str, Any]) -> str:
    """Where figures come from, in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"`{record['command']}` · {record['machine']} · {versions} · {record['date']}"


def is_table(rows: Any) -> bool:
    """Whether a result is a list of rows."""
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; columns in order of appearance."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = [heads, ["---"] * len(heads), *([shown(row.get(head)) for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: Any) -> str:
    """A cell's text."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
