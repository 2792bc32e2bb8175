"""Scores of a reward server by content: in memory, and on request in files that later runs read.

    cache = ScoreCache(100_000, folder)
    cache.get(key)                    # the answer that was put under `key`, or None
    cache.put(key, {"score": 1.0, "extra": {}})

Every process appends to a file of its own, one JSON line an answer, so that ranks share a directory on any file system.
What others write is read at the start alone. A torn last line, left by a process that was killed, is skipped.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from treepo_mega.errors import TreepoError

Answer = dict[str, Any]
"""A reply of a worker without its id: `{"score", "extra"}` here."""


class CacheError(TreepoError):
    """A directory of scores that cannot be used; the message names file and line."""


class ScoreCache:
    """At most `entries` answers, of which those used longest ago go first. `folder`: None keeps nothing on disk."""

    def __init__(self, entries: int, folder: str | None = None) -> None:
        """Raises CacheError for a folder that cannot be written to, and for a damaged file in it."""
        self._entries = entries
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._file = -1
        if folder is not None and entries:
            self._open(Path(folder))

    def get(self, key: str) -> Answer | None:
        """The answer of `key`, or None."""
        answer = self._answers.get(key)
        if answer is not None:
            self._answers.move_to_end(key)
        return answer

    def put(self, key: str, answer: Answer) -> None:
        """Remember an answer. Raises CacheError when the file cannot take it; memory has it, and the file is closed."""
        if not self._entries:
            return
        self._remember(key, answer)
        if self._file < 0:
            return
        line = json.dumps({"key": key, "answer": answer}).encode() + b"\n"
        try:
            # One call a line: a kill between two lines tears none.
            if os.write(self._file, line) != len(line):
                raise OSError("the disk took a part of a line")
        except OSError as error:
            os.close(self._file)
            self._file = -1
            raise CacheError(f"reward.servers cache_dir: {error.strerror or error}; no more is written there") from None

    def _remember(self, key: str, answer: Answer) -> None:
        self._answers[key] = answer
        self._answers.move_to_end(key)
        while len(self._answers) > self._entries:
            self._answers.popitem(last=False)

    def _open(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("scores-*.jsonl"), key=lambda path: path.stat().st_mtime):
                self._read(path)
            name = f"scores-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}.jsonl"
            self._file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise CacheError(f"reward.servers cache_dir {folder}: {error.strerror or error}") from None

    def _read(self, path: Path) -> None:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    score = float(entry["answer"]["score"])
                    self._remember(str(entry["key"]), {"score": score, "extra": dict(entry["answer"]["extra"])})
                except (ValueError, KeyError, TypeError):
                    raise CacheError(
                        f"{path}:{number}: expected a line of the score cache, got {line[:60]!r}; delete the file"
                    ) from None
