"""Specs as text: how messages, settings of objectives and checkpoints write down which units a client keeps."""

from __future__ import annotations

import json

import numpy as np

from pruning.spec import SubModelSpec


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
    """Inverse of ``spec_to_json``."""
    if not text:
        return None
    raw = json.loads(text)
    kept = {
        name: np.flatnonzero(np.unpackbits(np.frombuffer(bytes.fromhex(bits), dtype=np.uint8))).tolist()
        for name, bits in raw["kept"].items()
    }
    return SubModelSpec.of(kept, raw["depth"])
