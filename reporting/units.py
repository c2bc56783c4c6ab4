"""Numbers for people: seconds, bytes, counts and shares as short text."""

from __future__ import annotations

import math

MISSING = "–"


def format_seconds(seconds: float | None) -> str:
    """Return a duration such as ``840 ms``, ``12.4 s``, ``3 min 20 s``, ``2 h 05 min`` or ``3 d 4 h``."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 0:
        return "-" + format_seconds(-seconds)
    if seconds == 0:
        return "0 s"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def format_count(value: float | None, unit: str = "") -> str:
    """Return a number with a decimal prefix, three significant digits: ``11.2 M``, ``1.43 TMACs`` for unit ``MACs``."""
    return _scaled(value, 1000.0, ("", "k", "M", "G", "T", "P", "E"), unit)


def format_bytes(num_bytes: float | None) -> str:
    """Return an amount of data with decimal prefixes, as links are specified: ``3.2 MB``."""
    return _scaled(num_bytes, 1000.0, ("", "k", "M", "G", "T", "P", "E"), "B")


def format_memory(num_bytes: float | None) -> str:
    """Return an amount of memory with binary prefixes, as memory is sold: ``4 GiB``."""
    return _scaled(num_bytes, 1024.0, ("", "Ki", "Mi", "Gi", "Ti", "Pi"), "B")


def format_percent(ratio: float | None, digits: int = 1) -> str:
    """Return a share of one as percent: ``95.4 %``."""
    if ratio is None or not math.isfinite(ratio):
        return MISSING
    return f"{ratio * 100:.{digits}f} %"


def format_factor(factor: float | None) -> str:
    """Return a speed-up such as ``2.51×``."""
    if factor is None or not math.isfinite(factor):
        return MISSING
    return f"{factor:.2f}×"


def format_ratio(ratio: float | None) -> str:
    """Return a retention ratio with two or three digits after the point."""
    if ratio is None or not math.isfinite(ratio):
        return MISSING
    return f"{ratio:.3f}".rstrip("0").ljust(4, "0") if ratio < 1 else f"{ratio:.2f}"


def _scaled(value: float | None, base: float, prefixes: tuple[str, ...], unit: str) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    index = 0
    # 999.5 would round to "1000" of this prefix
    while abs(value) >= base * 0.9995 and index < len(prefixes) - 1:
        value, index = value / base, index + 1
    is_whole = index == 0 and float(value).is_integer()
    digits = 0 if is_whole or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {prefixes[index]}{unit}".rstrip()
