"""Documents are made from kept figures."""

from __future__ import annotations

import json
import shlex

from bench import readme


def test_a_marked_part_is_replaced_and_the_rest_stays():
    text = "before\n<!-- begin x -->\nold\n<!-- end x -->\nafter\n"
    assert readme.replace_part(text, "x", "new") == "before\n<!-- begin x -->\nnew\n<!-- end x -->\nafter\n"
    assert readme.replace_part(text, "y", "new") == text


def test_rows_with_different_columns_make_one_table():
    rows = [{"method": "a", "time": 0.123456}, {"method": "b", "note": None}]
    assert readme.markdown(rows).splitlines() == [
        "| method | time | note |",
        "| --- | --- | --- |",
        "| a | 0.1235 |  |",
        "| b |  |  |",
    ]


def test_what_a_server_keeps_up_with_and_holds_is_shown_where_it_was_measured():
    crowd, memory = {"clients": 50, "samples_per_s": 600.0}, {"max_upload_bytes": 2**22, "clients": 3}
    assert readme.of_server({"crowd": crowd, "memory": [memory]}) == [], "an older record"
    crowd["device_slowness_kept_up_with"] = 123.4
    memory |= {"peak_above_server": 27_000_000, "bound_on_two_stretches": 25_000_000, "verdict": "ABOVE 2.5e+07"}
    first, second = readme.of_server({"crowd": crowd, "memory": [memory]})
    assert (first["found"], second["found"]) == (
        "123 times its core's: not with devices as fast as itself",
        "1.08 (aim: at most 1)",
    )
    assert "50 clients" in first["what"]
    assert "4 MiB from 3 clients" in second["what"]


def test_the_documents_hold_the_figures_that_are_kept(tmp_path, monkeypatch):
    """Whoever keeps new figures has to run ``python -m bench.readme``."""
    texts = [path.read_text(encoding="utf-8") for path in (readme.README, readme.ALL)]
    copies = [tmp_path / "README.md", tmp_path / "benchmarks.md"]
    for copy, text in zip(copies, texts, strict=True):
        copy.write_text(text, encoding="utf-8")
    monkeypatch.setattr(readme, "README", copies[0])
    monkeypatch.setattr(readme, "ALL", copies[1])
    readme.main()
    assert [copy.read_text(encoding="utf-8") for copy in copies] == texts


def test_the_command_of_every_kept_record_is_one_for_a_shell_and_writes_to_that_record():
    for path in readme.RESULTS.glob("*.json"):
        python, dash_m, module, *options = shlex.split(json.loads(path.read_text(encoding="utf-8"))["command"])
        assert (python, dash_m) == ("python", "-m")
        name = module.removeprefix("bench.")
        assert (readme.RESULTS.parent / f"{name}.py").exists()
        if name == path.stem:
            assert "--out" not in options
        else:
            assert options[options.index("--out") + 1] == f"bench/results/{path.name}"
