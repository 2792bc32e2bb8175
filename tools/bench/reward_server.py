"""A reward server on the loopback that answers as it is told to by the path: fast, slow, or badly.

    with serving(seed=0) as server:
        server.url("half")       # http://127.0.0.1:PORT/half
        server.requests["half"]  # so many came

It reads HTTP/1.1 by hand, so that it can also break it. An answer is right when it ends with its truth.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

SLOW_S = 0.2
HUGE_BYTES = 4 << 20
JSON = "Content-Type: application/json\r\n"

FIXED = {
    "garbage": (200, b"<html>the proxy is tired</html>"),
    "list": (200, b"[1.0]"),
    "nan": (200, b'{"scores": [NaN]}'),
    "infinite": (200, b'{"scores": [1e999]}'),
    "text": (200, b'{"scores": ["good"]}'),
    "true": (200, b'{"scores": [true]}'),
    "short": (200, b'{"scores": []}'),
    "refuses": (200, b'{"scores": [{"error": "no reference answer"}]}'),
    "nested": (200, b"[" * 60_000),
    "missing": (404, b"no such path"),
    "broken": (500, b"Traceback"),
}
"""Path to status and body."""


class RewardServer:
    """The server and what it has seen, by path. Its methods run in its own thread's loop."""

    def __init__(self, seed: int) -> None:
        self.requests: Counter[str] = Counter()
        self.items: Counter[str] = Counter()
        self.last: dict[str, dict[str, Any]] = {}
        """The newest request's JSON, and its headers under "headers"."""
        self.most_open: Counter[str] = Counter()
        self.port = 0
        self._open: Counter[str] = Counter()
        self._rng = random.Random(seed)

    def url(self, path: str) -> str:
        """Where answers are sent for the behaviour `path`."""
        return f"http://127.0.0.1:{self.port}/{path}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of a connection until it is closed."""
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self._answer(reader, writer):
                pass
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        path = head[0].split()[1].strip("/").partition("?")[0]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.requests[path] += 1
        self.items[path] += len(body.get("items", []))
        self.last[path] = body | {"headers": headers}
        self._open[path] += 1
        self.most_open[path] = max(self.most_open[path], self._open[path])
        try:
            return await self._behave(path, body, headers, writer)
        finally:
            self._open[path] -= 1

    async def _behave(
        self, path: str, body: dict[str, Any], headers: dict[str, str], writer: asyncio.StreamWriter
    ) -> bool:
        if path == "hang":
            await asyncio.sleep(3600)
        if path == "slow":
            await asyncio.sleep(SLOW_S)
        if path == "silent":
            return False
        if path == "torn":
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"scores": [1.')
            await writer.drain()
            return False
        if path == "huge":
            return await self._reply(writer, 200, b" " * HUGE_BYTES)
        if path == "echo":
            return await self._reply(writer, 401, json.dumps(headers).encode())
        if path == "elsewhere":
            return await self._reply(writer, 302, b"", f"Location: {self.url('fast')}\r\n")
        if path == "busy" and self.requests["busy"] == 1:
            return await self._reply(writer, 429, b"", "Retry-After: 1\r\n")
        if path == "half" and self._rng.random() < 0.5:
            return await self._reply(writer, 503, b"overloaded")
        if path == "v1/chat/completions":
            number = 7 if "42" in body["messages"][0]["content"] else 11
            choices = [{"message": {"content": f"It is fine.\nScore: {number}"}}]
            return await self._reply(writer, 200, json.dumps({"choices": choices}).encode(), JSON)
        if path in FIXED:
            return await self._reply(writer, *FIXED[path])
        items = body["items"]
        scores = [float(each["solution_str"].endswith(each["ground_truth"])) for each in items]
        entries = [
            {"score": score, "length": len(each["solution_str"])} for score, each in zip(scores, items, strict=True)
        ]
        return await self._reply(writer, 200, json.dumps({"scores": entries}).encode())

    async def _reply(self, writer: asyncio.StreamWriter, status: int, body: bytes, more: str = "") -> bool:
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body)
        await writer.drain()
        return True


@contextmanager
def serving(seed: int = 0) -> Iterator[RewardServer]:
    """A server on a free port of 127.0.0.1, in a thread; it is gone afterwards, hanging requests too."""
    server = RewardServer(seed)
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def run(stop: asyncio.Event) -> None:
        listener = await asyncio.start_server(server.handle, "127.0.0.1", 0, backlog=1024)
        server.port = listener.sockets[0].getsockname()[1]
        started.set()
        await stop.wait()
        listener.close()
        # Those that hang, too.
        for task in asyncio.all_tasks(loop) - {asyncio.current_task(loop)}:
            task.cancel()

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(run(stop)), daemon=True)
    thread.start()
    if not started.wait(10):
        raise RuntimeError("the loopback server did not start within 10 s")
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
