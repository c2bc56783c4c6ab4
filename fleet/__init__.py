"""Who the clients are: devices, time, and data. Importing it loads neither torch nor a data set."""

from fleet.clock import Duration, DurationModel, VirtualClock
from fleet.data import DataError, ImageData, load_data
from fleet.devices import PROFILES, DeviceProfile
from fleet.dynamics import Availability, Drift, Shift
from fleet.fleet import Fleet, make_fleet
from fleet.names import FleetError
from fleet.partition import PartitionError, label_counts, partition_labels, split_local

__all__ = [
    "PROFILES",
    "Availability",
    "DataError",
    "DeviceProfile",
    "Drift",
    "Duration",
    "DurationModel",
    "Fleet",
    "FleetError",
    "ImageData",
    "PartitionError",
    "Shift",
    "VirtualClock",
    "label_counts",
    "load_data",
    "make_fleet",
    "partition_labels",
    "split_local",
]
