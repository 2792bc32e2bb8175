"""A grader process of rewards that wait: many calls in flight in one event loop. `flight_grader.py` is the other side.

`python -m treepo_mega.data.rewards.flights` runs `async def` functions of people's own, or asks reward servers. Its
protocol is that of `worker.py`, with these differences. The first line holds `{"settings"}`. Replies come in any order.
`{"id", "begun": true}` says that a call began, `{"alive": true}` that the loop turns, `{"note"}` is for people. A final
reply may hold `"cost"`, counts of a remote call.

A coroutine that passes reward.timeout_s is cancelled, and tried once more. One that blocks the loop so long stops all
others: a thread sees it, names the guilty one, and the pool replaces the process. Code that holds the interpreter's
lock stops the thread too. Then the pool misses the sign of life, and charges all calls that had begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from treepo_mega.data.rewards.cache import Answer, CacheError, ScoreCache
from treepo_mega.data.rewards.returned import interpret, reason_of
from treepo_mega.data.rewards.verifiers import Verifier, load_verifier
from treepo_mega.data.rewards.worker import (
    arguments_of,
    ignore_job_signals,
    limit_resources,
    protect_streams,
    read_arguments,
    watch_parent,
)
from treepo_mega.text.server_name import server_of

Request = dict[str, Any]
Call = Callable[[list[Request]], Awaitable[list[Answer]]]
"""Grades some requests of a verifier together: a reply for each, without its id."""

BEAT_S = 0.5
CANCEL_S = 1.0
"""How long a cancelled coroutine may clean up."""

ATTEMPTS = 2


@dataclass
class Lane:
    """The requests of one verifier: at most `limit` calls at once, of at most `size` requests."""

    call: Call
    limit: int
    size: int = 1
    key: Callable[[Request], str] | None = None
    """By what equal requests know each other; None: each is graded by itself."""
    cache: ScoreCache | None = None
    waiting: deque[Request] = field(default_factory=deque)
    active: int = 0
    followers: dict[str, list[int]] = field(default_factory=dict)
    """Key of a request on its way to the ids of those that wait for its answer."""


class Flights:
    """The calls of this process. `reply` sends a message to the pool."""

    def __init__(self, settings: dict[str, Any], reply: Callable[[dict[str, Any]], None]) -> None:
        self.settings = settings
        self.reply = reply
        self.tasks: dict[asyncio.Task[Any], int] = {}
        """Task of a user's coroutine to the id of its request."""
        self.importing = False
        self._lanes: dict[str, Lane] = {}
        self._calls: set[asyncio.Task[None]] = set()

    def take(self, request: Request) -> None:
        """Grade a request, as soon as its lane has room."""
        lane = self._lanes.get(request["verifier"]) or self._load(request)
        if lane is None:
            return
        if request.get("only_import"):
            self.reply({"id": request["id"], "score": 0.0, "extra": {}})
            return
        if lane.key is not None and lane.cache is not None:
            key = request["key"] = lane.key(request)
            known = lane.cache.get(key)
            if known is not None:
                self.reply({"id": request["id"], **known, "cost": {"remote_cached": 1}})
                return
            if key in lane.followers:
                lane.followers[key].append(request["id"])
                return
            lane.followers[key] = []
        lane.waiting.append(request)
        self._begin(lane)

    @property
    def busy(self) -> bool:
        """Whether anything is in flight or waits."""
        return bool(self._calls) or any(lane.waiting for lane in self._lanes.values())

    def _load(self, request: Request) -> Lane | None:
        """The lane of a verifier that is asked for the first time; None when it cannot be loaded."""
        name = request["verifier"]
        self.importing = True
        try:
            lane = self._lanes[name] = self._open(name)
        except BaseException as error:
            self.reply({"id": request["id"], "load_error": reason_of(error)})
            return None
        finally:
            self.importing = False
        self.reply({"id": request["id"], "loaded": True})
        return lane

    def _open(self, name: str) -> Lane:
        server = server_of(name)
        if server is None:
            return Lane(self._call_of(load_verifier(name)), self.settings["in_flight"])
        # Here, so that people's own coroutines do not pay for its import.
        from treepo_mega.data.rewards.remote import RemoteServer

        (found,) = (each for each in self.settings["servers"] if each["name"] == server)
        remote = RemoteServer(found)
        keyed = found["cache_entries"] > 0
        cache = ScoreCache(found["cache_entries"], found["cache_dir"]) if keyed else None
        return Lane(remote.call, found["in_flight"], found["batch_size"], remote.key if keyed else None, cache)

    def _begin(self, lane: Lane) -> None:
        while lane.waiting and lane.active < lane.limit:
            batch = [lane.waiting.popleft() for _ in range(min(lane.size, len(lane.waiting)))]
            lane.active += 1
            for request in batch:
                self.reply({"id": request["id"], "begun": True})
            task = asyncio.get_running_loop().create_task(self._run(lane, batch))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    async def _run(self, lane: Lane, batch: list[Request]) -> None:
        try:
            answers = await lane.call(batch)
        # Whatever it is: a request without a reply would be waited for.
        except Exception as error:
            answers = [{"error": reason_of(error)} for _ in batch]
        for request, answer in zip(batch, answers, strict=True):
            self.reply({"id": request["id"], **answer})
            if "key" in request:
                self._share(lane, request["key"], {name: answer[name] for name in answer if name != "cost"})
        lane.active -= 1
        self._begin(lane)

    def _share(self, lane: Lane, key: str, answer: Answer) -> None:
        """Answer the equal requests that came meanwhile, and remember a score; an error may be gone the next time."""
        cost = {"cost": {"remote_cached": 1}} if "score" in answer else {}
        for follower in lane.followers.pop(key):
            self.reply({"id": follower, **answer, **cost})
        if lane.cache is not None and "score" in answer:
            try:
                lane.cache.put(key, answer)
            except CacheError as error:
                self.reply({"note": str(error)})

    def _call_of(self, function: Verifier) -> Call:
        """A call of a user's coroutine function, with its deadline and its second try."""

        async def call(batch: list[Request]) -> list[Answer]:
            answer: Answer = {}
            for attempt in range(ATTEMPTS):
                answer = await self._attempt(function, batch[0])
                if not answer.pop("again", False):
                    break
                if attempt == ATTEMPTS - 1:
                    answer["error"] += f" ({ATTEMPTS} tries)"
            return [answer]

        return call

    async def _attempt(self, function: Verifier, request: Request) -> Answer:
        loop = asyncio.get_running_loop()
        timeout_s = self.settings["timeout_s"]
        begun: list[float] = []

        async def body() -> Answer:
            begun.append(loop.time())
            try:
                returned = await function(**arguments_of(function, request))
            except asyncio.CancelledError:
                raise
            except MemoryError as error:
                return {"error": reason_of(error), "retire": True}
            # Also SystemExit, which would end the loop.
            except BaseException as error:
                return {"error": reason_of(error)}
            try:
                return interpret(returned)
            except Exception as error:
                return {"error": reason_of(error), "returned": type(returned).__name__}

        task = loop.create_task(body())
        self.tasks[task] = request["id"]
        task.add_done_callback(lambda done: self.tasks.pop(done, None))
        while not task.done():
            # From its own first step: others may have held the loop before.
            left = begun[0] + timeout_s - loop.time() if begun else timeout_s
            if left <= 0:
                break
            await asyncio.wait({task}, timeout=left)
        late = not task.done()
        if late:
            task.cancel()
            await asyncio.wait({task}, timeout=CANCEL_S)
        problem = f"grading took more than {timeout_s:g} s"
        if not task.done():
            return {"error": f"{problem}, and went on when it was cancelled", "retire": True}
        if late:
            return {"error": problem, "again": True}
        return {"error": "CancelledError: it cancelled itself"} if task.cancelled() else task.result()


