"""Dynamic channel pruning by input salience: gates that any CNN with a layout can wear (ADP, arXiv 2106.06921)."""

from pruning.gates.evidence import ABSENT, OVERLAPS, SALIENCE, STATISTICS, STATISTICS_OF, Evidence
from pruning.gates.export import fold_norms, for_inference
from pruning.gates.gate import FLOOR, Gate, Winners, group_samples, template, top
from pruning.gates.net import (
    PREFIX,
    SHARES,
    Gates,
    attach,
    executed_ratios,
    gated_groups,
    gates_of,
    key_of,
    select_winners,
)
from pruning.gates.plan import MARGIN, PLAN, LayerPlan, measure_plan
from pruning.gates.sites import MIN_WINNERS, GateError, Site, find_sites, num_winners
from pruning.gates.upload import BITMAP, check_bitmap, to_bitmap, upload_spec

__all__ = [
    "ABSENT",
    "BITMAP",
    "FLOOR",
    "MARGIN",
    "MIN_WINNERS",
    "OVERLAPS",
    "PLAN",
    "PREFIX",
    "SALIENCE",
    "SHARES",
    "STATISTICS",
    "STATISTICS_OF",
    "Evidence",
    "Gate",
    "GateError",
    "Gates",
    "LayerPlan",
    "Site",
    "Winners",
    "attach",
    "check_bitmap",
    "executed_ratios",
    "find_sites",
    "fold_norms",
    "for_inference",
    "gated_groups",
    "gates_of",
    "group_samples",
    "key_of",
    "measure_plan",
    "num_winners",
    "select_winners",
    "template",
    "to_bitmap",
    "top",
    "upload_spec",
]
