"""All sinks of a run, so that none of them can hurt it: each has a thread, and one that fails is warned of once.

    sinks = Sinks([("wandb", sink)], functions=[("logger.py:log", function)], strict=False, say=print)
    sinks(step, metrics)
    sinks.take_failures()       # how many calls failed since the last time
    sinks.close()

`strict`: everything happens at once in the caller's thread, and what a sink raises goes on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence

from treepo_mega.monitor.sinks.base import Sink

Metrics = Mapping[str, float | None]
Say = Callable[[str], None]

WAITING = 1000
"""Steps that may wait for a sink; later ones are dropped and counted."""

CLOSE_S = 30.0
"""Seconds in which a sink may write what is left when the run ends."""


class _Post:
    """A sink behind a queue, or called at once when `strict`."""

    def __init__(self, name: str, sink: Sink, *, strict: bool, failed: Callable[[str, Exception], None]) -> None:
        self.name = name
        self._sink = sink
        self._failed = failed
        self._strict = strict
        self._started = False
        self._queue: queue.Queue[tuple[int, dict[str, float | None]] | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        if strict:
            sink.start()
            return
        # A daemon: a tracker that hangs must not keep the run's process.
        self._thread = threading.Thread(target=self._work, name=f"sink {name}", daemon=True)
        self._thread.start()

    def put(self, step: int, metrics: Metrics) -> None:
        """Hand over a copy: what one sink does to it must not reach the next."""
        if self._strict:
            self._sink.log(step, dict(metrics))
            return
        try:
            self._queue.put_nowait((step, dict(metrics)))
        except queue.Full:
            self._failed(self.name, TimeoutError(f"{WAITING} steps wait for it; this one is dropped"))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            self._guarded(lambda item=item: self._log(*item))  # type: ignore[misc]  # no default
        self._guarded(self._sink.close)

    def _log(self, step: int, metrics: dict[str, float | None]) -> None:
        # Tried again at every step until it works: a tracker that is down now may be up later.
        if not self._started:
            self._sink.start()
            self._started = True
        self._sink.log(step, metrics)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        # Libraries and servers fail in ways of their own, and none is a reason to end a run.
        except Exception as error:
            self._failed(self.name, error)

    def close(self) -> None:
        """Wait until everything is written, but not for ever."""
        if self._thread is None:
            self._sink.close()
            return
        try:
            self._queue.put(None, timeout=CLOSE_S)
        except queue.Full:
            self._failed(self.name, TimeoutError(f"it still has {WAITING} steps to write"))
            return
        self._thread.join(timeout=CLOSE_S)
        if self._thread.is_alive():
            self._failed(self.name, TimeoutError(f"it did not end in {CLOSE_S:.0f} s; its last steps may be missing"))


class Sinks:
    """See the module's page. `functions` are people's own, called at once; `say` prints a line for people."""

    def __init__(
        self,
        sinks: Sequence[tuple[str, Sink]] = (),
        functions: Sequence[tuple[str, Callable[[int, Metrics], None]]] = (),
        *,
        strict: bool = False,
        say: Say = print,
    ) -> None:
        self._strict = strict
        self._say = say
        self._lock = threading.Lock()
        self._failures = 0
        self._warned: set[str] = set()
        self._functions = list(functions)
        self._posts = [_Post(name, sink, strict=strict, failed=self._failed) for name, sink in sinks]

    def __call__(self, step: int, metrics: Metrics) -> None:
        """The metrics of `step`, to every sink."""
        for name, function in self._functions:
            try:
                function(step, metrics)
            except Exception as error:
                if self._strict:
                    raise
                self._failed(name, error)
        for post in self._posts:
            post.put(step, metrics)

    def _failed(self, name: str, error: Exception) -> None:
        with self._lock:
            self._failures += 1
            first = name not in self._warned
            self._warned.add(name)
        if first:
            self._say(
                f"warning: the sink {name} failed: {type(error).__name__}: {error}. The run goes on; further failures "
                "are counted in logging/sink_failures (logging.sinks_strict ends the run instead)"
            )

    def take_failures(self) -> int:
        """Calls that failed since the last time."""
        with self._lock:
            failures, self._failures = self._failures, 0
        return failures

    def close(self) -> None:
        """Let every sink write what is left."""
        for post in self._posts:
            post.close()
        self._posts = []
