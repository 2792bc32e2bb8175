"""A training checkpoint that is written while training goes on: Megatron's asynchronous save, whole or not at all.

    background = BackgroundSave(timeout_s)
    background.start(directory, state, note)       # `mcore.training_state`; returns once the tensors are safe
    background.poll()                              # later, between steps: `directory` once it is there, else None
    background.poll(wait=True)                     # before the next one, and at the end

`start` copies tensors from the device to the host and forks a writer on every rank. On a CPU there is nothing to copy:
the fork has the memory as it was (copy on write), so the next step may change every tensor. Until the directory has its
name, the checkpoint before it is the newest: a kill amid the write loses this one alone.

The directory that is written has a name of its own for each attempt. The writer of a run that was killed may live a
little longer, and must not write into the files of the run that goes on.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from treepo_mega.checkpoint.mcore import CheckpointError, of_all_ranks, seal
from treepo_mega.checkpoint.refused import writes_told
from treepo_mega.runtime import dist
from treepo_mega.runtime.files import publish
from treepo_mega.runtime.megatron_versions import complete_checkpoint, own_async_writer
from treepo_mega.runtime.pulse import pulse

LOOK_S = 0.05
"""Seconds between two looks at a writer that is waited for."""


def _stay(rank: int, *_: object, **_named: object) -> None:
    """A writer that writes nothing, for as long as the process `rank` lives."""
    while os.getppid() == rank:
        time.sleep(LOOK_S)


@dataclass(frozen=True, slots=True)
class _Writing:
    """The checkpoint under way."""

    directory: Path
    partial: Path
    note: dict[str, Any]


class BackgroundSave:
    """See the module docstring. One checkpoint at a time; all methods are collective over all ranks."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s`: how long ranks wait for one another, and for a writer that is waited for."""
        self._timeout_s = timeout_s
        self._queue = AsyncCallsQueue()
        self._writing: _Writing | None = None

    def start(self, directory: Path, state: dict[str, Any], note: dict[str, Any]) -> None:
        """Begin to write. Raises CheckpointError when the file system refuses already, or one is under way."""
        if self._writing is not None:
            raise CheckpointError(
                f"{directory}: {self._writing.directory} is still being written: poll(wait=True) first"
            )
        token = dist.gather_objects(secrets.token_hex(4))[0]
        partial = directory.absolute().parent / f".{directory.name}.{token}.partial"
        with writes_told(partial):
            if dist.is_main():
                partial.mkdir(parents=True)
            dist.barrier(f"preparing {directory}", self._timeout_s)
            request = dist_checkpointing.save(
                state,
                str(partial),
                preprocess_common_before_consistancy_check=of_all_ranks,
                async_sharded_save=True,
                **own_async_writer(),
            )
            if pulse().fires("stuck_in_writer"):
                request = request._replace(async_fn=functools.partial(_stay, os.getpid()))
            self._queue.schedule_async_request(request)
        self._writing = _Writing(directory, partial, note)

    def poll(self, *, wait: bool = False) -> Path | None:
        """The directory, once, when it has just got its name; None while it is written, or nothing is.

        `wait`: until it has. Raises CheckpointError on every rank when it could not be written.
        """
        writing = self._writing
        if writing is None:
            return None
        ends_at = time.monotonic() + self._timeout_s
        while wait and self._is_alive() and time.monotonic() < ends_at:
            time.sleep(LOOK_S)
        # Agreed on the CPU: a writer ends at another time on each rank, and what follows is collective.
        if dist.max_over_ranks({"alive": float(self._is_alive())})["alive"]:
            if wait:
                raise CheckpointError(
                    f"{writing.partial}: a writer has not ended after {self._timeout_s:.0f} s (distributed.timeout_s): "
                    "is the file system slow or stuck? Earlier checkpoints are whole"
                )
            return None
        self._writing = None
        try:
            with writes_told(writing.partial):
                self._queue.maybe_finalize_async_calls(blocking=True, no_dist=True)
                if dist.is_main():
                    complete_checkpoint(writing.partial)
            seal(writing.partial, writing.note, self._timeout_s)
            if dist.is_main():
                publish(writing.partial, writing.directory)
            dist.barrier(f"publishing {writing.directory}", self._timeout_s)
        except BaseException:
            shutil.rmtree(writing.partial, ignore_errors=True)
            raise
        return writing.directory

    def _is_alive(self) -> bool:
        """Whether this rank's writer still runs."""
        return any(
            call.async_caller.process is not None and call.async_caller.process.is_alive()
            for call in self._queue.async_calls
        )
