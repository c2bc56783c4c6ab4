"""Specs as text: how messages, settings of objectives and checkpoints write down which units a client keeps."""

from __future__ import annotations

import json

import numpy as np

from pruning.spec import SpecError, SubModelSpec


def spec_to_json(spec: SubModelSpec | None) -> str:
    """A spec as JSON: per group a bitmap in hexadecimal, as long as the highest kept unit; empty text for None."""
    if spec is None:
        return ""
    kept = {}
    for name, units in spec.arrays.items():
        mask = np.zeros(int(units[-1]) + 1, dtype=bool)
        mask[units] = True
        kept[name] = np.packbits(mask).tobytes().hex()
    return json.dumps({"kept": kept, "depth": spec.depth})


def spec_from_json(text: str) -> SubModelSpec | None:
    """Inverse of ``spec_to_json``. Whether it fits a layout is for ``SubModelSpec.check`` to say.

    Raises
    ------
    SpecError
        If the text is not what ``spec_to_json`` writes.
    """
    if not text:
        return None
    try:
        raw = json.loads(text)
        kept = {
            name: np.flatnonzero(np.unpackbits(np.frombuffer(bytes.fromhex(bits), dtype=np.uint8))).tolist()
            for name, bits in raw["kept"].items()
        }
        depth = raw["depth"]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise SpecError(f"spec: {text[:100]!r} holds no bitmaps and depth: {type(error).__name__}: {error}") from error
    if depth is not None and (not isinstance(depth, int) or isinstance(depth, bool)):
        raise SpecError(f"spec: depth: got {str(depth)[:100]!r}, expected a whole number or null")
    return SubModelSpec.of(kept, depth)
