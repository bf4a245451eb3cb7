"""Damaged and crafted patch files, made from good ones; the same seed gives the same file."""

import copy
import json
import random
import struct

_VALUES = [
    None,
    True,
    -1,
    0,
    1 << 70,
    1e308,
    "",
    "\ud800",
    "../../x",
    [],
    {},
    [[[]]],
    {"a": {}},
    "F32",
    "BF16",
    [1 << 40, 8],
]


def mutated(good: bytes, seed: int) -> bytes:
    """One damaged file: bytes flipped, cut, repeated, or the header rewritten with other values."""
    rng = random.Random(seed)
    data = bytearray(good)
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 1:
        del data[rng.randrange(len(data)) :]
    elif kind == 2:
        at = rng.randrange(len(data))
        data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 64)))
    elif kind == 3:
        data[:8] = struct.pack("<Q", rng.choice([0, 1, 7, len(data), 1 << 31, (1 << 63) - 1, (1 << 64) - 1]))
    else:
        size = int.from_bytes(good[:8], "little")
        outer = json.loads(good[8 : 8 + size])
        if kind == 4:
            _change(outer, rng)
        else:
            inner = json.loads(outer["__metadata__"]["mint"])
            for _ in range(rng.randrange(1, 4)):
                _change(inner, rng)
            outer["__metadata__"]["mint"] = json.dumps(inner)
        raw = json.dumps(outer).encode("utf-8", "surrogatepass")
        data = bytearray(struct.pack("<Q", len(raw)) + raw + good[8 + size :])
    return bytes(data)


def _change(value, rng: random.Random) -> None:
    """Replace, drop or double one entry somewhere inside a decoded JSON value."""
    while isinstance(value, dict | list) and value:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        inner = value[key]
        if not (isinstance(inner, dict | list) and inner) or rng.random() < 0.3:
            if rng.random() < 0.2:
                del value[key]
            elif isinstance(value, list) and rng.random() < 0.3:
                value.append(inner)
            else:
                value[key] = copy.deepcopy(rng.choice(_VALUES))
            return
        value = inner
