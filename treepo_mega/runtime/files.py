"""Files and directories that appear whole or not at all: written aside, fsynced, then renamed.

    with atomic_file(run / "summary.json") as file:
        json.dump(summary, file)
    sync_path(directory)                 # its entries survive a power cut

A reader, or a process that starts after a kill, sees the old content or the new one, never half of either.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def atomic_file(path: str | Path) -> Iterator[TextIO]:
    """A UTF-8 text file to write to; it replaces `path` at the end. After an exception `path` is as it was.

    Its directory is made if it is missing. One process at a time may write to the same path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            # Without it, a power cut after the rename can leave an empty file under the final name.
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_path(target.parent)


def publish_directory(partial: Path, target: Path) -> None:
    """Make a finished directory appear under its name: fsync everything in it, then rename.

    `target` must be absent or an empty directory.
    """
    for path in [*partial.rglob("*"), partial]:
        sync_path(path)
    partial.replace(target)
    sync_path(target.parent)


def sync_path(path: Path) -> None:
    """fsync a file, or the entries of a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
