"""What is done to a file before it is read: to its bytes, its numbers, its JSON."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

BOUNDARIES = (
    0, 1, 2, 3, 7, 8, 9, 12, 31, 32, 33, 64, 127, 128, 255, 256, 257, 4096, 65535, 65536,
    2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip


def number(rng: random.Random, old: int, size: int = 0) -> int:
    """A number to stand in an old one's place, ``size`` being that of the file."""
    kind = rng.randrange(5)
    if kind == 0:
        return old + rng.choice((-1, 1))
    if kind == 1:
        return old ^ 1 << rng.randrange(64)
    if kind == 2:
        return max(size + rng.randrange(-40, 40), 0)
    if kind == 3:
        return rng.randrange(64)
    return rng.choice(BOUNDARIES)


class Numbers:
    """Bytes under construction that remember where their numbers are."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.places: list[tuple[int, str]] = []

    def add(self, code: str, value: Any) -> None:
        """A number by its struct code."""
        self.places.append((len(self.data), code))
        self.data += struct.pack("<" + code, value)

    def string(self, raw: bytes, length: str = "Q") -> None:
        self.add(length, len(raw))
        self.data += raw

    def damaged(self, rng: random.Random) -> bytes:
        """The bytes, with some of the numbers changed, or some of the bytes."""
        data = bytearray(self.data)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if rng.random() < 0.6 and self.places:
                place, code = rng.choice(self.places)
                if place + struct.calcsize(code) <= len(data):
                    change_number(rng, data, place, code)
            else:
                data = change_bytes(rng, data)
        return bytes(data)


def change_number(rng: random.Random, data: bytearray, place: int, code: str) -> None:
    size = struct.calcsize("<" + code)
    if code in "fd?":
        data[place : place + size] = rng.randbytes(size)
        return
    (old,) = struct.unpack_from("<" + code, data, place)
    new = number(rng, old, len(data)) & (1 << 8 * size) - 1
    data[place : place + size] = new.to_bytes(size, "little")


def change_bytes(rng: random.Random, data: bytearray) -> bytearray:
    """A flip, a cut, an end that is missing, bytes moved from elsewhere, or bytes too many."""
    if not data:
        return bytearray(rng.randbytes(rng.randrange(64)))
    # The beginning is where the structure is.
    place = min(int(len(data) * rng.random() ** 2), len(data) - 1)
    length = rng.choice((1, 2, 4, 8, rng.randrange(1, 64)))
    kind = rng.randrange(6)
    if kind == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[place] = rng.randrange(256)
    elif kind == 2:
        del data[place : place + length]
    elif kind == 3:
        del data[place:]
    elif kind == 4:
        start = rng.randrange(len(data))
        data[place:place] = data[start : start + length]
    else:
        data[place:place] = rng.randbytes(length)
    return data


# ---- JSON ----------------------------------------------------------------------------------------


def value(rng: random.Random) -> Any:
    """A JSON value that nobody expects."""
    nested: Any = []
    for _ in range(rng.choice((5, 50, 200))):
        nested = [nested]
    return rng.choice((
        None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308,
        float("inf"), float("nan"), "", "x", "q4_0", "Q4_K", "q9", "F32", "U8", "\x00", "\ud800",
        "é" * 1000, "../../etc/passwd", "/", [], {}, [[]], [None], {"": None}, {"a": {"a": []}},
        nested, [0] * 300, rng.randrange(1 << 16),
    ))  # fmt: skip


def _containers(tree: Any) -> list[Any]:
    found = [tree] if isinstance(tree, (dict, list)) and tree else []
    for item in tree.values() if isinstance(tree, dict) else tree if found else ():
        found += _containers(item)
    return found


def change_json(rng: random.Random, tree: Any) -> Any:
    """The tree with some of its values or keys changed, removed, added or exchanged."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = _containers(tree)
        if not places or rng.random() < 0.02:
            return value(rng)
        place = rng.choice(places)
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key, kind = rng.choice(keys), rng.randrange(7)
        if kind == 0:
            del place[key]
        elif kind == 1 and isinstance(place, dict):
            place[rng.choice((*keys, "", "x", "weight", "\ud800", str(rng.random())))] = place[key]
        elif kind == 2:
            other = rng.choice(_containers(tree))
            place[key] = copy.deepcopy(
                rng.choice(list(other.values()) if isinstance(other, dict) else other)
            )
        elif kind == 3 and isinstance(place[key], str):
            place[key] = inner_json(rng, place[key])
        elif kind == 4 and type(place[key]) is int:
            place[key] = number(rng, place[key])
        else:
            place[key] = value(rng)
        if len(repr(tree)) > 1 << 16:
            break
    return tree


def inner_json(rng: random.Random, text: str) -> str:
    """A string's JSON changed, if it is any; else some of its characters."""
    try:
        tree = json.loads(text)
    except ValueError:
        tree = None
    if isinstance(tree, dict):
        return json.dumps(change_json(rng, tree))
    return bytes(change_bytes(rng, bytearray(text.encode(errors="replace")))).decode(
        errors="replace"
    )


def json_text(rng: random.Random, tree: Any, *, damaged: bool) -> bytes:
    """The tree's text, now and then with the text itself changed, too."""
    if not damaged:
        return json.dumps(tree).encode()
    text = json.dumps(change_json(rng, tree)).encode() if rng.random() < 0.85 else (
        json.dumps(tree).encode()
    )  # fmt: skip
    if rng.random() < 0.2:
        text = bytes(change_bytes(rng, bytearray(text)))
    if rng.random() < 0.02:
        text = b"[" * rng.choice((500, 5000, 200_000)) + text
    return text
