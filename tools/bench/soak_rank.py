"""A rank of tools/bench/soak.py: `treepo-mega`, which may say what Python allocated between two steps.

The environment variable TREEPO_SOAK_WHERE holds "FIRST LAST DIRECTORY": tracemalloc begins at step FIRST, and at step
LAST the places that have allocated most since are written to DIRECTORY/tracemalloc_RANK.txt. TREEPO_SOAK_TRIM holds
"EVERY DIRECTORY": every so many steps glibc gives back what is free in its heaps (malloc_trim), and resident memory
before and after is added to DIRECTORY/trim_RANK.txt.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PLACES = 60
FRAMES = 6


def watch(first: int, last: int, directory: Path) -> None:
    """Have the trainer compare two snapshots."""
    from treepo_mega.trainer import Trainer

    begin_step = Trainer.begin_step
    before: list[tracemalloc.Snapshot] = []

    def told(self: Trainer, step: int) -> None:
        if step == first:
            tracemalloc.start(FRAMES)
            before.append(tracemalloc.take_snapshot())
        if step == last:
            gc.collect()
            found = tracemalloc.take_snapshot().compare_to(before[0], "traceback")
            text = "\n".join(f"{each}\n" + "\n".join(each.traceback.format()) for each in found[:PLACES])
            (directory / f"tracemalloc_{os.environ.get('RANK', '0')}.txt").write_text(text + "\n", encoding="utf-8")
        begin_step(self, step)

    Trainer.begin_step = told  # type: ignore[method-assign]


def trim(every: int, directory: Path) -> None:
    """Have glibc give back what is free, and say how much it was."""
    import psutil

    from treepo_mega.trainer import Trainer

    begin_step = Trainer.begin_step
    rank = psutil.Process()

    def told(self: Trainer, step: int) -> None:
        if step and step % every == 0:
            before = rank.memory_info().rss
            ctypes.CDLL(None).malloc_trim(0)
            with (directory / f"trim_{os.environ.get('RANK', '0')}.txt").open("a", encoding="utf-8") as file:
                file.write(f"{step} {before} {rank.memory_info().rss}\n")
        begin_step(self, step)

    Trainer.begin_step = told  # type: ignore[method-assign]


def main() -> int:
    """The command line after the script's name is that of `treepo-mega`."""
    if where := os.environ.get("TREEPO_SOAK_WHERE"):
        first, last, directory = where.split(" ", 2)
        watch(int(first), int(last), Path(directory))
    if how := os.environ.get("TREEPO_SOAK_TRIM"):
        every, directory = how.split(" ", 1)
        trim(int(every), Path(directory))
    from treepo_mega.cli import main as treepo_mega

    return treepo_mega(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
