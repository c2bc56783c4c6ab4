"""Merging by labels: only the classifier rows of classes that a client has (HeteroFL, FedRolex)."""

from __future__ import annotations

from pruning.groups import Layout
from pruning.spec import SubModelSpec
from wire.flat import refuse
from wire.message import Report


def check_classes(layout: Layout, keys: str, model: str) -> None:
    """Refuse to merge by labels where nobody knows which rows of the model belong to which class.

    Raises
    ------
    ConfigError
        If the layout has no group ``classes``; ``keys`` is the setting that asked for it.
    """
    refuse(
        "classes" not in layout.by_name,
        f"{keys}=true",
        f"the layout of {model!r} has no group 'classes' (a regression head, or a traced model with its classifier "
        f"undeclared); declare the group or set {keys}=false",
    )


def with_present_classes(spec: SubModelSpec, report: Report) -> SubModelSpec | None:
    """The part of ``spec`` whose classes the client has; None where it has none or does not say."""
    present = [label for label, count in enumerate(report.label_counts) if count]
    return SubModelSpec.of({**spec.units, "classes": present}, spec.depth) if present else None
