"""The checkpoints of a run beside each other: which is the newest whole one, which go, and which are another run's.

find_latest(save)                    # the newest complete and undamaged one; others are passed over, with a word
prune(save, keep_last=2, keep_every=100)
"""

from __future__ import annotations

import shutil
from pathlib import Path

from treepo_mega.checkpoint.mcore import CheckpointError, check_complete, check_digests
from treepo_mega.runtime import dist


def find_latest(save: str | Path) -> Path | None:
    """The newest complete and undamaged checkpoint under `save`, or None; others are passed over, with a word.

    Collective over all ranks.
    """
    for directory in reversed(step_directories(save)):
        try:
            check_digests(directory, check_complete(directory))
        except CheckpointError as e:
            if dist.is_main():
                print(f"passing over {directory}: {e}", flush=True)
            continue
        return directory
    return None


def step_directories(save: str | Path) -> list[Path]:
    """The checkpoints directly under `save`, oldest first, whole or not."""
    # Six digits with leading zeros: the order of the names is that of the steps.
    return sorted(Path(save).glob("step_" + "[0-9]" * 6))


def set_aside_others(save: str | Path, resumed_from: Path | None) -> Path | None:
    """Move checkpoints that are not this run's past to `save`/set_aside_N; returns that directory, None if none were.

    This run's past is `resumed_from` and what is older beside it. Rank 0 only.
    """
    # A run that begins anew in a used directory would have its checkpoints pruned, because those of the run before
    # have higher numbers, or would be resumed as that run.
    found = step_directories(save)
    past = []
    if resumed_from is not None and resumed_from.resolve().parent == Path(save).resolve():
        past = [each for each in found if each.name <= resumed_from.name]
    others = [each for each in found if each not in past]
    if not others:
        return None
    number = 1
    while (target := Path(save) / f"set_aside_{number}").exists():
        number += 1
    target.mkdir()
    for each in others:
        each.rename(target / each.name)
    return target


def step_of(directory: Path) -> int:
    """The step of a checkpoint's directory.

    >>> step_of(Path("runs/step_000012"))
    12
    """
    return int(directory.name.removeprefix("step_"))


def prune(save: str | Path, keep_last: int, keep_every: int | None = None) -> None:
    """Delete all but the newest `keep_last` checkpoints, those at multiples of `keep_every`, and any partial one.

    Rank 0 only.
    """
    if not dist.is_main():
        return
    for old in step_directories(save)[:-keep_last]:
        if keep_every is None or step_of(old) % keep_every:
            shutil.rmtree(old)
    for partial in Path(save).glob(".step_*.partial"):
        # A writer that a kill has orphaned may still add to it: the next time removes the rest.
        shutil.rmtree(partial, ignore_errors=True)
