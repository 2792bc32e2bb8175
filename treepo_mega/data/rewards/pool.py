"""Grade answers in killable worker processes.

    with RewardPool(cfg.reward) as pool:
        results = pool.score([RewardItem("math", "gsm8k", text, "42")])     # in the order of the items

Every item gets a result; nothing is scored 0 in silence. `score is None` means *lost*, `error` says why: the
verifier raised or returned NaN, hung past its deadline, ran out of memory, or its process died (these three
twice: the item is tried once more in a fresh process). A verifier that cannot be loaded at all is a mistake in the
set-up, not a lost sample: `score` raises VerifierError.

Why subprocesses with a pipe of JSON lines, not `multiprocessing`: a rank has torch, vLLM and gloo threads in
it, which no fork survives, and pickle would import their modules in the worker. A worker imports only the
standard library (0.1 s) and what its verifier needs. The pool is driven by the thread that calls `score`,
one item per worker at a time, non-blocking on both pipes, so that a stuck worker can stall nothing.

Traps. (1) Deadlines are wall time: on a crowded machine choose them generously, for a lost sample depends on
load. (2) Answers are cut to their last `max_chars` characters before they are sent. (3) Worker processes
have a fixed hash seed, because some reasoning-gym tasks depend on it, and one thread a library.
(4) What verifiers print goes to a temporary file; its last lines are quoted when the process dies.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treepo_mega.data.rewards.verifiers import VerifierError, check_verifier

if TYPE_CHECKING:
    from treepo_mega.config import RewardConfig

ATTEMPTS = 2
"""Times an item is tried when its worker hangs or dies."""

MAX_REPLY_BYTES = 1 << 20
MAX_LOG_BYTES = 1 << 20
KILL_DEADLINE_S = 10.0


@dataclass(slots=True)
class RewardItem:
    """One answer to grade; fields as in verl's compute_score. `extra_info` must be JSON-safe."""

    verifier: str
    data_source: str
    solution_str: str
    ground_truth: str
    extra_info: dict[str, Any] | None = None


@dataclass(slots=True)
class RewardResult:
    """A finite `score`, or None (lost) with the reason in `error`. `extra`: further scalars of the verifier."""

    score: float | None
    error: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class _WorkerFailed(Exception):
    """The worker is of no more use; the text says why."""


def worker_environment() -> dict[str, str]:
    """Environment of a helper process: this package importable, hash seed fixed, one thread a library."""
    root = str(Path(__file__).resolve().parents[3])
    path = os.environ.get("PYTHONPATH")
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **single, "PYTHONHASHSEED": "0", "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root}


