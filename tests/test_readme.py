"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from tests.runs import equal_states, final_state, tiny_run

README = Path(__file__).parents[1] / "README.md"


def test_the_trained_model_and_a_part_of_it_come_out_of_a_run_as_the_readme_says(tmp_path):
    tiny_run(tmp_path / "run", model__name="cnn", num_rounds=1)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("results/RUN", str(tmp_path / "run")), names)
    assert equal_states(dict(names["model"].state_dict()), final_state(tmp_path / "run"))
    small = names["small"].eval()
    assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in names["model"].parameters())
