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
non-blocking on both pipes, so that a stuck worker can stall nothing.

Items go to a worker in batches, one message for many, which makes a grading five times cheaper for the trainer. The
worker answers each item before it begins the next, so the first item without an answer is the one that hung or crashed:
it alone is charged, the rest of its batch goes back into the queue.

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
from typing import TYPE_CHECKING, Any, TypedDict

from treepo_mega.data.rewards.verifiers import VerifierError, check_verifier

if TYPE_CHECKING:
    from treepo_mega.config import RewardConfig

ATTEMPTS = 2
"""Times an item is tried when its worker hangs or dies."""

MAX_BATCH_ITEMS = 64
MAX_BATCH_BYTES = 4 << 20
"""A batch ends with the item that reaches one of these."""

GATHER_S = 0.002
"""Pause between two looks at workers amid a batch: several replies are then read at once."""

MAX_REPLY_BYTES = 1 << 20
MAX_LOG_BYTES = 1 << 20
KILL_DEADLINE_S = 10.0


class Trajectory(TypedDict):
    """How a response came about; handed to verifiers that have a parameter `trajectory`."""

    prompt_id: str
    tokens: int
    """Of the response, its end mark included."""
    stop: str
    """eos, answer, length, depth or repetition."""
    segments: int
    """On the path."""
    fallback: bool
    """Whether the path was made by cutting back another one."""


@dataclass(slots=True)
class RewardItem:
    """One answer to grade; fields as in verl's compute_score. `extra_info` must be JSON-safe.

    `trajectory` goes to verifiers that ask for it. Without one they get None.
    """

    verifier: str
    data_source: str
    solution_str: str
    ground_truth: str
    extra_info: dict[str, Any] | None = None
    trajectory: Trajectory | None = None


@dataclass(slots=True)
class RewardResult:
    """A finite `score`, or None (lost) with the reason in `error`. `extra`: further scalars of the verifier."""

    score: float | None
    error: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    wrong_return: bool = False
    """Whether the verifier did return, but no reward."""


class Tally(TypedDict):
    """JSON-safe count of gradings: in all, and of the lost ones by verifier with the first reason."""

    total: int
    lost: dict[str, int]
    reasons: dict[str, str]


class _WorkerFailed(Exception):
    """The worker is of no more use; the text says why."""


def worker_environment() -> dict[str, str]:
    """Environment of a helper process: this package importable, hash seed fixed, one thread a library."""
    root = str(Path(__file__).resolve().parents[3])
    path = os.environ.get("PYTHONPATH")
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **single, "PYTHONHASHSEED": "0", "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root}


class _Worker:
    """One process, its pipes, and the batch it works on."""

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
        self.unsent = b""
        self.unread = b""
        self.batch: deque[tuple[int, int, str]] = deque()
        """(item, request id, verifier) of what it has not answered yet; the first is the one it works on."""
        self.imported: set[str] = set()
        self.deadline = 0.0
        self.phase = ""

    def give(self, batch: Sequence[tuple[int, int, str]], message: bytes) -> None:
        """Start work on a batch."""
        self.batch.extend(batch)
        self.unsent = message
        self._start_item()

    def _start_item(self) -> None:
        """Start the clock of the first item: of the import until the worker says `loaded`, then of the grading."""
        if self.batch and self.batch[0][2] not in self.imported:
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

    def read(self) -> list[tuple[int, dict[str, Any]]]:
        """(item, final reply) of all that has come. Raises _WorkerFailed on nonsense, or on death when none came."""
        try:
            data = os.read(self.replies.fileno(), 1 << 16)
        except BlockingIOError:
            return []
        if not data:
            raise _WorkerFailed(self._cause_of_death())
        *lines, self.unread = (self.unread + data).split(b"\n")
        finished: list[tuple[int, dict[str, Any]]] = []
        for line in lines:
            reply = self._parse(line)
            if reply is None:
                if finished:  # these are good; the next read meets the nonsense again
                    self.unread = line + b"\n" + self.unread
                    break
                raise _WorkerFailed(f"the grader sent something that is no reply: {line[:80]!r}")
            if reply.get("ready") is not None:
                continue
            if reply.get("loaded"):
                self.imported.add(self.batch[0][2])
                self._start_item()
                continue
            item, _, _ = self.batch.popleft()
            finished.append((item, reply))
            self._start_item()
            if reply.get("retire") or "load_error" in reply:
                break
        if not finished and len(self.unread) > MAX_REPLY_BYTES:
            raise _WorkerFailed("the grader sent a reply that does not end")
        return finished

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        """The reply in a line; None for anything that is not about the item at work."""
        try:
            reply: dict[str, Any] = json.loads(line)
            if reply.get("ready") is not None or (self.batch and reply["id"] == self.batch[0][1]):
                return reply
        except (ValueError, AttributeError, KeyError, RecursionError):
            pass
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