class _Worker:
    """One process, its pipes, and the item it works on."""

    def __init__(self, cfg: RewardConfig) -> None:
        self.cfg = cfg
        self.log = tempfile.TemporaryFile("w+b", buffering=0)  # noqa: SIM115 - closed by kill()
        # -P: modules in the working directory must not stand in for the standard library's.
        command = [sys.executable, "-P", "-m", "treepo_mega.data.rewards.worker", f"--memory-mb={cfg.memory_mb}"]
        command += [f"--timeout-s={cfg.timeout_s}", f"--startup-timeout-s={cfg.startup_timeout_s}"]
        self.process = subprocess.Popen(
            [*command, f"--parent={os.getpid()}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=worker_environment(),
            start_new_session=True,  # its own process group, so that what it starts is killed with it
            bufsize=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        for pipe in (self.requests, self.replies):
            os.set_blocking(pipe.fileno(), False)
        self.unsent, self.unread = b"", b""
        self.item: int | None = None
        self.request_id = -1
        self.deadline = 0.0
        self.phase = ""

    def give(self, item: int, request_id: int, payload: bytes) -> None:
        """Start work on an item. The clock of its start-up runs until the worker says `loaded`."""
        self.item, self.request_id, self.unsent = item, request_id, payload
        self._start_clock("starting up (importing its verifier)", self.cfg.startup_timeout_s)

    def _start_clock(self, phase: str, seconds: float) -> None:
        self.phase, self.deadline = f"{phase} took more than {seconds:g} s", time.monotonic() + seconds

    def write(self) -> None:
        """Send what the pipe takes."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # a broken pipe shows as end of file on read
            self.unsent = self.unsent[os.write(self.requests.fileno(), self.unsent) :]

    def read(self) -> dict[str, Any] | None:
        """The final reply to the current item, once there is one. Raises _WorkerFailed on death or nonsense."""
        try:
            data = os.read(self.replies.fileno(), 1 << 16)
        except BlockingIOError:
            return None
        if not data:
            raise _WorkerFailed(self._cause_of_death())
        self.unread += data
        if len(self.unread) > MAX_REPLY_BYTES:
            raise _WorkerFailed("the grader sent a reply that does not end")
        while b"\n" in self.unread:
            line, _, self.unread = self.unread.partition(b"\n")
            try:
                reply = json.loads(line)
                fresh = reply.get("ready") is None and reply["id"] == self.request_id
            except (ValueError, AttributeError, KeyError, RecursionError):
                raise _WorkerFailed(f"the grader sent something that is no reply: {line[:80]!r}") from None
            if fresh and reply.get("loaded"):
                self._start_clock("grading", self.cfg.timeout_s)
            elif fresh:
                return reply
        return None

    def finish(self) -> None:
        """Ready for another item."""
        self.item = None
        if os.fstat(self.log.fileno()).st_size > MAX_LOG_BYTES:
            os.ftruncate(self.log.fileno(), 0)
            self.log.seek(0)  # the worker shares this file offset

    def _cause_of_death(self) -> str:
        try:
            code = self.process.wait(KILL_DEADLINE_S)
        except subprocess.TimeoutExpired:
            return "the grader closed its pipe"
        what = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        size = os.fstat(self.log.fileno()).st_size
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


class RewardPool:
    """`cfg.num_workers` grader processes of this rank, started when first needed. Not for use by several threads."""

    def __init__(self, cfg: RewardConfig) -> None:
        self.cfg = cfg
        self.restarts = 0
        """Workers killed or lost so far."""
        self._workers: list[_Worker] = []
        self._ids = itertools.count()
        self._closed = False

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all workers and whatever they started; idempotent. No process is left afterwards."""
        self._closed = True
        self._kill_all()

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """Grade `items`; results are in their order. Takes at most about
        `ATTEMPTS * (timeout_s + startup_timeout_s) * ceil(len(items) / num_workers)` seconds.

        Raises VerifierError for a verifier that is unknown or cannot be loaded, ValueError for an item that
        is not JSON, RuntimeError after `close`.
        """
        if self._closed:
            raise RuntimeError("RewardPool.score after close")
        for name in {item.verifier for item in items}:
            check_verifier(name)
        payloads = [self._encode(i, item) for i, item in enumerate(items)]
        try:
            return _Batch(self, payloads, [item.verifier for item in items]).run()
        except BaseException:
            self._kill_all()  # busy workers would answer the next call
            raise

    def _encode(self, index: int, item: RewardItem) -> tuple[int, bytes]:
        request_id = next(self._ids)
        try:
            text = json.dumps(
                {
                    "id": request_id,
                    "verifier": item.verifier,
                    "data_source": item.data_source,
                    "solution_str": item.solution_str[-self.cfg.max_chars :],
                    "ground_truth": item.ground_truth,
                    "extra_info": item.extra_info,
                }
            )
        except (TypeError, ValueError) as e:
            raise ValueError(f"reward item {index} ({item.data_source}): not JSON: {e}") from None
        return request_id, text.encode() + b"\n"

    def _kill_all(self) -> None:
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()

    def _idle_worker(self) -> _Worker | None:
        for worker in self._workers:
            if worker.item is None:
                return worker
        if len(self._workers) < self.cfg.num_workers:
            self._workers.append(_Worker(self.cfg))
            return self._workers[-1]
        return None

    def _discard(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self.restarts += 1
        worker.kill()


class _Batch:
    """One call of `score`."""

    def __init__(self, pool: RewardPool, payloads: list[tuple[int, bytes]], verifiers: list[str]) -> None:
        self.pool, self.payloads, self.verifiers = pool, payloads, verifiers
        self.results: list[RewardResult | None] = [None] * len(payloads)
        self.waiting = deque(range(len(payloads)))
        self.tries = [0] * len(payloads)
        self.busy: set[_Worker] = set()

    def run(self) -> list[RewardResult]:
        """Hand items to idle workers and take results until all are in; results in the items' order."""
        while self.waiting or self.busy:
            while self.waiting and (worker := self.pool._idle_worker()) is not None:
                item = self.waiting.popleft()
                self.tries[item] += 1
                worker.give(item, *self.payloads[item])
                self.busy.add(worker)
            self._wait()
        return [r for r in self.results if r is not None]

    def _wait(self) -> None:
        """Move bytes until something happened or the first deadline has passed."""
        with selectors.DefaultSelector() as selector:
            for worker in self.busy:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
                if worker.unsent:
                    selector.register(worker.requests, selectors.EVENT_WRITE, worker)
            first = min(worker.deadline for worker in self.busy)
            events = selector.select(max(0.0, first - time.monotonic()))
        for key, mask in events:
            if key.data not in self.busy:  # replaced a moment ago, by its other pipe's event
                continue
            if mask & selectors.EVENT_WRITE:
                key.data.write()
            else:
                self._read(key.data)
        now = time.monotonic()
        for worker in [w for w in self.busy if w.deadline <= now]:
            self._failed(worker, worker.phase)

    def _read(self, worker: _Worker) -> None:
        try:
            reply = worker.read()
        except _WorkerFailed as e:
            self._failed(worker, str(e))
            return
        if reply is None:
            return
        item = worker.item
        assert item is not None
        if "load_error" in reply:
            raise VerifierError(f"verifier {self.verifiers[item]!r} cannot be loaded: {reply['load_error']}")
        if reply.get("retire"):
            self._failed(worker, str(reply["error"]))
            return
        if "error" in reply:
            self.results[item] = RewardResult(None, str(reply["error"]))
        else:
            self.results[item] = RewardResult(float(reply["score"]), None, dict(reply["extra"]))
        self.busy.discard(worker)
        worker.finish()

    def _failed(self, worker: _Worker, reason: str) -> None:
        """Replace a worker that hung or died; its item goes back in the queue, or is lost."""
        item, starting = worker.item, worker.phase.startswith("starting")
        assert item is not None
        self.busy.discard(worker)
        self.pool._discard(worker)
        if self.tries[item] < ATTEMPTS:
            self.waiting.appendleft(item)
        elif starting:
            raise VerifierError(f"verifier {self.verifiers[item]!r} cannot be loaded ({ATTEMPTS} tries): {reason}")
        else:
            self.results[item] = RewardResult(None, f"{reason} ({ATTEMPTS} tries)")
