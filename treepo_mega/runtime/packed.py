"""Plain values as bytes: JSON, but for long lists of numbers, which travel as arrays.

    data = pack({"tokens": [...], "logprobs": [...]})     # 8 bytes a token instead of 28
    unpack(data)                                          # what JSON would have made of it

Layout: magic, CRC-32 of what follows, length of the JSON text, the text, the arrays one after the other. In the text an
array stands as {"$": [kind, offset in bytes, entries]}; keys that begin with "$" get one more. Every number comes back
bit for bit: fp32 holds what is exact in it, as an engine's logprobs are, and fp64 the rest. NumPy arrays travel as they
are, with their shape as a fourth entry, and come back as read-only arrays.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from treepo_mega.errors import TreepoError

MAGIC = b"TPK1"
HEADER = struct.Struct("<4sIQ")
"""Magic, checksum, bytes of the JSON text."""
LEAST = 16
"""Entries of the shortest list that is an array: below, its place in the text would be longer than its numbers."""
MARK = "$"
KINDS: dict[str, np.dtype[Any]] = {
    kind: np.dtype(f"<{kind}") for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "f4", "f8")
}


class PackedError(TreepoError):
    """Bytes that are not what `pack` made: damaged, cut short, or of another version."""


def pack(value: Any) -> bytes:
    """A `value` of arrays and what JSON knows, as bytes. Raises what json.dumps raises for other values."""
    arrays = _Arrays()
    text = json.dumps(_skeleton(value, arrays)).encode()
    body = b"".join((text, *arrays.parts))
    return HEADER.pack(MAGIC, _checksum(len(text), body), len(text)) + body


def unpack(data: bytes | memoryview) -> Any:
    """What `pack` was given, arrays as arrays and the rest as json.loads(json.dumps(value)) gives it.

    Raises PackedError for any damage.
    """
    if len(data) < HEADER.size:
        raise PackedError(f"{len(data)} bytes, and the header alone has {HEADER.size}")
    magic, checksum, length = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise PackedError(f"it begins with {magic!r}, expected {MAGIC!r}: ranks run different versions of treepo_mega?")
    body = memoryview(data)[HEADER.size :]
    found = _checksum(length, body)
    if found != checksum:
        raise PackedError(f"checksum {found:08x}, expected {checksum:08x}, of {len(body)} bytes")
    return json.loads(bytes(body[:length]), object_hook=partial(_restored, body[length:]))


def _checksum(length: int, body: bytes | memoryview) -> int:
    # The length is not in the body, and wrong it would part text and arrays elsewhere.
    return zlib.crc32(body, zlib.crc32(struct.pack("<Q", length)))


@dataclass(slots=True)
class _Arrays:
    """The arrays of a value, as they will follow its text."""

    parts: list[bytes] = field(default_factory=list)
    nbytes: int = 0

    def add(self, array: np.ndarray) -> dict[str, Any]:
        """Keep `array`; what stands for it in the text."""
        place = {MARK: [array.dtype.str[1:], self.nbytes, len(array)]}
        self.parts.append(array.tobytes())
        self.nbytes += array.nbytes
        return place

    def add_shaped(self, array: np.ndarray) -> dict[str, Any]:
        """As `add`, for an array that comes back as one. Raises TypeError for other numbers than KINDS."""
        flat = np.ascontiguousarray(array).reshape(-1)
        if array.dtype.str[1:] not in KINDS:
            raise TypeError(f"an array of {array.dtype} is not among {', '.join(KINDS)}")
        little = flat.astype(KINDS[array.dtype.str[1:]], copy=False)
        return {MARK: [*self.add(little)[MARK], list(array.shape)]}


def _skeleton(value: Any, arrays: _Arrays) -> Any:
    """`value` with places for its long lists of numbers, which go to `arrays`."""
    if isinstance(value, dict):
        return {_escaped(key): _skeleton(entry, arrays) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return arrays.add_shaped(value)
    if not isinstance(value, list | tuple):
        return value
    array = _array(value) if len(value) >= LEAST else None
    return [_skeleton(entry, arrays) for entry in value] if array is None else arrays.add(array)


def _array(values: list[Any] | tuple[Any, ...]) -> np.ndarray | None:
    """`values` as the smallest exact array; None where an entry is no plain number, or too large for 64 bits."""
    # By type and not by isinstance: True is an int, and must come back as true.
    types = set(map(type, values))
    if types == {float}:
        wide = np.array(values, KINDS["f8"])
        with np.errstate(over="ignore"):
            narrow = wide.astype(KINDS["f4"])
        # Bits and not values: -0.0 equals 0.0, and NaN equals nothing.
        return narrow if np.array_equal(narrow.astype(KINDS["f8"]).view("<i8"), wide.view("<i8")) else wide
    if types == {int}:
        try:
            whole = np.array(values, KINDS["i8"])
        except OverflowError:
            return None
        small = whole.astype(KINDS["i4"])
        return small if np.array_equal(small, whole) else whole
    return None


def _escaped(key: Any) -> Any:
    return MARK + key if isinstance(key, str) and key.startswith(MARK) else key


def _restored(arrays: memoryview, entry: dict[str, Any]) -> Any:
    """A dict of the text as it was, or the list that it holds the place of."""
    if MARK in entry:
        kind, offset, count, *shaped = entry[MARK]
        array = np.frombuffer(arrays, KINDS[kind], count, offset)
        return array.reshape(shaped[0]) if shaped else array.tolist()
    if any(key.startswith(MARK) for key in entry):
        return {key.removeprefix(MARK): held for key, held in entry.items()}
    return entry
