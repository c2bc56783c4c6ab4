"""``python -m reporting RUN_FOLDER`` and ``python -m reporting compare RUN_FOLDER RUN_FOLDER ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from reporting.rows import LogError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 with one line on standard error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _compare(arguments[1:]) if arguments[:1] == ["compare"] else _report(arguments)
    except (LogError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _report(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reporting",
        description="Write report.html and summary.json of one run.",
        epilog="To set runs side by side: python -m reporting compare RUN_FOLDER RUN_FOLDER ... --out FOLDER",
    )
    parser.add_argument("run_folder", help="folder that holds events.jsonl")
    run_folder = parser.parse_args(arguments).run_folder
    from reporting.report import write_report  # matplotlib takes a second to import: not for --help or errors

    print(write_report(run_folder))
    return 0


def _compare(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reporting compare", description="Write one page that sets runs side by side."
    )
    parser.add_argument(
        "run_folders", nargs="+", metavar="RUN_FOLDER", help="two or more; speed-ups are against the first"
    )
    parser.add_argument(
        "--out", default="comparison", help="folder for comparison.html and comparison.json (default: %(default)s)"
    )
    parser.add_argument(
        "--target", type=float, action="append", default=[], help="accuracy from 0 to 1 to time; may be repeated"
    )
    parser.add_argument("--max-bytes", type=float, help="byte budget of the C3-Score (default: the largest)")
    parser.add_argument("--max-macs", type=float, help="client MAC budget of the C3-Score (default: the largest)")
    options = parser.parse_args(arguments)
    from reporting.compare import compare

    html_path, text = compare(options.run_folders, options.out, options.target, options.max_bytes, options.max_macs)
    print(text)
    print(html_path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
