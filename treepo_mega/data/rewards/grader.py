"""One grader process of a pool: starting and killing it, its pipes, and the batch it works on. `pool.py` drives it.

Why subprocesses with a pipe of JSON lines, not `multiprocessing`: a rank has torch, vLLM and gloo threads in
it, which no fork survives, and pickle would import their modules in the worker. A worker imports only the
standard library (0.1 s) and what its verifier needs. `worker.py` is the other side, and describes the protocol.

What verifiers print goes to a temporary file; its last lines are quoted when the process dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treepo_mega.config import RewardConfig

READ_BYTES = 1 << 16
MAX_REPLY_BYTES = 1 << 20
MAX_LOG_BYTES = 1 << 20
KILL_DEADLINE_S = 10.0


class GraderFailed(Exception):
    """The process is of no more use; the text says why."""


def worker_environment(hidden: Sequence[str] = ()) -> dict[str, str]:
    """Environment of a helper process: this package importable, hash seed fixed, one thread a library.

    `hidden`: variables that it must not see.
    """
    root = str(Path(__file__).resolve().parents[3])
    path = os.environ.get("PYTHONPATH")
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**kept, **single, "PYTHONHASHSEED": "0", "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root}


class Grader:
    """One process, its pipes, and the batch it works on. `hidden`: environment variables that it must not see."""

    module = "worker"

    def __init__(self, cfg: RewardConfig, hidden: Sequence[str] = ()) -> None:
        self.cfg = cfg
        self.log = tempfile.TemporaryFile("w+b", buffering=0)  # noqa: SIM115 - closed by kill()
        # -P: modules in the working directory must not stand in for the standard library's.
        module = f"treepo_mega.data.rewards.{self.module}"
        command = [sys.executable, "-P", "-m", module, f"--memory-mb={cfg.memory_mb}"]
        command += [f"--timeout-s={cfg.timeout_s}", f"--startup-timeout-s={cfg.startup_timeout_s}"]
        self.process = subprocess.Popen(
            [*command, f"--parent={os.getpid()}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=worker_environment(hidden),
            start_new_session=True,  # its own process group, so that what it starts is killed with it
            bufsize=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        for pipe in (self.requests, self.replies):
            os.set_blocking(pipe.fileno(), False)
        self.unsent = memoryview(b"")
        self.unread = b""
        self.batch: deque[tuple[int, str]] = deque()
        """(ticket, verifier) of what it has not answered yet; the first is the one it works on."""
        self.imported: set[str] = set()
        self.deadline = 0.0
        self.phase = ""

    def give(self, batch: Sequence[tuple[int, str]], message: bytes) -> None:
        """Start work on a batch, whose request ids are its tickets."""
        self.batch.extend(batch)
        self.unsent = memoryview(message)
        self._start_item()
        self.write()

    @property
    def busy(self) -> bool:
        """Whether it owes answers."""
        return bool(self.batch)

    @property
    def gathers(self) -> bool:
        """Whether its next replies come soon enough to be read together."""
        return len(self.batch) > 1 and not self.unsent

    def suspects(self, guilty: int | None) -> tuple[list[int], list[int]]:
        """(tickets that may have ended it, the others of its batch). `guilty`: the one that its last reply named."""
        tickets = [ticket for ticket, _ in self.batch]
        return ([guilty], tickets) if guilty is not None else (tickets[:1], tickets[1:])

    def _start_item(self) -> None:
        """Start the clock of the first item: of the import until the worker says `loaded`, then of the grading."""
        if self.batch and self.batch[0][1] not in self.imported:
            self._start_clock("starting up (importing its verifier)", self.cfg.startup_timeout_s)
        else:
            self._start_clock("grading", self.cfg.timeout_s)

    def _start_clock(self, phase: str, seconds: float) -> None:
        self.phase = f"{phase} took more than {seconds:g} s"
        self.deadline = time.monotonic() + seconds

    def write(self) -> None:
        """Send what the pipe takes."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # a broken pipe shows as end of file on read
            self.unsent = self.unsent[os.write(self.requests.fileno(), self.unsent) :]
            # The worker begins when all has come, and who drives the pool may be long in coming back to send the rest.
            self._start_item()

    def read(self) -> list[tuple[int, dict[str, Any]]]:
        """(ticket, final reply) of all that has come. Raises GraderFailed on nonsense, or on death when none came."""
        *lines, self.unread = (self.unread + self._received()).split(b"\n")
        finished: list[tuple[int, dict[str, Any]]] = []
        for line in lines:
            reply = self._parse(line)
            if reply is None:
                if finished:  # these are good; the next read meets the nonsense again
                    self.unread = line + b"\n" + self.unread
                    break
                raise GraderFailed(f"the grader sent something that is no reply: {line[:80]!r}")
            if reply.get("ready") is not None:
                continue
            if reply.get("loaded"):
                self.imported.add(self.batch[0][1])
                self._start_item()
                continue
            ticket, _ = self.batch.popleft()
            finished.append((ticket, reply))
            self._start_item()
            if reply.get("retire") or "load_error" in reply:
                break
        if not finished and len(self.unread) > MAX_REPLY_BYTES:
            raise GraderFailed("the grader sent a reply that does not end")
        return finished

    def _received(self) -> bytes:
        """What stands in the pipe, at most about MAX_REPLY_BYTES. Raises GraderFailed when it has ended."""
        # All of it: a deadline that passed while nobody looked must not outrun an answer that is there.
        received = bytearray()
        while len(received) <= MAX_REPLY_BYTES:
            try:
                data = os.read(self.replies.fileno(), READ_BYTES)
            except BlockingIOError:
                break
            if not data and not received:
                raise GraderFailed(self._cause_of_death())
            received += data
            if len(data) < READ_BYTES:
                break
        return bytes(received)

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        """The reply in a line; None for anything that is not about the item at work."""
        try:
            reply: dict[str, Any] = json.loads(line)
            if reply.get("ready") is not None or (self.batch and reply["id"] == self.batch[0][0]):
                return reply
        except (ValueError, AttributeError, KeyError, RecursionError):
            # A verifier printed into the protocol; the caller ends the worker for a line that is no reply.
            return None
        return None

    def tidy_log(self) -> None:
        """Keep what verifiers print from filling the disk."""
        if os.fstat(self.log.fileno()).st_size > MAX_LOG_BYTES:
            os.ftruncate(self.log.fileno(), 0)
            self.log.seek(0)  # the worker shares this file offset

    def _cause_of_death(self) -> str:
        try:
            code = self.process.wait(KILL_DEADLINE_S)
        except subprocess.TimeoutExpired:
            return "the grader closed its pipe"
        # The kernel's alarm on its CPU time: nobody has looked since its deadline passed.
        if code == -signal.SIGPROF:
            return self.phase
        what = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        size = os.fstat(self.log.fileno()).st_size
        # Not seek and read: processes that the verifier started share this file offset, and may still write.
        tail = os.pread(self.log.fileno(), 400, max(0, size - 400)).decode("utf-8", "replace").strip()
        return f"the grader process died ({what})" + (f"; it last wrote: {tail!r}" if tail else "")

    def kill(self) -> None:
        """End the process and all it started; idempotent. Raises RuntimeError if the kernel does not end it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for stream in (self.requests, self.replies, self.log):
            with contextlib.suppress(OSError):
                stream.close()
        try:
            self.process.wait(KILL_DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"grader process {self.process.pid} survived SIGKILL for {KILL_DEADLINE_S} s") from None
