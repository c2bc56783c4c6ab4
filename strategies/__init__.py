"""One short file per method, and the event loop they share."""

from strategies.adaptcl import AdaptCL
from strategies.adasplit import AdaSplit
from strategies.adp import ADP
from strategies.base import SubModelStrategy
from strategies.cos2p import CoS2P
from strategies.dc_asgd import DCASGD
from strategies.depthfl import DepthFL
from strategies.fedasync import FedAsync
from strategies.fedavg import FedAvg
from strategies.fedbuff import FedBuff
from strategies.fedmp import FedMP
from strategies.fednova import FedNova
from strategies.fedprox import FedProx
from strategies.fedrolex import FedRolex
from strategies.fiarse import FIARSE
from strategies.fjord import FjORD
from strategies.heterofl import HeteroFL
from strategies.loop import has_own_loop
from strategies.only_capable import OnlyCapable
from strategies.scaffold import Scaffold
from strategies.scalefl import ScaleFL
from strategies.semi_async import SemiAsync
from strategies.sl_basic import SLBasic
from strategies.smallest_everywhere import SmallestEverywhere
from strategies.splitfed import SplitFed
from strategies.ssp import SSP

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
        CoS2P,
        ADP,
        FedMP,
        FjORD,
        FedRolex,
        FIARSE,
        SemiAsync,
        FedAsync,
        FedBuff,
        SSP,
        DCASGD,
        DepthFL,
        ScaleFL,
        AdaSplit,
        SLBasic,
        SplitFed,
    )
}
"""Every method by the name that ``strategy = ...`` takes."""

LOOPS: dict[str, type[SubModelStrategy]] = {name: kind for name, kind in STRATEGIES.items() if has_own_loop(kind)}
"""Those that are a way to run the loop, by the name that ``loop.preset = ...`` takes as well."""

__all__ = [
    "ADP",
    "DCASGD",
    "FIARSE",
    "LOOPS",
    "SSP",
    "STRATEGIES",
    "AdaSplit",
    "AdaptCL",
    "CoS2P",
    "DepthFL",
    "FedAsync",
    "FedAvg",
    "FedBuff",
    "FedMP",
    "FedNova",
    "FedProx",
    "FedRolex",
    "FjORD",
    "HeteroFL",
    "OnlyCapable",
    "SLBasic",
    "Scaffold",
    "ScaleFL",
    "SemiAsync",
    "SmallestEverywhere",
    "SplitFed",
    "SubModelStrategy",
]
