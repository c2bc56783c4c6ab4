"""What clients say of their gates: what is turned away, and how it is averaged."""

from __future__ import annotations

import pytest
import torch

from pruning.gates import ABSENT, OVERLAPS, PLAN, SALIENCE, STATISTICS, STATISTICS_OF
from strategies.gate_rows import GateRowError, GateRows, check_evidence

SIZES = (8, 16)
GOOD = {
    SALIENCE: torch.ones(24),
    STATISTICS_OF: torch.zeros(2, len(STATISTICS)),
    OVERLAPS: torch.ones(3, 3),
    PLAN: torch.ones(2, 2),
}


def test_evidence_that_fits_is_taken_with_or_without_its_optional_parts():
    check_evidence(GOOD, SIZES)
    check_evidence({SALIENCE: GOOD[SALIENCE]}, SIZES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({SALIENCE: None}, "'gates.salience' is missing"),
        ({SALIENCE: torch.ones(23)}, r"'gates.salience' should be real with shape \(24,\), got torch.float32 \(23,\)"),
        ({SALIENCE: torch.ones(24, dtype=torch.int64)}, r"real with shape \(24,\), got torch.int64 \(24,\)"),
        ({STATISTICS_OF: torch.zeros(3, len(STATISTICS))}, r"'gates.statistics' .* shape \(2, 4\), got .*\(3, 4\)"),
        ({STATISTICS_OF: torch.zeros(2, 9)}, r"'gates.statistics' .* shape \(2, 4\), got .*\(2, 9\)"),
        ({OVERLAPS: torch.ones(3, 2)}, r"'gates.overlaps' .* shape \(3, 3\), got .*\(3, 2\)"),
        ({OVERLAPS: torch.ones(3)}, r"'gates.overlaps' .* got .*\(3,\)"),
        ({OVERLAPS: torch.tensor(1.0)}, r"'gates.overlaps' .* got .*\(\)"),
        ({PLAN: torch.ones(2, 3)}, r"'.*plan.*' .* shape \(2, 2\), got .*\(2, 3\)"),
        ({PLAN: torch.ones(1, 2)}, r"'.*plan.*' .* shape \(2, 2\), got .*\(1, 2\)"),
    ],
)
def test_evidence_that_does_not_fit_the_gates_is_turned_away_with_both_shapes(changes, message):
    found = {name: tensor for name, tensor in {**GOOD, **changes}.items() if tensor is not None}
    with pytest.raises(GateRowError, match=message):
        check_evidence(found, SIZES)


def test_overlaps_are_means_over_the_clients_that_have_both_classes_and_none_at_all_counts_as_none():
    rows = GateRows()
    rows.note({OVERLAPS: torch.tensor([[1.0, 0.0, ABSENT], [0.0, 1.0, ABSENT], [ABSENT, ABSENT, ABSENT]])})
    rows.note({OVERLAPS: torch.tensor([[1.0, 0.5, ABSENT], [0.5, 1.0, ABSENT], [ABSENT, ABSENT, 1.0]])})
    expected = [[1.0, 0.25, ABSENT], [0.25, 1.0, ABSENT], [ABSENT, ABSENT, 1.0]]
    assert rows.close(["a", "b"])["overlaps"] == expected
