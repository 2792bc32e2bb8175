"""Environments for tests: one that counts, and one whose tools do what tools should not."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path


class Counter:
    """The class of a TRL user's: no argument, reset, typed tools with docstrings, get_reward."""

    def __init__(self) -> None:
        self.value = 0
        self.goal = 0

    def reset(self, **kwargs: object) -> str | None:
        self.goal = int(kwargs.get("goal", 10))  # type: ignore[call-overload]
        return f"Reach {self.goal}."

    def add(self, amount: int) -> str:
        """Add to the count.

        Args:
            amount: How much to add.
        """
        self.value += amount
        return f"{self.value}"

    def roll(self, sides: int = 6) -> str:
        """Add a die's eyes to the count.

        Args:
            sides: Sides of the die.
        """
        self.value += random.randint(1, sides)
        return f"{self.value}"

    def get_reward(self) -> float:
        return float(self.value == self.goal)


class OnlyReplayed(Counter):
    """It holds what copy.deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Drifting(OnlyReplayed):
    """A replay of it differs: it looks at the process that it runs in."""

    def add(self, amount: int) -> str:
        """Add to the count.

        Args:
            amount: How much to add.
        """
        return f"{os.getpid()}"


class Hostile(Counter):
    """Each tool does one thing that must not hurt anyone else."""

    def hang(self) -> str:
        """Never return."""
        while True:
            time.sleep(1)

    def spin(self) -> str:
        """Never return, and hold the interpreter."""
        return str(sum(range(10**15)))

    def die(self, status: int) -> str:
        """End the process.

        Args:
            status: Exit status.
        """
        os._exit(status)

    def leave(self) -> str:
        """Raise SystemExit."""
        sys.exit(3)

    def shout(self, megabytes: int) -> str:
        """Return a long text.

        Args:
            megabytes: How long.
        """
        return "x" * (megabytes << 20)

    def half(self) -> str:
        """Return half a surrogate pair."""
        return "half \ud800"

    def scribble(self) -> str:
        """Print where the protocol could be, from Python and from below it."""
        print("{" * 1000)
        os.write(1, b"\xff\xfe not a reply\n")
        return "printed"

    def children(self, count: int) -> str:
        """Leave processes behind, in sessions of their own and without an environment.

        Args:
            count: How many.
        """
        for _ in range(count):
            subprocess.Popen(["sleep", "1000"], env={}, start_new_session=True)
        return "left"

    def fill(self) -> str:
        """Use all memory."""
        return str(len(bytearray(1 << 40)))

    def call(self, host: str) -> str:
        """Open a network connection.

        Args:
            host: Where to.
        """
        socket.create_connection((host, 9), timeout=1)
        return "connected"

    def write(self, path: str) -> str:
        """Write a file.

        Args:
            path: Where.
        """
        Path(path).write_text("mine")
        return "written"

    def kill(self, signal: int) -> str:
        """Send a signal to the process above.

        Args:
            signal: Its number.
        """
        os.kill(os.getppid(), signal)
        return "sent"

    def nothing(self) -> None:
        """Return nothing."""

    def table(self) -> dict[str, object]:
        """Return what is no text."""
        return {"a": [1, 2], "b": {3}}


class NeedsArguments(Counter):
    def __init__(self, size: int) -> None:
        super().__init__()


class NoReset:
    def resett(self) -> None: ...


class NoTools:
    def reset(self, **row: object) -> None: ...


class Untyped(Counter):
    def look(self, where) -> str:  # type: ignore[no-untyped-def]
        """Look.

        Args:
            where: Where.
        """
        return "seen"


class NoDocstring(Counter):
    def look(self, where: str) -> str:
        return "seen"


class Asynchronous(Counter):
    async def look(self, where: str) -> str:
        """Look.

        Args:
            where: Where.
        """
        return "seen"
