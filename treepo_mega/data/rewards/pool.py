"""Grade answers in killable worker processes.

    with RewardPool(cfg.reward) as pool:
        results = pool.score([RewardItem("math", "gsm8k", text, "42")])     # in the order of the items
        pool.warm(["math"])                                                 # before: workers import while others build
    tickets = pool.submit(items)                                        # or meanwhile: grading has begun
        results = pool.poll()                                               # what has ended, by ticket; never blocks

Every item gets a result; nothing is scored 0 in silence. `score is None` means *lost*, `error` says why: the
verifier raised or returned NaN, hung past its deadline, ran out of memory, or its process died (these three
twice: the item is tried once more in a fresh process). A verifier that cannot be loaded at all is a mistake in the
set-up, not a lost sample: VerifierError.

The pool is driven by the thread that calls it, non-blocking on both pipes, so that a stuck worker can stall nothing.
Items go to a worker in batches (one message for many is five times cheaper), and it answers each before it begins the
next. So the first item without an answer is the one that hung or crashed: it alone is charged, and the rest of its
batch goes back into the queue. An item's time runs from when the pool learns that the one before it has ended.

Rewards that wait, `async def` functions and reward servers, have a process a kind, which takes many items at a time
(`flight_grader.py`).

Traps. (1) Deadlines are wall time: on a crowded machine choose them generously. (2) Answers are cut to their last
`max_chars` characters before they are sent. (3) Worker processes have a fixed hash seed, because some reasoning-gym
tasks depend on it, and one thread a library.
"""

from __future__ import annotations

import itertools
import json
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from treepo_mega.data.rewards.flight_grader import FlightGrader
from treepo_mega.data.rewards.grader import Grader, GraderFailed
from treepo_mega.data.rewards.items import Pending, RewardItem, RewardResult, Tally
from treepo_mega.data.rewards.verifiers import BUILT_IN, Kind, VerifierError, check_verifier, kind_of
from treepo_mega.errors import nearest
from treepo_mega.text.server_name import server_of

if TYPE_CHECKING:
    from treepo_mega.config import RewardConfig

ATTEMPTS = 2
"""Times an item is tried when its worker hangs or dies."""

MAX_BATCH_ITEMS = 64
MAX_BATCH_BYTES = 1 << 18
"""A batch ends with the item that reaches one of these. A few pipes' worth: each `poll` can send one."""

GATHER_S = 0.002
"""Pause between two looks at workers amid a batch: several replies are then read at once."""


