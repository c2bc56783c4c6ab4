"""One short file per method, and the event loop they share."""

from strategies.adaptcl import AdaptCL
from strategies.base import SubModelStrategy
from strategies.fedavg import FedAvg
from strategies.fedrolex import FedRolex
from strategies.fjord import FjORD
from strategies.heterofl import HeteroFL

STRATEGIES: dict[str, type[SubModelStrategy]] = {
    kind.name: kind for kind in (FedAvg, HeteroFL, AdaptCL, FjORD, FedRolex)
}
"""Every method by the name that ``strategy = ...`` takes."""

__all__ = ["STRATEGIES", "AdaptCL", "FedAvg", "FedRolex", "FjORD", "HeteroFL", "SubModelStrategy"]
