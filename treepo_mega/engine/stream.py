"""What the engine was asked for, what it has sampled of it, and where a segment ends.

`Request` gathers the tokens of one request; `Request.end` says whether a segment has ended: by vLLM's own stop, by its
length, or at a border token. `Finished` is what the engine's callers get. Neither knows vLLM beyond the fields that
its outputs have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished request: what was sampled, its logprobs (nats), why it ended, and prefix tokens reused.

    `finish_reason`: "stop" (a stop token, kept), "length", or "border" (a border token, kept).
    """

    request_id: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    num_cached_tokens: int
    peek: list[float] = field(default_factory=list)
    """Logprobs of the likeliest tokens behind the last one, descending, where they were asked for."""
    more: bool = False
    """A segment of a run that has not ended: the engine waits for `go_on` or `drop`."""


@dataclass(slots=True)
class Request:
    """What was asked for, and what has been sampled of it. `start`: where the segment begins in a run."""

    name: str
    max_tokens: int
    peek: int
    borders: frozenset[int]
    min_tokens: int
    streams: bool
    runs: bool
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[float] = field(default_factory=list)
    start: int = 0
    waits: bool = False

    def add(self, sampled: Any) -> None:
        """Take the tokens that vLLM reports (new ones when it streams, else all at the end)."""
        entries = sampled.logprobs or []
        for token, entry in zip(sampled.token_ids, entries, strict=True):
            self.tokens.append(token)
            self.logprobs.append(entry[token].logprob)
        if self.peek and entries:
            self.top = sorted((e.logprob for e in entries[-1].values()), reverse=True)[: self.peek]

    def end(self, reason: str | None) -> tuple[int, str] | None:
        """(where the segment ends, why), None while it goes on. `reason`: vLLM's, None while it samples."""
        seen = len(self.tokens) - self.start
        last = seen - (self.peek > 0)  # a peeked-at token is behind the segment
        ended_itself = reason == "stop" and not self.peek
        if not ended_itself and self.min_tokens <= last and last and self.tokens[self.start + last - 1] in self.borders:
            return self.start + last, "border"
        if self.streams and self.runs and seen >= self.max_tokens and not ended_itself:
            return self.start + self.max_tokens, "length"
        if reason is None:
            return None
        if self.peek and seen > self.max_tokens:
            return self.max_tokens, "length"
        return len(self.tokens), reason
