"""What all benchmarks share: options, a process per measurement, tables, results that say where they come from.

Every benchmark prints a table for people and, as its last line, one JSON object. A full run also keeps that object as
``bench/results/NAME.json``; the tables of the README are made from these files. ``--quick`` keeps nothing unless told.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from server_app.processes import count_cores

RESULTS = Path(__file__).resolve().parent / "results"
OUTCOMES = RESULTS.with_name("outcomes")
"""What some of the tables are made of, run by run: with ``--store`` a seed or a method can be added to them."""
PACKAGES = ("flwr", "numpy", "torch")


def options(name: str, text: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    summary = (text or "").strip().splitlines()[0]
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=summary)
    parser.add_argument("--quick", action="store_true", help="a small version in seconds; its figures mean little")
    parser.add_argument("--seed", type=int, default=0, help="of everything random; the first of --seeds (default 0)")
    parser.add_argument("--out", type=Path, help=f"where the result goes (default bench/results/{name}.json)")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where clients train: goes into ``train.device`` of every run."""
    parser.add_argument("--device", default="cpu", help="of the clients: cpu, cuda or auto (default cpu)")


def environment() -> dict[str, Any]:
    """Versions and the class of machine; nothing that names the machine."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"versions": versions, "machine": f"{count_cores()} cores, {platform.machine()}"}


def seeds_of(arguments: argparse.Namespace) -> range:
    """``--seeds`` of them from ``--seed`` on: machines can share a table's seeds."""
    return range(arguments.seed, arguments.seed + arguments.seeds)


def finish(
    name: str, arguments: argparse.Namespace, results: Mapping[str, Any], *, seeds: Sequence[int] | None = None
) -> dict[str, Any]:
    """Keep the result as a file (a full run, or with ``--out``), print it as the last line, and return it.

    Parameters
    ----------
    name : of the benchmark.
    arguments : parsed by ``options(name, ...)``.
    results : figures; JSON values.
    seeds : used; by default the one of ``arguments``.
    """
    record = {
        "name": name,
        "command": shlex.join(["python", "-m", f"bench.{name}", *sys.argv[1:]]),
        "quick": arguments.quick,
        "seeds": list(seeds) if seeds is not None else [arguments.seed],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **environment(),
        "results": dict(results),
    }
    target = arguments.out or (None if arguments.quick else RESULTS / f"{name}.json")
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".tmp")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.replace(target)
    sys.stdout.flush()
    print(json.dumps(record), flush=True)
    return record


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print ``rows`` under their keys, numbers to the right."""
    if not rows:
        return
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[shown(row.get(head)) for head in heads] for row in rows]
    widths = [max(len(head), *(len(line[i]) for line in cells)) for i, head in enumerate(heads)]
    print(f"\n{title}")
    for line in (heads, ["-" * width for width in widths], *cells):
        first, *rest = (c.rjust(w) for c, w in zip(line, widths, strict=True))
        print("  ".join([line[0].ljust(len(first)), *rest]))


def shown(value: Any) -> str:
    """A cell's text."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def within(value: float, bound: float) -> str:
    """How a figure stands to the bound it was given."""
    return f"{'within' if value <= bound else 'ABOVE'} {bound:g}"


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function`` in a new interpreter, so that neither memory peaks nor caches of others count.

    Raises
    ------
    RuntimeError
        If the process died or the function raised.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        is_good, value = ours.recv()
    except EOFError:
        is_good, value = False, "it died"
    process.join()
    if not is_good:
        raise RuntimeError(f"{function.__name__}{arguments}: {value}")
    return value


def _call(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        connection.send((True, function(*arguments)))
    except Exception as error:
        connection.send((False, f"{type(error).__name__}: {error}"))
        raise


def peak_bytes() -> int:
    """Largest resident memory of this process so far, everything included (interpreter, libraries, buffers).

    ``ru_maxrss`` would be that of the parent where it was larger; the kernel's own counter starts anew with a program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class CpuTimer:
    """Adds up CPU seconds of this process over ``with`` blocks; garbage is collected outside of them."""

    def __init__(self) -> None:
        self.cpu_s = 0.0
        self._began = 0.0

    def __enter__(self) -> CpuTimer:
        self._began = time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.cpu_s += time.process_time() - self._began


def settle() -> None:
    """Collect garbage, so that none of before is charged to what comes next."""
    gc.collect()
