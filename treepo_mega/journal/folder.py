"""Where the records of a run lie: a folder a step, and in it a file for each rank that ever wrote there.

    <run_dir>/rollouts/step_000012/rank_00003_0.trees       # the first attempt; _1 is that of the next one

Steps count from 0 here, as they do in seeds: the folder of a step is that of the checkpoint which it begins from.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

FOLDER = "rollouts"
_STEP = re.compile(r"step_(\d{6,})")


def step_folder(root: Path, step: int) -> Path:
    """The folder of a step.

    >>> step_folder(Path("run"), 12).as_posix()
    'run/rollouts/step_000012'
    """
    return root / FOLDER / f"step_{step:06d}"


def steps_kept(root: Path) -> list[int]:
    """Steps that have a folder, ascending."""
    found = (_STEP.fullmatch(path.name) for path in (root / FOLDER).glob("step_*") if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def files_of(root: Path, step: int) -> list[Path]:
    """The files of a step, in the order of their names."""
    return sorted(step_folder(root, step).glob("rank_*.trees"))


def new_file(root: Path, step: int, rank: int) -> Path:
    """The path of the file that this attempt of a rank writes; its folder is made. Raises OSError."""
    folder = step_folder(root, step)
    folder.mkdir(parents=True, exist_ok=True)
    # Never one that is there: it may end in a torn record.
    taken = [int(path.stem.rpartition("_")[2]) for path in folder.glob(f"rank_{rank:05d}_*.trees")]
    return folder / f"rank_{rank:05d}_{max(taken, default=-1) + 1}.trees"


def forget(root: Path, steps: list[int]) -> None:
    """Remove the folders of these steps."""
    for step in steps:
        shutil.rmtree(step_folder(root, step), ignore_errors=True)
