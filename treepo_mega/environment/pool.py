"""The environments of a rank: states in killable worker processes, asked without waiting.

    state = pool.open(row, seed=...)             # its Reply comes by ticket, as all others
    ticket = pool.act(state, calls, seed=...)
    replies = pool.poll()                        # {ticket: Reply} of what has ended; never blocks
    pool.branch(state)                           # at once: the same history, with a life of its own

Requests of a state are answered in order. A state's object lives in one worker. When that worker is lost, its other
states are rebuilt from their histories in a new one, each when it is needed next. Every answer is compared with what
the trajectory has seen. So a tool that hangs costs its own trajectory one call, and its neighbours nothing but time.

What can go wrong has one of three ends. (1) An observation that begins with `Error:`: a tool that raises, unknown
tools, wrong arguments; and, under `on_error: observe`, a tool that hangs, dies or fills the memory. (2) A lost
trajectory (`Reply.lost`): those under `on_error: lose`, a replay that differs, a reset or get_reward that fails. (3)
EnvironmentClassError: a class that cannot be loaded, which no second try would mend.

Driven by the thread that calls it, non-blocking on all pipes, as the pool of graders is.
"""

from __future__ import annotations

import itertools
import selectors
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from treepo_mega.environment.contract import EnvironmentClassError, path_of
from treepo_mega.environment.process import WorkerCannotStart, WorkerFailed, WorkerProcess
from treepo_mega.environment.state import Done, EnvironmentLimits, Reply, State, ToolCall
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.text.function_path import split_function_path

MAX_FAILED_STARTS = 3
"""Workers that may fail to start one after the other before that is taken for a mistake in the set-up."""


@dataclass(slots=True)
class _Task:
    """A request that is not answered yet. `calls` are still to be made, `texts` have been answered."""

    ticket: int
    state: State
    kind: str
    seed: int = 0
    calls: deque[ToolCall] = field(default_factory=deque)
    texts: list[str] = field(default_factory=list)
    failed: int = 0
    begun: float = 0.0
    to: State | None = None


@dataclass(slots=True)
class _Worker:
    process: WorkerProcess
    tasks: deque[_Task] = field(default_factory=deque)
    alive: dict[int, State] = field(default_factory=dict)
    doing: str = "start"
    """What the process works on: start, replay, or the kind of the first task."""