class RewardPool:
    """`cfg.num_workers` grader processes of this rank, started when first needed. Not for use by several threads."""

    def __init__(self, cfg: RewardConfig) -> None:
        self.cfg = cfg
        self.restarts = 0
        """Workers killed or lost so far."""
        self._tally: Tally = {"total": 0, "lost": {}, "reasons": {}}
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
            results = _Call(self, payloads, [item.verifier for item in items]).run()
        except BaseException:
            self._kill_all()  # busy workers would answer the next call
            raise
        self._count(items, results)
        return results

    def take_tally(self) -> Tally:
        """What was graded and lost since the last call (data/rewards/lost.py tells people)."""
        tally = self._tally
        self._tally = {"total": 0, "lost": {}, "reasons": {}}
        return tally

    def _count(self, items: Sequence[RewardItem], results: Sequence[RewardResult]) -> None:
        self._tally["total"] += len(results)
        for item, result in zip(items, results, strict=True):
            if result.score is None:
                name = item.verifier
                self._tally["lost"][name] = self._tally["lost"].get(name, 0) + 1
                where = f" (prompt {item.trajectory['prompt_id']!r})" if item.trajectory else ""
                self._tally["reasons"].setdefault(name, f"{result.error}{where}")

    def check_math_truths(self, truths: Sequence[str]) -> list[str | None]:
        """For each truth why math-verify cannot read it, or None; in a worker, with the deadlines of a grading."""
        results = self.score([RewardItem("math", "", "", truth) for truth in truths])
        return [None if r.score is not None else f"math-verify cannot read it ({r.error})" for r in results]

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
                    "trajectory": item.trajectory,
                }
            )
        except (TypeError, ValueError) as e:
            raise ValueError(f"reward item {index} ({item.data_source}): not JSON: {e}") from None
        return request_id, text.encode()

    def _kill_all(self) -> None:
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()

    def _idle_worker(self) -> _Worker | None:
        for worker in self._workers:
            if not worker.batch:
                return worker
        if len(self._workers) < self.cfg.num_workers:
            self._workers.append(_Worker(self.cfg))
            return self._workers[-1]
        return None

    def _discard(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self.restarts += 1
        worker.kill()


class _Call:
    """One call of `score`."""

    def __init__(self, pool: RewardPool, payloads: list[tuple[int, bytes]], verifiers: list[str]) -> None:
        self.pool = pool
        self.payloads = payloads
        self.verifiers = verifiers
        self.results: list[RewardResult | None] = [None] * len(payloads)
        self.waiting = deque(range(len(payloads)))
        self.failures = [0] * len(payloads)
        self.busy: set[_Worker] = set()

    def run(self) -> list[RewardResult]:
        """Hand batches to idle workers and take results until all are in; results in the items' order."""
        while self.waiting or self.busy:
            while self.waiting and (worker := self.pool._idle_worker()) is not None:
                worker.give(*self._next_batch())
                self.busy.add(worker)
            self._wait()
        return [r for r in self.results if r is not None]

    def _next_batch(self) -> tuple[list[tuple[int, int, str]], bytes]:
        """The next items and their message. Batches shrink towards the end, so that workers finish together."""
        share = -(-len(self.waiting) // (2 * self.pool.cfg.num_workers))
        batch: list[tuple[int, int, str]] = []
        texts: list[bytes] = []
        size = 0
        while self.waiting and len(batch) < min(share, MAX_BATCH_ITEMS) and size < MAX_BATCH_BYTES:
            item = self.waiting.popleft()
            request_id, text = self.payloads[item]
            batch.append((item, request_id, self.verifiers[item]))
            texts.append(text)
            size += len(text)
        return batch, b"[" + b",".join(texts) + b"]\n"

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
        if self.busy and all(len(worker.batch) > 1 and not worker.unsent for worker in self.busy):
            time.sleep(GATHER_S)

    def _read(self, worker: _Worker) -> None:
        try:
            replies = worker.read()
        except _WorkerFailed as e:
            self._failed(worker, str(e))
            return
        for item, reply in replies:
            if "load_error" in reply:
                raise VerifierError(f"verifier {self.verifiers[item]!r} cannot be loaded: {reply['load_error']}")
            if reply.get("retire"):
                # `read` took the item off; `_failed` charges the first of the batch, which has to be this one.
                worker.batch.appendleft((item, *self._request(item)))
                self._failed(worker, str(reply["error"]))
                return
            if "error" in reply:
                self.results[item] = RewardResult(None, str(reply["error"]), wrong_return="returned" in reply)
            else:
                self.results[item] = RewardResult(float(reply["score"]), None, dict(reply["extra"]))
        if not worker.batch:
            self.busy.discard(worker)
            worker.tidy_log()

    def _request(self, item: int) -> tuple[int, str]:
        return self.payloads[item][0], self.verifiers[item]

    def _failed(self, worker: _Worker, reason: str) -> None:
        """Replace a worker that hung or died. The item it worked on is tried again or lost, the others go on."""
        starting = worker.phase.startswith("starting")
        item, *others = [entry[0] for entry in worker.batch]
        self.busy.discard(worker)
        self.pool._discard(worker)
        self.waiting.extendleft(reversed(others))
        self.failures[item] += 1
        if self.failures[item] < ATTEMPTS:
            self.waiting.appendleft(item)
        elif starting:
            raise VerifierError(f"verifier {self.verifiers[item]!r} cannot be loaded ({ATTEMPTS} tries): {reason}")
        else:
            self.results[item] = RewardResult(None, f"{reason} ({ATTEMPTS} tries)")
