"""The page: complete, self-contained, escaped, atomic."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from reporting.figures import DRAWINGS, draw_adaptation
from reporting.log import read_events
from reporting.maps import draw_labels, draw_widths
from reporting.report import write_report
from reporting.rows import Arrival
from reporting.style import style
from reporting.timeline import MAX_BINS, draw_timeline, draw_whole
from reporting.view import MAX_CLIENTS, View, make_figure
from reporting.waiting import Wait
from tests.reporting.conftest import make_rows, write_run

MakeRun = Callable[..., Path]
REPLY = {"event": "arrival", "server_round": 1, "status": "merged", "update_time_s": 1.0, "start_s": 0, "finish_s": 1}
VOID = {"meta", "br", "link", "img", "input", "hr", "wbr"}
HOSTILE = "</svg></style><script>alert(1)</script>\"'><img src=x onerror=alert(2)> $\\frac{1$ \x00\x1b[31m <!-- -->"


class Page(HTMLParser):
    """Collects what a browser would see, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "src", "xlink:href"):
                self.links.append(value or "")
            elif name.startswith("on"):
                self.handlers.append(name)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_run(tmp_path_factory.mktemp("page") / "run", make_rows())
    return write_report(folder).read_text(encoding="utf-8")


def test_the_report_shows_every_picture_and_the_headline_figures(page: str) -> None:
    seen = Page(page)
    assert seen.tags.count("svg") == len(DRAWINGS)
    for words in ("final accuracy", "straggler wait", "bytes sent", "N*", "Budget ledger", "learning-rate", "2.13.0"):
        assert words in page
    assert seen.open == []


def test_it_says_what_stands_for_a_model_whose_depth_nobody_has_trained_yet_and_how_good_every_exit_is(
    page: str,
) -> None:
    assert "Until round 2 the model is its first 2 blocks: nobody had trained the others." in page
    for words in ("exit 1, the shallowest", "exit 2", "exit 3, the deepest", "An exit has a line from where"):
        assert words in page
    assert "best: retention 1.0" in page


def test_the_report_needs_no_network_and_runs_no_script(page: str) -> None:
    seen = Page(page)
    assert seen.tags.count("script") == 0
    assert all(link.startswith(("#", "data:")) for link in seen.links)
    assert "@import" not in page
    assert "url(http" not in page


def test_ids_are_unique_and_every_internal_link_has_its_target(page: str) -> None:
    seen = Page(page)
    assert len(seen.ids) == len(set(seen.ids))
    assert {link[1:] for link in seen.links if link.startswith("#")} <= set(seen.ids)


def test_every_picture_has_a_title_for_screen_readers_and_follows_light_and_dark(page: str) -> None:
    assert page.count('role="img" aria-labelledby=') == len(DRAWINGS)
    assert "prefers-color-scheme: dark" in page
    assert "#010203" not in page


def test_paths_are_written_no_finer_than_a_screen_shows_them(page: str) -> None:
    paths = re.findall(r' d="([^"]*)"', page)
    assert paths
    assert not any(re.search(r"\.\d{3}", path) for path in paths)


def poison(value: Any) -> Any:
    if isinstance(value, str):
        return HOSTILE + value
    if isinstance(value, dict):
        return {HOSTILE + key: poison(item) for key, item in value.items()}
    return value


@pytest.mark.slow
def test_whatever_clients_report_is_escaped(make_run: MakeRun) -> None:
    rows = [json.loads(line) for line in (make_run("good", num_clients=3, num_rounds=4) / "events.jsonl").open()]
    for row in rows:
        for name in (
            "reason",
            "widths",
            "coverage",
            "config",
            "versions",
            "message",
            "strategy",
            "model",
            "data",
            "best",
        ):
            if row.get(name) is not None:
                row[name] = poison(row[name])
        for client in row.get("clients", []) if row["event"] == "clients" else []:
            client["device"] = HOSTILE
    seen = Page(write_report(make_run("hostile", rows=rows)).read_text(encoding="utf-8"))
    assert "script" not in seen.tags
    assert "img" not in seen.tags
    assert seen.handlers == []
    assert seen.open == []


@pytest.mark.slow
def test_beyond_forty_clients_pictures_show_a_part_and_say_so(make_run: MakeRun) -> None:
    log = read_events(make_run(num_clients=60, num_rounds=3))
    view = View(log)
    assert len(view.shown) == MAX_CLIENTS
    assert (view.shown[0], view.shown[-1]) == (view.order[0], view.order[-1])
    with style():
        labels, adaptation = draw_labels(view), draw_adaptation(view)
    assert labels is not None
    assert adaptation is not None
    assert "40 of 60 clients" in labels.note
    assert "percentile" in adaptation.note


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds", [(), ("end",), ("arrival", "clients"), ("evaluation", "decision"), ("arrival", "merge")]
)
def test_a_report_is_made_from_any_part_of_a_log(make_run: MakeRun, kinds: tuple[str, ...]) -> None:
    rows = [json.loads(line) for line in (make_run("all", num_clients=3, num_rounds=3) / "events.jsonl").open()]
    folder = make_run("part", rows=[row for row in rows if row["event"] == "run" or row["event"] in kinds])
    assert Page(write_report(folder).read_text(encoding="utf-8")).open == []


@pytest.mark.slow
def test_the_same_log_gives_the_same_report_byte_for_byte(page: str, tmp_path: Path) -> None:
    again = write_report(write_run(tmp_path, make_rows())).read_text(encoding="utf-8")
    assert again == page


