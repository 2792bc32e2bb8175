"""A write that the file system refuses, told as what it is: a full, read-only or lost disk, and what is free there.

with writes_told(partial):
    dist_checkpointing.save(state, str(partial))
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from treepo_mega.checkpoint.error import CheckpointError
from treepo_mega.checkpoint.space import in_units
from treepo_mega.config.surroundings import nearest_existing
from treepo_mega.runtime import dist

PROBE_BYTES = 1 << 16
"""Of the file by which a refused write is told from a fault of another kind."""


@contextlib.contextmanager
def writes_told(directory: Path) -> Iterator[None]:
    """Raise CheckpointError, with what is free, for a write into `directory` that the file system refuses."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        # Torch's writer tells a full disk as "unexpected pos 64 vs 0", and Megatron's as a text: so the disk is asked.
        refusal = str(error if isinstance(error, OSError) else _refusal(directory) or _told(error))
        if isinstance(error, RuntimeError) and "[Errno" not in refusal:
            raise
        free = in_units(shutil.disk_usage(nearest_existing(directory)).free)
        raise CheckpointError(
            f"{directory.parent}: a checkpoint could not be written: {refusal} ({free} are free there). "
            "Earlier checkpoints are whole, and the run resumes from the newest: make room, or set checkpoint.save to "
            "another disk or a lower checkpoint.keep_last"
        ) from error


def _told(error: BaseException) -> str:
    """What `error` says. Torch's own, which is no Exception, is raised on all ranks and has the reasons on one."""
    failures = [each for each, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    reasons = "; ".join(sorted(set(map(str, failures))))
    found = re.search(r"\[Errno \d+\][^;\n]*", reasons)
    return found[0] if found else reasons or "another rank says why"


def _refusal(directory: Path) -> OSError | None:
    """Why `directory` takes no small file; None when it does."""
    probe = directory / f".probe_{dist.rank()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return None
