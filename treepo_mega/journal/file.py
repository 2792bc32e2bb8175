"""A file of records that only grows: what a killed process had written is read back, whole records alone.

    with RecordFile.create(path, header) as file:     # header and records: as for `packed.pack`
        file.append(record)
    found = read_records(path)                        # found.header, found.records, found.torn

A record is a frame (magic, bytes of the body, CRC-32 of the body, CRC-32 of the frame before it) and its body, which
`runtime/packed.py` makes: arrays and JSON, nothing that runs. The first one is the header.

What is *torn* is the end of a file whose writer was killed, or whose node lost power: a record that the file is too
short for, zeros up to the end, or a last body that is not what its frame says. It is left out. Any other damage raises
JournalError, which names file and offset. A frame has a checksum of its own, so that a damaged length does not pass
for a torn end.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from treepo_mega.errors import TreepoError
from treepo_mega.runtime.packed import PackedError, pack, unpack

MAGIC = b"TPJ1"
FRAME = struct.Struct("<4sQII")
"""Magic, bytes of the body, CRC-32 of the body, CRC-32 of the 16 bytes before it."""
_PARTS = struct.Struct("<4sQI")


class JournalError(TreepoError):
    """A file of records is damaged or another run's; the message names file and offset, and what to do."""


@dataclass(frozen=True, slots=True)
class Records:
    """What a file holds. `torn`: bytes at its end that are no whole record."""

    header: dict[str, Any] | None
    """None: not even the header is whole."""
    records: list[Any]
    torn: int


class RecordFile:
    """See the module docstring. One process writes, one record at a time."""

    def __init__(self, path: Path) -> None:
        """Use `create`."""
        self.path = path
        # Unbuffered: what `append` has returned from survives the process.
        self._file = path.open("xb", buffering=0)
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._sync: Future[None] | None = None

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> RecordFile:
        """A new file with its header. Raises FileExistsError, and OSError when the file system refuses."""
        file = cls(path)
        try:
            file.append(header)
        except OSError:
            file.close()
            raise
        return file

    def append(self, record: Any) -> int:
        """Write a record; its bytes. Returns before it is on the platter: a thread sees to that, one sync at a time.

        Raises OSError when the file system refuses, now or in the last sync. No more may be written then.
        """
        data = framed(record)
        if self._file.write(data) != len(data):
            raise OSError(28, "No space left on device", str(self.path))
        if self._sync is None or self._sync.done():
            if self._sync is not None:
                self._sync.result()
            self._sync = self._syncer.submit(os.fdatasync, self._file.fileno())
        return len(data)

    def close(self) -> None:
        """Close the file, without a last sync: what follows it needs its records no more, or they are read soon."""
        # A refused sync was, or would have been, told by `append`: here nothing is lost by it any more.
        with contextlib.suppress(OSError):
            if self._sync is not None:
                self._sync.result()
        self._syncer.shutdown()
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def framed(record: Any) -> bytes:
    """The bytes of a record in a file."""
    body = pack(record)
    start = _PARTS.pack(MAGIC, len(body), zlib.crc32(body))
    return start + struct.pack("<I", zlib.crc32(start)) + body


def read_records(path: Path) -> Records:
    """All whole records of a file. Raises JournalError for damage that is no torn end, OSError for no file."""
    data = memoryview(path.read_bytes())
    records: list[Any] = []
    at = 0
    while at < len(data):
        end = _end_of(path, data, at)
        if end is None:
            break
        try:
            records.append(unpack(data[at + FRAME.size : end]))
        except (PackedError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, at, f"its body cannot be read: {error}") from None
        at = end
    if not records:
        return Records(None, [], len(data))
    if not isinstance(records[0], dict):
        raise _damaged(path, 0, "it does not begin with a header")
    return Records(records[0], records[1:], len(data) - at)


def _end_of(path: Path, data: memoryview, at: int) -> int | None:
    """Where the record at `at` ends; None: the file's end from there is torn. Raises JournalError."""
    frame = data[at : at + FRAME.size]
    if len(frame) < FRAME.size or _is_zero(data, at):
        return None
    magic, size, checksum, own = FRAME.unpack(frame)
    if own != zlib.crc32(frame[: _PARTS.size]):
        if _is_zero(data, at + FRAME.size):
            return None
        raise _damaged(path, at, "the frame of a record has another checksum than its own")
    if magic != MAGIC:
        raise _damaged(path, at, f"a record begins with {magic!r}, expected {MAGIC!r}")
    end = at + FRAME.size + size
    if end > len(data):
        return None
    if zlib.crc32(data[at + FRAME.size : end]) != checksum:
        if _is_zero(data, end):
            return None
        raise _damaged(path, at, f"a record of {size} bytes has another checksum than its own, and others follow it")
    return end


def _is_zero(data: memoryview, at: int) -> bool:
    """Whether nothing but zeros follows.

    After a loss of power, a file may be as long as it was, with zeros in place of what was not on the disk yet.
    """
    return not any(data[at:])


def _damaged(path: Path, at: int, what: str) -> JournalError:
    return JournalError(
        f"{path}, byte {at}: {what}: the file is damaged, and what it holds cannot be trusted. Remove it, and its "
        "trees are sampled again; look at the disk"
    )