@pytest.mark.slow
def test_a_report_that_cannot_be_written_leaves_the_older_one_and_no_litter(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(num_clients=2, num_rounds=2)
    before = write_report(folder).read_bytes()

    def fail(source: str, target: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["events.jsonl", "report.html", "summary.json"]


def test_reporting_imports_neither_flwr_nor_torch() -> None:
    code = (
        "import sys, reporting.__main__, reporting.report, reporting.compare, reporting.progress;"
        "sys.exit(bool({'flwr', 'torch', 'ray'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def timeline_of(folder: Path) -> str:
    with style():
        picture = draw_timeline(View(read_events(folder)))
    assert picture is not None
    return picture.svg + picture.note


def test_every_merge_of_a_run_of_forty_rounds_is_in_the_timeline(make_run: MakeRun) -> None:
    seen = timeline_of(make_run(num_clients=4, num_rounds=40))
    assert "the whole run: 40 merges in" in seen
    assert "The first panel is the whole run" in seen
    assert all(f"merge of round {server_round} at" in seen for server_round in range(1, 41))


def test_a_short_run_is_one_panel_in_full_detail(make_run: MakeRun) -> None:
    seen = timeline_of(make_run(num_clients=3, num_rounds=4))
    assert "the whole run: 4 merges in" in seen
    assert "enlarged" not in seen
    assert all(f"client {pid}, round {number}" in seen for pid in range(3) for number in range(1, 5))


def test_the_timeline_of_a_longer_run_is_hardly_larger() -> None:
    def boxes(num_rounds: int) -> int:
        """Boxes drawn of rounds in which one client trains for a second and waits for the other's two."""
        _, axes = make_figure(1, 1, 2)
        arrivals = [
            Arrival(n, pid, "merged", start_s=2.0 * n, finish_s=2.0 * n + 1 + pid, compute_s=1.0 + pid)
            for n in range(num_rounds)
            for pid in (0, 1)
        ]
        waits = [Wait(row, 1.0 - row.partition_id, None) for row in arrivals]
        draw_whole(axes[0], waits, {0: 0, 1: 1}, [2.0 * (n + 1) for n in range(num_rounds)], 2.0 * num_rounds)
        return sum(len(patch.get_path().vertices) for patch in axes[0].patches) // 5

    assert boxes(5) == 5 + 5 + 1  # training and waiting in turn, and the other client trains without a gap
    assert boxes(450) == 450 + 450 + 1  # two or three bins a round, and every round looks the same
    assert boxes(5000) <= 2 * MAX_BINS


def test_clients_that_may_get_no_smaller_sub_model_are_named(make_run: MakeRun) -> None:
    rows = make_rows(num_clients=3, num_rounds=2)
    decision = {"event": "decision", "server_round": 1, "rates": {"0": 1.0, "1": 0.2, "2": 0.2}}
    for floors, words in (([], None), ([2], "client 2 may get no smaller"), ([1, 2], "clients 1 and 2 may get no")):
        with style():
            log = read_events(
                make_run(f"run{len(floors)}", rows=[*rows[:-1], {**decision, "floors": floors}, rows[-1]])
            )
            picture = draw_adaptation(View(log))
        assert picture is not None
        assert ("no smaller" in picture.note) == (words is not None)
        assert (words or "") in picture.note


def test_a_group_that_a_reply_does_not_name_is_shown_whole(make_run: MakeRun) -> None:
    rows = [
        {"event": "run", "strategy": "heterofl"},
        {**REPLY, "partition_id": 0, "widths": {"stem": 16, "inner": 4}},
        {**REPLY, "partition_id": 1, "widths": {"stem": 8}},
    ]
    with style():
        picture = draw_widths(View(read_events(make_run(rows=rows))))
    assert picture is not None
    assert "keeps 50.0 %" in picture.svg
    assert "does not hold" not in picture.note


def test_a_block_that_a_client_does_not_hold_is_shown_as_nothing(make_run: MakeRun) -> None:
    rows = [
        {"event": "run", "strategy": "depthfl"},
        {**REPLY, "partition_id": 0, "widths": {"block0": 16, "block1": 16}},
        {**REPLY, "partition_id": 1, "widths": {"block0": 8, "block1": 0}, "depth": 1},
    ]
    with style():
        picture = draw_widths(View(read_events(make_run(rows=rows))))
    assert picture is not None
    assert "keeps 50.0 %" in picture.svg
    assert "0: in blocks that the client does not hold." in picture.note


def test_a_client_whose_answers_all_came_too_late_is_named_with_a_remedy(make_run: MakeRun) -> None:
    def late(partition_id: int) -> dict[str, Any]:
        return {**REPLY, "partition_id": partition_id, "status": "late", "reason": "9 versions old, 2 allowed"}

    replies = [{**REPLY, "partition_id": 0}, late(0), late(0), late(1), late(2), late(2)]
    folder = make_run(rows=[{"event": "run", "strategy": "cos2p"}, *replies])
    found = [text for text in re.findall(r"<li>(.*?)</li>", write_report(folder).read_text()) if "too late" in text]
    assert len(found) == 1, "not who was late once, or is in the model as well"
    assert found[0].startswith("Client 2: nothing of it is in the model, all its 2 answers came too late (9 versions")
    assert "Raise loop.max-staleness" in found[0]