class EnvironmentPool:
    """`limits.num_workers` workers of this rank, started when first needed. Not for use by several threads."""

    def __init__(self, name: str, limits: EnvironmentLimits | None = None) -> None:
        """Nothing is started. Raises EnvironmentClassError for a name that is no environment."""
        parts = split_function_path(path_of(name))
        assert parts is not None
        self.name = name
        self.limits = limits or EnvironmentLimits()
        self._path = f"{Path(parts[0]).resolve()}:{parts[1]}"
        self._workers: list[_Worker | None] = [None] * self.limits.num_workers
        self._tickets = itertools.count()
        self._numbers = itertools.count()
        self._clock = itertools.count()
        self._replies: dict[int, Reply] = {}
        self._failed_starts = 0
        self._closed = False
        self.counts: dict[str, int] = dict.fromkeys(
            ("calls", "failed_calls", "copies", "replays", "restarts", "lost"), 0
        )
        """Since the pool was made."""

    def __enter__(self) -> EnvironmentPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers and whatever tools started; idempotent."""
        self._closed = True
        workers = [worker for worker in self._workers if worker is not None]
        self._workers = [None] * self.limits.num_workers
        for worker in workers:
            worker.process.end()

    def open(self, row: dict[str, Any], *, seed: int) -> tuple[State, int]:
        """A new state of a row of the data, and the ticket of its reply: `text` is what reset returned."""
        state = State(next(self._numbers), dict(row), seed)
        return state, self._add(_Task(next(self._tickets), state, "open", seed))

    def act(self, state: State, calls: Sequence[ToolCall], *, seed: int) -> int:
        """The ticket of the calls of one turn, made in order; `texts` are their answers.

        `seed` is of the random numbers that the tools draw. Raises ValueError for no call.
        """
        if not calls:
            raise ValueError("a turn without a tool call has no observation")
        return self._add(_Task(next(self._tickets), state, "call", seed, deque(calls)))

    def grade(self, state: State, *, seed: int) -> int:
        """The ticket of what get_reward says of the state."""
        return self._add(_Task(next(self._tickets), state, "grade", seed))

    def branch(self, state: State) -> State:
        """A state with the same history. Nothing of `state` may be unanswered.

        It is copied at once if its worker has it, else rebuilt when it is needed. Raises ValueError amid a call.
        """
        # Not amid a `free` of it either: where room is made, an object goes and its history stays.
        settled = ("copy", "free")
        if any(task.state is state and task.kind not in settled for worker in self._busy() for task in worker.tasks):
            raise ValueError("a state cannot branch amid a call")
        # The same home: its requests come after the copy there.
        other = replace(state, id=next(self._numbers), history=list(state.history), last_used=next(self._clock))
        worker = self._workers[state.home] if state.home is not None else None
        if worker is not None and state.id in worker.alive:
            worker.tasks.append(_Task(-1, state, "copy", to=other))
            self._go_on(worker)
        return other

    def free(self, state: State) -> None:
        """Forget a state, once its requests are answered."""
        worker = self._workers[state.home] if state.home is not None else None
        if worker is not None and state.id in worker.alive:
            worker.tasks.append(_Task(-1, state, "free"))
            self._go_on(worker)

    def poll(self) -> dict[int, Reply]:
        """Replies by ticket of what has ended since the last call. Never blocks. Raises EnvironmentClassError."""
        if self._busy():
            self._move(0.0)
        return self._take()

    def wait_any(self) -> dict[int, Reply]:
        """As `poll`, once a request is answered, or the deadline of a call has passed."""
        if self._busy() and not self._replies:
            self._move(self._first_deadline())
        return self._take()

    def wait(self, until: Callable[[], bool] | None = None) -> dict[int, Reply]:
        """As `poll`, once all requests are answered, or `until` says so; the deadlines of calls bound the time."""
        while self._busy() and not (until is not None and until()):
            self._move(self._first_deadline())
        return self._take()

    @property
    def alive(self) -> int:
        """States whose object exists."""
        return sum(len(worker.alive) for worker in self._workers if worker is not None)

    def _take(self) -> dict[int, Reply]:
        replies, self._replies = self._replies, {}
        return replies

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker is not None and (worker.tasks or worker.process.busy)]

    def _add(self, task: _Task) -> int:
        if self._closed:
            raise RuntimeError("EnvironmentPool is closed")
        task.begun = time.monotonic()
        state = task.state
        state.last_used = next(self._clock)
        index = state.home if state.home is not None else self._emptiest()
        worker = self._workers[index]
        if worker is None:
            worker = self._workers[index] = _Worker(WorkerProcess(self._path, self.limits))
        state.home = index
        worker.tasks.append(task)
        self._go_on(worker)
        return task.ticket

    def _emptiest(self) -> int:
        """The worker with the least to do, then with the fewest states."""

        def load(index: int) -> tuple[int, int]:
            worker = self._workers[index]
            return (len(worker.tasks), len(worker.alive)) if worker is not None else (0, 0)

        return min(range(len(self._workers)), key=load)

    def _go_on(self, worker: _Worker) -> None:
        """Give an idle worker what is first in its queue."""
        process = worker.process
        while not process.busy and worker.tasks:
            task = worker.tasks[0]
            state = task.state
            if task.kind == "free":
                if state.id not in worker.alive:
                    worker.tasks.popleft()
                    continue
                self._give(worker, "free", "close", state=state.id)
            elif task.kind == "copy":
                if state.id not in worker.alive:
                    worker.tasks.popleft()
                    continue
                assert task.to is not None
                self._give(worker, "copy", "copying a state", state=state.id, to=task.to.id)
            elif task.kind == "open":
                self._make_room(worker)
                self._give(worker, "open", "reset", state=state.id, row=state.row, seed=state.seed)
            elif state.id not in worker.alive:
                self._make_room(worker)
                self._replay(worker, state)
            elif task.kind == "call":
                call = task.calls[0]
                seed = derive_seed(task.seed, "tool", len(task.texts))
                asked: dict[str, Any] = {"tool": call.name, "arguments": call.arguments, "seed": seed}
                self._give(worker, "call", f"tool {call.name!r:.60}", state=state.id, **asked)
            else:
                self._give(worker, "grade", "get_reward", state=state.id, seed=task.seed)

    def _give(self, worker: _Worker, kind: str, what: str, calls: int = 1, **request: Any) -> None:
        worker.doing = kind
        worker.process.give({"do": kind, **request}, what, calls)

    def _replay(self, worker: _Worker, state: State) -> None:
        self.counts["replays"] += 1
        history = [
            {"tool": done.call.name, "arguments": done.call.arguments, "seed": done.seed, "text": done.text}
            for done in state.history
        ]
        request: dict[str, Any] = {"row": state.row, "seed": state.seed, "opening": state.opening, "history": history}
        self._give(worker, "replay", f"a replay of {len(history)} calls", len(history) + 1, state=state.id, **request)

    def _make_room(self, worker: _Worker) -> None:
        """Over limits.max_states, the state that was used longest ago is dropped; it is rebuilt if it is needed."""
        asked = {task.state.id for task in worker.tasks}
        idle = [state for state in worker.alive.values() if state.id not in asked]
        if self.alive >= self.limits.max_states and idle:
            oldest = min(idle, key=lambda state: state.last_used)
            # Behind the first task, which is about to be given: the object goes right after it.
            worker.tasks.insert(1, _Task(-1, oldest, "free"))

    def _first_deadline(self) -> float:
        busy = [worker.process.deadline for worker in self._busy() if worker.process.busy]
        return max(0.0, min(busy) - time.monotonic()) if busy else 0.0

    def _move(self, seconds: float) -> None:
        """Move what bytes can be moved within `seconds`, and act on deadlines."""
        busy = [worker for worker in self._busy() if worker.process.busy]
        with selectors.PollSelector() as selector:
            for worker in busy:
                selector.register(worker.process.replies, selectors.EVENT_READ, worker)
                if worker.process.writing:
                    selector.register(worker.process.requests, selectors.EVENT_WRITE, worker)
            events = selector.select(seconds)
        for key, mask in events:
            worker = key.data
            if worker not in self._workers:
                continue
            if mask & selectors.EVENT_WRITE:
                worker.process.write()
                continue
            try:
                answer = worker.process.read()
            except WorkerFailed as error:
                self._lost_worker(worker, str(error))
            except WorkerCannotStart as error:
                raise self._cannot_start(str(error)) from None
            else:
                if answer is not None:
                    self._answered(worker, answer)
        now = time.monotonic()
        for worker in busy:
            if worker in self._workers and worker.process.busy and worker.process.deadline <= now:
                self._lost_worker(worker, worker.process.overdue)

    def _answered(self, worker: _Worker, answer: dict[str, Any]) -> None:
        if answer.get("ready"):
            self._failed_starts = 0
        elif answer.get("retire"):
            self._lost_worker(worker, str(answer["error"]))
            return
        elif answer["processes"] > 1 + self.limits.max_processes:
            # As if it had died: a replay of the call would only leave as many again.
            left = answer["processes"] - 1
            self._lost_worker(worker, f"it left {left} processes behind (at most {self.limits.max_processes})")
            return
        else:
            self._settle(worker, answer)
        self._go_on(worker)

    def _settle(self, worker: _Worker, answer: dict[str, Any]) -> None:
        """What an answer means for the first task of the worker."""
        task = worker.tasks[0]
        state = task.state
        error = answer.get("error")
        if worker.doing == "replay":
            if error is None:
                worker.alive[state.id] = state
            else:
                self._end(worker, Reply(error=error, lost=True))
        elif worker.doing == "copy":
            worker.tasks.popleft()
            assert task.to is not None
            if error is None:
                self.counts["copies"] += 1
                worker.alive[task.to.id] = task.to
        elif worker.doing == "free":
            worker.tasks.popleft()
            del worker.alive[state.id]
        elif error is not None:
            self._end(worker, Reply(error=error, lost=True))
        elif worker.doing == "open":
            state.opening = answer["text"]
            worker.alive[state.id] = state
            self._end(worker, Reply(text=state.opening))
        elif worker.doing == "grade":
            self._end(worker, Reply(score=answer["score"]))
        else:
            self._called(worker, task, answer["text"], failed=bool(answer.get("failed")))

    def _called(self, worker: _Worker, task: _Task, text: str, *, failed: bool) -> None:
        """A call has its observation; the turn goes on with the next one, or ends."""
        self.counts["calls"] += 1
        self.counts["failed_calls"] += failed
        call = task.calls.popleft()
        seed = derive_seed(task.seed, "tool", len(task.texts))
        task.state.history.append(Done(call, seed, text))
        task.texts.append(text)
        task.failed += failed
        if not task.calls:
            self._end(worker, Reply(texts=tuple(task.texts), calls=len(task.texts), failed_calls=task.failed))

    def _end(self, worker: _Worker, reply: Reply) -> None:
        task = worker.tasks.popleft()
        self.counts["lost"] += reply.lost
        self._replies[task.ticket] = replace(reply, seconds=time.monotonic() - task.begun)

    def _lost_worker(self, worker: _Worker, reason: str) -> None:
        """The worker hung, died or filled the memory at what it was doing."""
        doing = worker.doing if worker.process.ready else "start"
        if doing == "start":
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise self._cannot_start(f"{reason} ({MAX_FAILED_STARTS} tries)")
        elif doing == "call":
            self._guilty_call(worker, reason)
        elif doing == "copy":
            # The branch is rebuilt when it is needed; another copy would meet the same.
            worker.tasks.popleft()
        elif doing != "free":
            self._end(worker, Reply(error=reason, lost=True))
        self._replace(worker, reason)

    def _guilty_call(self, worker: _Worker, reason: str) -> None:
        """The call that a worker was lost at: an observation or the end, as on_error says.

        The state it leaves is unknown, so the object is rebuilt without it: it never counts as made.
        """
        task = worker.tasks[0]
        call = task.calls[0]
        self.counts["calls"] += 1
        self.counts["failed_calls"] += 1
        if self.limits.on_error == "lose":
            self._end(
                worker, Reply(error=f"{call.name}: {reason}", lost=True, calls=len(task.texts) + 1, failed_calls=1)
            )
            return
        task.calls.popleft()
        task.texts.append(f"Error: {call.name}: {reason}")
        task.failed += 1
        if not task.calls:
            self._end(worker, Reply(texts=tuple(task.texts), calls=len(task.texts), failed_calls=task.failed))

    def _replace(self, worker: _Worker, reason: str) -> None:
        """A new process takes over what waits; states are rebuilt in it when they are needed."""
        index = self._workers.index(worker)
        self._workers[index] = None
        self.counts["restarts"] += 1
        worker.process.end()
        # Copies and frees were of objects that are gone.
        waiting = deque(task for task in worker.tasks if task.kind not in ("copy", "free"))
        if waiting:
            self._workers[index] = _Worker(WorkerProcess(self._path, self.limits), waiting)

    def _cannot_start(self, reason: str) -> EnvironmentClassError:
        self.close()
        return EnvironmentClassError(f"environment {self.name!r} cannot be started: {reason}")

    def settings(self) -> dict[str, Any]:
        """The limits by name, for messages and records."""
        return asdict(self.limits)
