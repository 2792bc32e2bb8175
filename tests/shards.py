"""Parts of the test files for several machines: `--shard 2/3` keeps the second third.

A file is never divided, for its tests share engines and ranks. The part of a file follows from its name alone, so every
machine finds the same division without being told the others' work.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import PurePath

import pytest


def parse_shard(text: str) -> tuple[int, int]:
    """(part, parts), the first part being 1. Raises ArgumentTypeError for anything else.

    >>> parse_shard("2/3")
    (2, 3)
    """
    part, slash, parts = text.partition("/")
    if not slash or not part.isdigit() or not parts.isdigit() or not 1 <= int(part) <= int(parts):
        raise argparse.ArgumentTypeError(f"expected I/N with 1 <= I <= N, such as 1/3, got {text!r}")
    return int(part), int(parts)


def part_of(file: PurePath, parts: int) -> int:
    """The part, from 1 to `parts`, that the test file at this path below the repository is in."""
    return zlib.crc32(file.as_posix().encode()) % parts + 1


def keep_shard(config: pytest.Config, items: list[pytest.Item], shard: tuple[int, int]) -> None:
    """Remove the tests of all other parts from `items`, and report them as deselected."""
    part, parts = shard
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        mine = part_of(item.path.relative_to(config.rootpath), parts) == part
        (kept if mine else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = kept
