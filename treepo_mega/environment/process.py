"""One worker process of a pool: starting and ending it, its pipes, and the one request that it works on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from treepo_mega.data.rewards.grader import worker_environment
from treepo_mega.environment.state import EnvironmentLimits

READ_BYTES = 1 << 16
MAX_LOG_BYTES = 1 << 20
MAX_REPLY_BYTES = 1 << 24
"""A reply holds one observation, which the worker cuts, or nothing."""

END_DEADLINE_S = 15.0
"""More than what the keeper takes (keeper.py)."""


class WorkerFailed(Exception):
    """The process is of no more use; the text says why."""


class WorkerCannotStart(Exception):
    """The class cannot be loaded, or the machine lacks what was asked for; a second try would not help."""


class WorkerProcess:
    """A keeper with its worker. One request at a time; `deadline` is on the clock of time.monotonic()."""

    def __init__(self, path: str, limits: EnvironmentLimits) -> None:
        """Start it. `path`: of the class, absolute, as the worker has a working directory of its own."""
        self._limits = limits
        self._log = tempfile.TemporaryFile("w+b", buffering=0)  # noqa: SIM115 - closed by end()
        command = [sys.executable, "-P", "-m", "treepo_mega.environment.worker", f"--environment={path}"]
        command += [f"--memory-mb={limits.memory_mb}", f"--max-chars={limits.max_observation_chars}"]
        command += [f"--parent={os.getpid()}"]
        command += ["--network"] if limits.network else []
        command += ["--writes-anywhere"] if limits.writes_anywhere else []
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=worker_environment(),
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.requests = self._process.stdin
        self.replies = self._process.stdout
        for pipe in (self.requests, self.replies):
            os.set_blocking(pipe.fileno(), False)
        self._unsent = memoryview(b"")
        self._unread = bytearray()
        self.ready = False
        self.busy = True
        self.started = time.monotonic()
        self.deadline = self.started + limits.startup_timeout_s
        self._phase = f"starting (importing the class) took more than {limits.startup_timeout_s:g} s"

    @property
    def writing(self) -> bool:
        """Whether part of the request waits for room in the pipe."""
        return bool(self._unsent)

    @property
    def overdue(self) -> str:
        """What to say once its deadline has passed."""
        return self._phase

    def give(self, request: dict[str, Any], what: str, calls: int = 1) -> None:
        """Begin with a request of that many calls; `what` names it in messages."""
        seconds = self._limits.timeout_s * max(1, calls)
        self._unsent = memoryview(json.dumps(request).encode() + b"\n")
        self._phase = f"{what} took more than {seconds:g} s"
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.busy = True
        self.write()

    def write(self) -> None:
        """Send what the pipe takes."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # a broken pipe shows as end of file on read
            self._unsent = self._unsent[os.write(self.requests.fileno(), self._unsent) :]

    def read(self) -> dict[str, Any] | None:
        """The answer, once all of it has come. `{"ready": true}` comes before the first.

        Raises WorkerFailed on nonsense and on death, WorkerCannotStart for a class that cannot be loaded.
        """
        while True:
            try:
                data = os.read(self.replies.fileno(), READ_BYTES)
            except BlockingIOError:
                return None
            if not data:
                raise WorkerFailed(self._cause_of_death())
            self._unread += data
            if data.endswith(b"\n"):
                break
            if len(self._unread) > MAX_REPLY_BYTES:
                raise WorkerFailed("the worker sent an answer that does not end")
        line = bytes(self._unread)
        self._unread.clear()
        try:
            answer: dict[str, Any] = json.loads(line)
            if "load_error" in answer:
                raise WorkerCannotStart(answer["load_error"])
        except (ValueError, TypeError):
            raise WorkerFailed(f"the worker sent something that is no answer: {line[:80]!r}") from None
        self.busy = False
        if answer.get("ready"):
            self.ready = True
        if os.fstat(self._log.fileno()).st_size > MAX_LOG_BYTES:
            os.ftruncate(self._log.fileno(), 0)
        return answer

    def end(self) -> None:
        """End it and all that it started; idempotent. Raises RuntimeError if something survives."""
        with contextlib.suppress(ProcessLookupError):
            # A stopped keeper could not clean up: a tool may have stopped its whole session.
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(signal.SIGTERM)
        for stream in (self.requests, self.replies):
            with contextlib.suppress(OSError):
                stream.close()
        try:
            code = self._process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise RuntimeError(
                f"environment worker {self._process.pid}: something that a tool started survived SIGKILL for "
                f"{END_DEADLINE_S:g} s"
            ) from None
        finally:
            said = self._last_words()
            self._log.close()
        # The keeper itself failed: it says so by a traceback.
        if code == 1 and "survived SIGKILL" in said:
            raise RuntimeError(said)

    def _cause_of_death(self) -> str:
        try:
            code = self._process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            return "the worker closed its pipe"
        # The keeper reports a signal as a shell does.
        what = f"signal {signal.Signals(code - 128).name}" if code > 128 else f"exit status {code}"
        said = self._last_words()
        return f"the worker died ({what})" + (f"; it last wrote: {said!r}" if said else "")

    def _last_words(self) -> str:
        if self._log.closed:
            return ""
        size = os.fstat(self._log.fileno()).st_size
        # Not seek and read: processes that a tool started share this file offset, and may still write.
        return os.pread(self._log.fileno(), 400, max(0, size - 400)).decode("utf-8", "replace").strip()
