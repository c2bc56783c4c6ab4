"""One short file per method, and the event loop they share."""

from strategies.adaptcl import AdaptCL
from strategies.base import SubModelStrategy
from strategies.fedavg import FedAvg
from strategies.fedmp import FedMP
from strategies.fednova import FedNova
from strategies.fedprox import FedProx
from strategies.fedrolex import FedRolex
from strategies.fjord import FjORD
from strategies.heterofl import HeteroFL
from strategies.only_capable import OnlyCapable
from strategies.scaffold import Scaffold
from strategies.smallest_everywhere import SmallestEverywhere

STRATEGIES: dict[str, type[SubModelStrategy]] = {
    kind.name: kind
    for kind in (
        FedAvg,
        SmallestEverywhere,
        OnlyCapable,
        FedProx,
        Scaffold,
        FedNova,
        HeteroFL,
        AdaptCL,
        FedMP,
        FjORD,
        FedRolex,
    )
}
"""Every method by the name that ``strategy = ...`` takes."""

__all__ = [
    "STRATEGIES",
    "AdaptCL",
    "FedAvg",
    "FedMP",
    "FedNova",
    "FedProx",
    "FedRolex",
    "FjORD",
    "HeteroFL",
    "OnlyCapable",
    "Scaffold",
    "SmallestEverywhere",
    "SubModelStrategy",
]