class RewardPool:
    """`cfg.num_workers` grader processes of this rank, started when first needed. Not for use by several threads."""

    def __init__(self, cfg: RewardConfig) -> None:
        self.cfg = cfg
        self.restarts = 0
        """Workers killed or lost so far."""
        self._workers: list[Grader] = []
        # The processes of rewards that wait, which take many items at a time.
        self._flights: dict[Kind, FlightGrader] = {}
        self._tickets = itertools.count()
        # By ticket: items without a result, and results that nobody has taken yet.
        self._pending: dict[int, Pending] = {}
        self._finished: dict[int, RewardResult] = {}
        self._queues: dict[Kind, deque[int]] = {"batch": deque(), "async": deque(), "http": deque()}
        # Tickets of imports, which nobody asked a result of.
        self._imports: set[int] = set()
        # By verifier. A user's file is parsed for it: not again with every tree.
        self._kinds: dict[str, Kind] = {}
        self._servers = {server.name: server for server in cfg.servers}
        self._costs: dict[str, int] = {}
        self._total = 0
        self._lost: dict[int, tuple[str, str]] = {}
        self._closed = False

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all workers and whatever they started; idempotent. No process is left afterwards."""
        self._closed = True
        self.abandon()

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """Grade `items`; results are in their order. Takes at most about
        `ATTEMPTS * (timeout_s + startup_timeout_s) * ceil(len(items) / num_workers)` seconds.

        What was submitted before goes on meanwhile. Raises what `submit` and `wait` raise.
        """
        tickets = self._submit(items, to_the_end=True)
        missing = deque(tickets)
        while missing:
            if missing[0] in self._finished:
                missing.popleft()
            else:
                self._turn(block=True)
        return [self._finished.pop(ticket) for ticket in tickets]

    def warm(self, verifiers: Iterable[str]) -> None:
        """Start all workers, and have each import `verifiers`. Never blocks: `finish_warming` waits for it.

        For a pool with nothing in flight. Raises VerifierError for an unknown verifier.
        """
        names = list(dict.fromkeys(verifiers))
        self._check(names)
        in_batches = [name for name in names if self._kinds[name] == "batch"]
        while in_batches and len(self._workers) < self.cfg.num_workers:
            self._workers.append(self._new_worker())
        for worker in self._workers:
            if in_batches and not worker.busy:
                batch = [(self._import(name), name) for name in in_batches]
                worker.give(batch, _message([self._pending[ticket].payload for ticket, _ in batch]))
        for name in names:
            if self._kinds[name] != "batch":
                self._queues[self._kinds[name]].append(self._import(name))
        self._hand_out(to_the_end=False)

    def finish_warming(self, say: Callable[[str], None]) -> None:
        """Wait until all workers have imported what `warm` named; `say` is told of a wait, and for what.

        Each import has reward.startup_timeout_s, and two tries. Raises VerifierError for what cannot be imported.
        """
        if self._imports:
            self._turn(block=False)
        if self._imports:
            names = ", ".join(sorted({self._pending[ticket].verifier for ticket in self._imports}))
            say(
                f"waiting for reward workers to import {names}, each at most {self.cfg.startup_timeout_s:g} s "
                "(reward.startup_timeout_s)"
            )
        while self._imports:
            self._turn(block=True)

    def submit(self, items: Sequence[RewardItem]) -> list[int]:
        """A ticket for each of `items`, in order, by which `poll` and `wait` hand out its result. Never blocks.

        Idle workers begin at once; the others' turn comes in later calls. Raises VerifierError for an unknown verifier,
        ValueError for an item that is not JSON, RuntimeError after `close`. Then none of `items` is in flight.
        """
        return self._submit(items, to_the_end=False)

    def poll(self) -> dict[int, RewardResult]:
        """Results by ticket of what was submitted and has ended since the last call. Never blocks.

        It makes no system call when nothing is in flight. Deadlines that have passed are acted upon here. Raises
        VerifierError when a verifier cannot be loaded; then nothing is in flight any more.
        """
        if self._pending:
            self._turn(block=False)
        return self._take_finished()

    def wait(self) -> dict[int, RewardResult]:
        """As `poll`, once everything in flight has ended; its deadlines bound the time."""
        while self._pending:
            self._turn(block=True)
        return self._take_finished()

    def wait_any(self) -> dict[int, RewardResult]:
        """As `poll`, once something in flight has ended; nothing in flight: at once."""
        while self._pending and not self._finished:
            self._turn(block=True)
        return self._take_finished()

    def abandon(self) -> None:
        """Forget what was submitted, and end the workers, which would go on with it."""
        workers = [*self._workers, *self._flights.values()]
        self._workers, self._flights = [], {}
        for queue in self._queues.values():
            queue.clear()
        self._pending.clear()
        self._finished.clear()
        self._imports.clear()
        for worker in workers:
            worker.kill()

    def note(self, verifier: str, result: RewardResult) -> RewardResult:
        """Count a result that came from elsewhere among those graded; returns it."""
        self._total += 1
        if result.score is None:
            self._lost[next(self._tickets)] = (verifier, str(result.error))
        return result

    def take_tally(self) -> Tally:
        """What was graded and lost since the last call (data/rewards/lost.py tells people)."""
        tally: Tally = {"total": self._total, "lost": {}, "reasons": {}}
        # In the order in which items came, not in that of their ends: the reason that is told is the first item's.
        for _, (verifier, reason) in sorted(self._lost.items()):
            tally["lost"][verifier] = tally["lost"].get(verifier, 0) + 1
            tally["reasons"].setdefault(verifier, reason)
        self._total = 0
        self._lost = {}
        return tally

    def check_math_truths(self, truths: Sequence[str]) -> list[str | None]:
        """For each truth why math-verify cannot read it, or None; in a worker, with the deadlines of a grading."""
        results = self.score([RewardItem("math", "", "", truth) for truth in truths])
        return [None if r.score is not None else f"math-verify cannot read it ({r.error})" for r in results]

    def take_costs(self) -> dict[str, int]:
        """Counts of asked servers since the last call: remote_calls, remote_retries, remote_cached; empty for none."""
        costs, self._costs = self._costs, {}
        return costs

    def _encode(self, index: int, item: RewardItem) -> tuple[int, Pending]:
        ticket = next(self._tickets)
        more: dict[str, Any] = {} if item.verifier in BUILT_IN else {"prompt": item.prompt}
        if (server := server_of(item.verifier)) is not None:
            # The same clock in all processes of a machine.
            more["until"] = time.monotonic() + self._servers[server].deadline_s
        try:
            payload = item.encode(ticket, self.cfg.max_chars, **more)
        except (TypeError, ValueError) as e:
            raise ValueError(f"reward item {index} ({item.data_source}): not JSON: {e}") from None
        prompt_id = item.trajectory["prompt_id"] if item.trajectory else None
        return ticket, Pending(item.verifier, prompt_id, payload)

    def _import(self, name: str) -> int:
        """The ticket of a new item that only imports a verifier."""
        ticket = next(self._tickets)
        message = json.dumps({"id": ticket, "verifier": name, "only_import": True})
        self._pending[ticket] = Pending(name, None, message.encode())
        self._imports.add(ticket)
        return ticket

    def _submit(self, items: Sequence[RewardItem], *, to_the_end: bool) -> list[int]:
        if self._closed:
            raise RuntimeError("RewardPool.score after close")
        self._check(item.verifier for item in items)
        pending = dict(self._encode(index, item) for index, item in enumerate(items))
        self._pending |= pending
        for ticket, item in pending.items():
            self._queues[self._kinds[item.verifier]].append(ticket)
        try:
            self._hand_out(to_the_end=to_the_end)
        except BaseException:
            self.abandon()
            raise
        return list(pending)

    def _check(self, verifiers: Iterable[str]) -> None:
        for name in set(verifiers) - set(self._kinds):
            check_verifier(name)
            server = server_of(name)
            if server is not None and server not in self._servers:
                near = nearest(server, self._servers)
                raise VerifierError(f"verifier {name!r}: no server of that name in reward.servers{near}")
            self._kinds[name] = kind_of(name)

    def _take_finished(self) -> dict[int, RewardResult]:
        finished, self._finished = self._finished, {}
        return finished

    def _finish(self, ticket: int, result: RewardResult) -> None:
        item = self._pending.pop(ticket)
        if ticket in self._imports:
            self._imports.discard(ticket)
            return
        self._finished[ticket] = result
        self._total += 1
        if result.score is None:
            where = "" if item.prompt_id is None else f" (prompt {item.prompt_id!r})"
            self._lost[ticket] = (item.verifier, f"{result.error}{where}")

    def _hand_out(self, *, to_the_end: bool) -> None:
        """Give items to workers with room; `to_the_end`: nothing is submitted before all of it has ended."""
        parts = self.cfg.num_workers
        if to_the_end and parts > 1:
            parts *= 2
        while self._queues["batch"] and (worker := self._idle_worker()) is not None:
            worker.give(*self._next_batch(parts))
        if self._queues["async"]:
            self._fill("async", self._flights.get("async") or FlightGrader(self.cfg, "async"))
        if self._queues["http"]:
            self._fill("http", self._flights.get("http") or FlightGrader(self.cfg, "http"))

    def _fill(self, kind: Kind, grader: FlightGrader) -> None:
        """Give items that wait to a process of many calls; an item that may have ended another goes alone."""
        self._flights[kind] = grader
        queue = self._queues[kind]
        while queue:
            suspect = self._pending[queue[0]].failures > 0
            room = grader.room(suspect=suspect)
            batch: list[tuple[int, str]] = []
            while queue and len(batch) < room and (self._pending[queue[0]].failures > 0) == suspect:
                batch.append((queue[0], self._pending[queue[0]].verifier))
                queue.popleft()
            if not batch:
                return
            grader.give(batch, _message([self._pending[ticket].payload for ticket, _ in batch]), suspect=suspect)

    def _new_worker(self) -> Grader:
        # The tokens of reward servers are for the process that asks them: others may run what a model wrote.
        return Grader(self.cfg, tuple(server.token_env for server in self.cfg.servers if server.token_env))

    def _idle_worker(self) -> Grader | None:
        for worker in self._workers:
            if not worker.busy:
                return worker
        if len(self._workers) < self.cfg.num_workers:
            self._workers.append(self._new_worker())
            return self._workers[-1]
        return None

    @property
    def _busy(self) -> list[Grader]:
        return [worker for worker in (*self._workers, *self._flights.values()) if worker.busy]

    def _next_batch(self, parts: int) -> tuple[list[tuple[int, str]], bytes]:
        """The next items and their message: of what waits, one of so many parts.

        The more parts, the smaller the last batches, and the more alike the ends of workers. The fewer, the longer a
        worker has something to do while nobody looks.
        """
        waiting = self._queues["batch"]
        share = -(-len(waiting) // parts)
        batch: list[tuple[int, str]] = []
        texts: list[bytes] = []
        size = 0
        while waiting and len(batch) < min(share, MAX_BATCH_ITEMS) and size < MAX_BATCH_BYTES:
            ticket = waiting.popleft()
            item = self._pending[ticket]
            batch.append((ticket, item.verifier))
            texts.append(item.payload)
            size += len(item.payload)
        return batch, _message(texts)

    def _turn(self, *, block: bool) -> None:
        """Move what bytes can be moved, and act on deadlines; `block`: wait for something to happen before."""
        try:
            self._move(block=block)
        except BaseException:
            self.abandon()  # busy workers would answer the next call
            raise

    def _move(self, *, block: bool) -> None:
        busy = self._busy
        with selectors.PollSelector() as selector:
            for worker in busy:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
                if worker.unsent:
                    selector.register(worker.requests, selectors.EVENT_WRITE, worker)
            first = min(worker.deadline for worker in busy)
            events = selector.select(max(0.0, first - time.monotonic()) if block else 0)
        for key, mask in events:
            if key.data not in self._busy:  # replaced a moment ago, by its other pipe's event
                continue
            if mask & selectors.EVENT_WRITE:
                key.data.write()
            else:
                self._read(key.data)
        now = time.monotonic()
        for worker in [each for each in self._busy if each.deadline <= now]:
            self._failed(worker, worker.phase)
        self._hand_out(to_the_end=block)
        busy = self._busy
        if block and busy and all(worker.gathers for worker in busy):
            time.sleep(GATHER_S)

    def _read(self, worker: Grader) -> None:
        try:
            replies = worker.read()
        except GraderFailed as e:
            self._failed(worker, str(e))
            return
        for ticket, reply in replies:
            verifier = self._pending[ticket].verifier
            for name, count in reply.get("cost", {}).items():
                self._costs[name] = self._costs.get(name, 0) + count
            if "load_error" in reply:
                raise VerifierError(f"verifier {verifier!r} cannot be loaded: {reply['load_error']}")
            if reply.get("retire"):
                self._failed(worker, str(reply["error"]), ticket)
                return
            if "error" in reply:
                self._finish(ticket, RewardResult(None, str(reply["error"]), wrong_return="returned" in reply))
            else:
                self._finish(ticket, RewardResult(float(reply["score"]), None, dict(reply["extra"])))
        if not worker.busy:
            worker.tidy_log()

    def _failed(self, worker: Grader, reason: str, guilty: int | None = None) -> None:
        """Replace a worker that hung or died. What it worked on is tried again or lost, the others go on.

        `guilty`: the item that it named itself.
        """
        starting = worker.phase.startswith("starting")
        charged, others = worker.suspects(guilty)
        queue = self._queues[self._kinds[self._pending[charged[0]].verifier]]
        if isinstance(worker, FlightGrader):
            self._flights = {kind: each for kind, each in self._flights.items() if each is not worker}
        else:
            self._workers.remove(worker)
        self.restarts += 1
        worker.kill()
        queue.extendleft(reversed(others))
        for ticket in reversed(charged):
            item = self._pending[ticket]
            item.failures += 1
            if item.failures < ATTEMPTS:
                queue.appendleft(ticket)
            elif starting:
                raise VerifierError(f"verifier {item.verifier!r} cannot be loaded ({ATTEMPTS} tries): {reason}")
            else:
                self._finish(ticket, RewardResult(None, f"{reason} ({ATTEMPTS} tries)"))


def _message(items: Sequence[bytes]) -> bytes:
    """The line that hands items to a worker."""
    return b"[" + b",".join(items) + b"]\n"
