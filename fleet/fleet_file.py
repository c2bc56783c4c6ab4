"""Fleets from a TOML file.

::

    drop-out-ratio = 0.05                # optional, as are the tables below the devices

    [[devices]]
    profile = "jetson-nano"              # start from a named profile ...
    count = 3
    slowdown = 1.5                       # ... made slower ...
    uplink-bytes-per-s = 500_000         # ... and with figures of your own

    [[devices]]                          # or all figures of your own
    name = "my board"
    train-flops = 2e10                   # sustained in training, FLOP/s
    memory-bytes = 2_000_000_000
    uplink-bytes-per-s = 1_000_000
    downlink-bytes-per-s = 4_000_000
    overhead-s = 0.5                     # optional
    source = "measured by us"            # optional

    [availability]
    online-ratio = 0.8
    mean-online-s = 600

    [drift]
    step-ratio = 0.1
    interval-s = 60
    max-ratio = 4
    shifts = [{ partition-id = 2, time-s = 100, slowdown = 3 }]
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

from fleet.devices import PROFILES, DeviceProfile
from fleet.dynamics import Availability, Drift, Shift
from fleet.names import FleetError, unknown_name

TOP_KEYS = ("devices", "drop-out-ratio", "availability", "drift")


@dataclass(frozen=True)
class FleetFile:
    """What a fleet file says.

    Attributes
    ----------
    devices : one per client, counts expanded.
    availability, drop_out_ratio, drift : as in ``Fleet``.
    """

    devices: tuple[DeviceProfile, ...]
    availability: Availability | None
    drop_out_ratio: float
    drift: Drift | None


def read_fleet_file(path: Path) -> FleetFile:
    """Read the fleet file at ``path``.

    Raises
    ------
    FleetError : no such file, no TOML, an unknown key, a missing key, a wrong type or a value out of range.
    """
    where = f"fleet file {path}"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FleetError(f"{where}: cannot be read ({error.strerror}); give the path of a .toml file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FleetError(f"{where}: is no valid TOML: {error}") from error
    _check_keys(where, content, TOP_KEYS)
    tables = content.get("devices")
    if not isinstance(tables, list) or not tables:
        raise FleetError(f"{where}: needs at least one [[devices]] table")
    devices: list[DeviceProfile] = []
    for index, table in enumerate(tables):
        devices.extend(_devices(f"{where}, [[devices]] number {index + 1}", table))
    drift = content.get("drift")
    if drift is not None:
        drift = dict(_table(f"{where}, [drift]", drift))
        shifts = drift.pop("shifts", [])
        if not isinstance(shifts, list):
            raise FleetError(f"{where}, [drift]: shifts must be a list of tables, got {shifts!r}")
        drift = replace(
            _build(f"{where}, [drift]", Drift, drift, ("shifts",)),
            shifts=tuple(_build(f"{where}, [drift] shifts", Shift, shift) for shift in shifts),
        )
    availability = content.get("availability")
    return FleetFile(
        tuple(devices),
        None if availability is None else _build(f"{where}, [availability]", Availability, availability),
        _number(where, "drop-out-ratio", content.get("drop-out-ratio", 0.0)),
        drift,
    )


def _devices(where: str, table: Any) -> list[DeviceProfile]:
    table = dict(_table(where, table))
    count = table.pop("count", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise FleetError(f"{where}: count must be a whole number >= 1, got {count!r}")
    slowdown = _number(where, "slowdown", table.pop("slowdown", 1.0))
    if not (isfinite(slowdown) and slowdown > 0):
        raise FleetError(f"{where}: slowdown must be a finite number > 0, got {slowdown!r}")
    name = table.pop("profile", None)
    if name is None:
        device = _build(where, DeviceProfile, {"source": "fleet file", **table}, ("profile", "count", "slowdown"))
        return [device.slowed(slowdown)] * count
    if not isinstance(name, str):
        raise FleetError(f"{where}: profile must be a text, got {name!r}")
    if name not in PROFILES:
        raise FleetError(f"{where}: {unknown_name('device profile', name, PROFILES)}")
    base = PROFILES[name].slowed(slowdown)
    given = {key.replace("_", "-"): getattr(base, key) for key in _field_names(DeviceProfile)}
    if table:
        given["source"] = f"{base.source}; {', '.join(table)} from the fleet file"
    return [_build(where, DeviceProfile, given | table, ("profile", "count", "slowdown"))] * count


def _build(where: str, kind: type[Any], table: Any, also_known: Sequence[str] = ()) -> Any:
    """Make a ``kind`` (a dataclass) of a table with kebab-case keys."""
    table = _table(where, table)
    names = _field_names(kind)
    _check_keys(where, table, [*(name.replace("_", "-") for name in names), *also_known])
    texts = {field.name for field in fields(kind) if field.type == "str"}
    wholes = {field.name for field in fields(kind) if field.type == "int"}
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name in texts:
            if not isinstance(value, str):
                raise FleetError(f"{where}: {key} must be a text, got {value!r}")
            values[name] = value
        else:
            values[name] = _number(where, key, value)
            if name in wholes:
                if values[name] != int(values[name]):
                    raise FleetError(f"{where}: {key} must be a whole number, got {value!r}")
                values[name] = int(values[name])
    missing = [f.name.replace("_", "-") for f in fields(kind) if f.default is MISSING and f.name not in values]
    if missing:
        raise FleetError(f"{where}: {', '.join(missing)} must be given")
    try:
        return kind(**values)
    except FleetError as error:
        raise FleetError(f"{where}: {error}") from error


def _field_names(kind: type[Any]) -> list[str]:
    return [field.name for field in fields(kind)]


def _table(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise FleetError(f"{where}: expected a table, got {value!r}")
    return value


def _check_keys(where: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in table:
        if key not in known:
            raise FleetError(f"{where}: {unknown_name('key', key, known)}")


def _number(where: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FleetError(f"{where}: {key} must be a number, got {value!r}")
    return float(value)
