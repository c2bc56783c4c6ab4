"""Dynamic channel pruning by input salience: gates that any CNN with a layout can wear (ADP, arXiv 2106.06921)."""

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
from pruning.gates.sites import MIN_WINNERS, GateError, Site, find_sites, num_winners

__all__ = [
    "FLOOR",
    "MIN_WINNERS",
    "PREFIX",
    "SHARES",
    "Gate",
    "GateError",
    "Gates",
    "Site",
    "Winners",
    "attach",
    "executed_ratios",
    "find_sites",
    "gated_groups",
    "gates_of",
    "group_samples",
    "key_of",
    "num_winners",
    "select_winners",
    "template",
    "top",
]
