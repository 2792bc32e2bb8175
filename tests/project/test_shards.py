"""Shards divide the tests: every file is in exactly one, the same on every machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.shards import keep_shard, parse_shard, part_of

ROOT = Path(__file__).resolve().parents[2]
FILES = [path.relative_to(ROOT) for path in sorted((ROOT / "tests").rglob("test_*.py"))]


def test_every_part_has_files_and_names_alone_decide():
    parts = [part_of(file, 3) for file in FILES]
    assert set(parts) == {1, 2, 3} and parts == [part_of(file, 3) for file in FILES]
    assert part_of(Path("tests/project/test_shards.py"), 1) == 1


@pytest.mark.parametrize("text", ["", "3", "0/3", "4/3", "a/b", "1/"])
def test_a_part_that_is_none_is_explained(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="expected I/N with 1 <= I <= N"):
        parse_shard(text)


def test_parts_are_disjoint_and_together_the_whole():
    items = [SimpleNamespace(path=ROOT / file) for file in FILES]
    reported: list[object] = []
    config: Any = SimpleNamespace(
        rootpath=ROOT, hook=SimpleNamespace(pytest_deselected=lambda items: reported.extend(items))
    )
    seen: list[object] = []
    for part in (1, 2, 3):
        kept: list[Any] = list(items)
        keep_shard(config, kept, (part, 3))
        seen += [item.path for item in kept]
    assert sorted(map(str, seen)) == sorted(str(item.path) for item in items)
    assert len(reported) == 2 * len(items), "each file is left out by the two other parts"
