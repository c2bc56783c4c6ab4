"""Where the windows of rolling extraction start (FedRolex, Alam et al. 2022, arXiv 2212.01548).

In the paper all windows of one size move together: in round j each starts at unit ``j mod size``. So every *unit* is
held equally often over a cycle. An *entry* between two groups is held when both its units are, and as their windows
move in step, entries far from the diagonal are held rarely or, under windows of up to half the size, never.

``staggered_starts`` moves adjacent groups at different speeds, like the digits of a counter: each pair of windows
positions comes up equally often, and so every entry is held equally often over a cycle.
"""

from __future__ import annotations

from pruning.groups import Layout


def lockstep_starts(layout: Layout, turn: int) -> dict[str, int]:
    """First unit of every group's window: ``turn mod size`` (FedRolex, equation 4)."""
    return {group.name: turn % group.size for group in layout.prunable}


def staggered_starts(layout: Layout, turn: int, num_positions: int) -> dict[str, int]:
    """First unit of every group's window when adjacent groups move like the digits of a counter.

    Parameters
    ----------
    turn : counts the rounds from 0.
    num_positions : a window goes around its group in as many steps. Coverage is exactly even over
        ``num_positions ** num_digits`` rounds if it divides the group's size, and size / num_positions its width.
    """
    digits = digits_of(layout)
    return {
        group.name: turn // num_positions ** digits[group.name] % num_positions * group.size // num_positions
        for group in layout.prunable
    }


def digits_of(layout: Layout) -> dict[str, int]:
    """Group name -> the digit of the counter that moves it: groups that share an entry have different ones."""
    neighbours: dict[str, set[str]] = {group.name: set() for group in layout.prunable}
    for pairs in layout.axes_of.values():
        names = {group.name for group, _ in pairs if group.exact}
        for name in names:
            neighbours[name] |= names - {name}
    digits: dict[str, int] = {}
    for name, adjacent in neighbours.items():
        taken = {digits[other] for other in adjacent if other in digits}
        digits[name] = min(set(range(len(taken) + 1)) - taken)
    return digits