class Wire(asyncio.Protocol):
    """The pool's requests, line by line; `ended` is set when it has closed the pipe."""

    def __init__(self, reply: Callable[[dict[str, Any]], None]) -> None:
        self.flights: Flights | None = None
        self.ended = asyncio.Event()
        self._reply = reply
        self._unread = bytearray()

    def data_received(self, data: bytes) -> None:
        """Take all whole lines."""
        self._unread += data
        if b"\n" not in data:
            return
        *lines, rest = self._unread.split(b"\n")
        self._unread = bytearray(rest)
        for line in lines:
            message = json.loads(line)
            if isinstance(message, dict):
                self.flights = Flights(message["settings"], self._reply)
                continue
            assert self.flights is not None, "the settings come first"
            for request in message:
                self.flights.take(request)

    def connection_lost(self, exc: Exception | None) -> None:
        """The pool is gone, or done."""
        self.ended.set()


async def fly(requests: BinaryIO, replies: BinaryIO, timeout_s: float, startup_timeout_s: float) -> None:
    """Grade what comes until the pool closes the pipe."""
    loop = asyncio.get_running_loop()
    # Threads look names up; by default there may be 32, whose stacks and arenas the memory limit counts.
    loop.set_default_executor(ThreadPoolExecutor(2))
    # A transport, not a file: a pool that does not read for a while must not stop the loop.
    output, _ = await loop.connect_write_pipe(asyncio.Protocol, replies)
    fd = replies.fileno()

    def reply(message: dict[str, Any]) -> None:
        output.write(json.dumps(message).encode() + b"\n")

    wire = Wire(reply)
    beat = time.monotonic()
    reply({"ready": True})
    await loop.connect_read_pipe(lambda: wire, requests)

    def watch() -> None:
        """Name the call that blocks the loop, and end the process."""
        while True:
            time.sleep(BEAT_S)
            flights = wire.flights
            if flights is None or flights.importing or time.monotonic() - beat < timeout_s + BEAT_S:
                continue
            ticket = flights.tasks.get(asyncio.current_task(loop))  # type: ignore[arg-type]  # None has no ticket
            # Behind bytes that the transport has not written, this would stand amid a line.
            if ticket is None or output.get_write_buffer_size():
                continue
            problem = f"it held the event loop for more than {timeout_s:g} s; an async reward awaits what it waits for"
            with contextlib.suppress(OSError):
                os.write(fd, json.dumps({"id": ticket, "error": problem, "retire": True}).encode() + b"\n")
            return

    threading.Thread(target=watch, daemon=True).start()
    while not wire.ended.is_set():
        beat = time.monotonic()
        # For code that holds the interpreter's lock after its trainer died, as in worker.py.
        signal.setitimer(signal.ITIMER_PROF, 2 * max(timeout_s, startup_timeout_s) + 5)
        if wire.flights is not None and wire.flights.busy:
            reply({"alive": True})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(wire.ended.wait(), BEAT_S)


def main() -> None:
    """Entry point of the process."""
    args = read_arguments(__doc__)
    requests, replies = protect_streams()
    ignore_job_signals()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    limit_resources(args.memory_mb)
    watch_parent(args.parent)
    asyncio.run(fly(requests, replies, args.timeout_s, args.startup_timeout_s))
    os._exit(0)


if __name__ == "__main__":
    main()
