"""`data.environment: search`: full-text search over documents, by SQLite's FTS5.

A row brings its documents: `documents`, a list of texts or of {title, text}; or `corpus`, an SQLite file with the table
`documents(title, text)` in the working directory of the run, such as `make_corpus` writes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_RESULTS = 5
SNIPPET_TOKENS = 40


class Search:
    """Two tools: find documents, and read one."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str]] = []
        self._database: sqlite3.Connection | None = None

    def reset(self, documents: Iterable[Any] = (), corpus: str | None = None, **row: Any) -> None:
        """Begin with the documents of a row, or with its corpus."""
        if corpus is not None:
            self._database = sqlite3.connect(f"file:{Path(corpus).resolve()}?mode=ro&immutable=1", uri=True)
            return
        self._rows = [_titled(number, document) for number, document in enumerate(documents)]
        self._database = in_memory(self._rows)

    def search(self, query: str, max_results: int = 3) -> str:
        """Find documents that contain the words of a query.

        Args:
            query: Words to look for; every one of them has to occur.
            max_results: How many documents to list, at most 5.
        """
        # Quoted: what FTS5 would read as an operator is a word here.
        words = [f'"{word}"' for word in query.replace('"', " ").split()]
        if not words:
            raise ValueError("the query holds no word")
        found = self._connection.execute(
            "SELECT rowid, title, snippet(documents, 1, '', '', ' ... ', ?) FROM documents WHERE documents MATCH ? "
            "ORDER BY rank, rowid LIMIT ?",
            (SNIPPET_TOKENS, " ".join(words), max(1, min(max_results, MAX_RESULTS))),
        ).fetchall()
        if not found:
            return "No document has all of these words."
        return "\n".join(f"[{number}] {title}: {snippet}" for number, title, snippet in found)

    def read(self, document: int) -> str:
        """Read a document in full.

        Args:
            document: Its number, as search lists it.
        """
        found = self._connection.execute("SELECT title, text FROM documents WHERE rowid = ?", (document,)).fetchone()
        if found is None:
            raise ValueError(f"there is no document {document}")
        return f"{found[0]}\n{found[1]}"

    def fork(self) -> Search:
        """The same documents: nothing changes them."""
        other = Search()
        other._rows = self._rows
        other._database = self._database
        return other

    @property
    def _connection(self) -> sqlite3.Connection:
        assert self._database is not None, "reset comes first"
        return self._database


def in_memory(rows: Iterable[tuple[str, str]]) -> sqlite3.Connection:
    """A database in memory with one table, documents(title, text), numbered from 1."""
    database = sqlite3.connect(":memory:")
    _fill(database, rows)
    return database


def make_corpus(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write (title, text) documents as a corpus that rows of the data may name."""
    database = sqlite3.connect(path)
    try:
        _fill(database, rows)
        database.commit()
    finally:
        database.close()


def _fill(database: sqlite3.Connection, rows: Iterable[tuple[str, str]]) -> None:
    database.execute("CREATE VIRTUAL TABLE documents USING fts5(title, text)")
    database.executemany("INSERT INTO documents(title, text) VALUES (?, ?)", rows)


def _titled(number: int, document: Any) -> tuple[str, str]:
    if isinstance(document, str):
        return f"document {number + 1}", document
    if isinstance(document, dict) and isinstance(document.get("text"), str):
        return str(document.get("title", f"document {number + 1}")), document["text"]
    raise ValueError(f"documents[{number}]: expected a text, or {{title, text}}, found {type(document).__name__}")
