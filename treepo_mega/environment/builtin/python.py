"""`data.environment: python`: run a program in a process of its own, with a time limit.

Without network, as the worker is, and writing only in a directory of its own (environment/sandbox.py).
Nothing is kept from one call to the next but files.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from treepo_mega.environment.sandbox import confine_writes

TIMEOUT_S = 5.0
MEMORY_BYTES = 1 << 30
MAX_OUTPUT_BYTES = 1 << 16
MAX_FILE_BYTES = 1 << 26


class Python:
    """One tool; the state is a directory."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="python-"))

    def reset(self, **row: Any) -> None:
        """Begin with any row of the data."""

    def run(self, code: str) -> str:
        """Run a Python program and return what it prints.

        Args:
            code: The whole program. It has 5 seconds, 1 GiB and no network; only what it prints comes back.
        """
        # Neither PYTHONPATH nor credentials of the trainer's environment.
        surroundings = {"PATH": os.environ.get("PATH", ""), "HOME": str(self._folder), "TMPDIR": str(self._folder)}
        with tempfile.TemporaryFile(dir=self._folder) as output:
            program = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=surroundings,
                start_new_session=True,
                preexec_fn=partial(_limit, self._folder),
            )
            try:
                status: int | None = program.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                # Also what it left running in its session.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(program.pid, signal.SIGKILL)
                program.wait()
            size = output.seek(0, os.SEEK_END)
            output.seek(0)
            printed = output.read(MAX_OUTPUT_BYTES).decode("utf-8", "replace")
        if size > MAX_OUTPUT_BYTES:
            printed += f"\n[{size - MAX_OUTPUT_BYTES} bytes left out]"
        if status is None:
            return f"{printed}\n[stopped after {TIMEOUT_S:g} s]".lstrip()
        return printed if status == 0 else f"{printed}\n[exit status {status}]".lstrip()

    def fork(self) -> Python:
        """A second directory with the same files."""
        other = Python()
        shutil.copytree(self._folder, other._folder, symlinks=True, dirs_exist_ok=True)
        return other

    def close(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _limit(folder: Path) -> None:
    """In the program's process, before it begins."""
    # A fence within the worker's: the program cannot send signals to the worker either.
    confine_writes([folder])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (int(TIMEOUT_S) + 1, int(TIMEOUT_S) + 1))
