"""What a device's first message imports, as it is listed."""

from __future__ import annotations

import pytest

from bench.message import FORK, NUM_LISTED, imports, listed

PRINTED = f"""\
import time: self [us] | cumulative | imported package
import time:       100 |        100 |   torch._C
import time:      1900 |       2000 | torch
import time:       250 |        250 | json
{FORK}
import time:       500 |        500 |   wire.message
import time:       300 |        800 | client_app.app
import time:       250 |        250 | json.decoder
"""


def test_modules_are_summed_by_package_with_what_is_left_for_a_fork():
    rows = {row["package"]: row for row in listed(PRINTED)}
    assert next(iter(rows)) == "torch"
    assert (rows["torch"]["modules"], rows["torch"]["s"], rows["torch"]["s_of_a_fork"]) == (2, 0.002, 0.0)
    assert (rows["standard library"]["s"], rows["standard library"]["s_of_a_fork"]) == (0.0005, 0.00025)
    assert rows["all"]["s"] == pytest.approx(0.0033)
    assert rows["all"]["s_of_a_fork"] == pytest.approx(0.00105)


def test_no_more_than_a_dozen_are_named():
    text = "".join(f"import time: {n:9d} | {n:9d} | package{n}\n" for n in range(1, 31))
    rows = listed(text)
    assert [row["package"] for row in rows[:2]] == ["package30", "package29"]
    assert len(rows) == NUM_LISTED + 2
    assert rows[-2]["modules"] == 30 - NUM_LISTED


@pytest.mark.slow
def test_a_client_that_is_forked_imports_neither_torch_nor_flower_nor_what_only_the_server_needs(tmp_path):
    rows = {row["package"]: row for row in imports(tmp_path)}
    assert rows["torch"]["s"] > 10 * rows["torch"]["s_of_a_fork"]
    assert not {"ray", "matplotlib", "jinja2", "server_app", "reporting", "strategies"} & rows.keys()
