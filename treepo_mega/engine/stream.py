"""One request to the engine: what is asked for, what has been sampled of it, and where a segment ends.

    stream = engine.submit(SegmentRequest(name="0:0", prefix=prefix, max_tokens=16, seed=7))
    for segment in engine.step(): ...        # `Finished`, of any stream
    stream.extend("0:0.0", max_tokens=16)    # a run goes on with its next segment, under a new name
    stream.cancel()                          # ... or ends after the segment that was delivered last

`SegmentStream.next_segment` says whether a segment has ended: by vLLM's own stop, by its length, or at a border token.
Nothing here knows vLLM beyond the fields that its outputs have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from treepo_mega.errors import TreepoError
from treepo_mega.tree.budget import top_k_entropy
from treepo_mega.tree.routing import Experts


class EngineError(TreepoError):
    """The engine cannot be built, or was used in a way that would give wrong samples; the message says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRequest:
    """Sample at most `max_tokens` tokens after `prefix`, with `seed`; a stop token ends the segment and is kept.

    `temperature` 0 is greedy. `borders`: token ids that end the segment too, from its `min_tokens`-th token on.
    `peek` > 0: one token more is sampled and dropped, for the logprobs of the `peek` likeliest ones in its place.
    `entropy` > 0: with every token, the entropy over that many likeliest ones in its place.
    `top` > 0: those likeliest tokens in place of the last one, with their logprobs.
    `run` > 0: sample up to that many tokens in all, several segments in one stream. Where it is `reported_by_segment`
    (or has borders), each segment is delivered as soon as it is there, and `extend` or `cancel` says what follows;
    else all of it is delivered at once at the end.
    `noted`: first tokens of the prefix whose experts are known; an engine that notes routing returns those after them.
    """

    name: str
    prefix: Sequence[int]
    max_tokens: int
    seed: int
    temperature: float = 1.0
    stop_token_ids: Sequence[int] = ()
    peek: int = 0
    # vLLM's own min_tokens would forbid the border tokens instead, which changes the distribution.
    borders: frozenset[int] = frozenset()
    min_tokens: int = 1
    run: int = 0
    reported_by_segment: bool = False
    entropy: int = 0
    top: int = 0
    noted: int = 0

    @property
    def reported(self) -> int:
        """Likeliest tokens that vLLM has to report at every position, beside the sampled one."""
        return max(self.peek, self.entropy, self.top)

    @property
    def total_tokens(self) -> int:
        """Most tokens that are sampled for it, a peeked-at one included."""
        return self.run or self.max_tokens + (self.peek > 0)

    @property
    def looks_at_each_token(self) -> bool:
        """True when the engine has to see each token as it is sampled, False when the end is enough."""
        return bool(self.borders) or (self.reported_by_segment and self.run > 0)


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished segment: what was sampled, its logprobs (nats), why it ended, and prefix tokens reused.

    `finish_reason`: "stop" (a stop token, kept), "length", or "border" (a border token, kept).
    """

    request_id: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    num_cached_tokens: int
    peek: list[float] = field(default_factory=list)
    """Logprobs of the likeliest tokens after the last one, descending, where they were asked for."""
    entropies: list[float] = field(default_factory=list)
    """Nats, one a token, where they were asked for: of the likeliest tokens, renormalised."""
    top: list[tuple[int, float]] = field(default_factory=list)
    """The likeliest tokens in place of the last one, where they were asked for: (id, logprob), descending."""
    more: bool = False
    """A segment of a run that has not ended: its stream waits for `extend` or `cancel`."""
    experts: Experts | None = None
    """Of the tokens of prefix and segment from place `experts_from` on, as far as they are computed, where the engine
    notes routing: all but the last token sampled."""
    experts_from: int = 0


class Reported(Protocol):
    """vLLM's `FlatLogprobs`: a position has a range of places in `token_ids` and `logprobs`, its sampled token's first.

    An object for each position would keep the garbage collector busy.
    """

    @property
    def start_indices(self) -> Sequence[int]:
        """Where a position's range begins."""

    @property
    def end_indices(self) -> Sequence[int]:
        """Where it ends, exclusive."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The sampled id, and the likeliest where they were asked for."""

    @property
    def logprobs(self) -> Sequence[float]:
        """Nats."""


class Sampled(Protocol):
    """vLLM's `CompletionOutput`, as far as a stream reads it."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The sampled ids."""

    @property
    def logprobs(self) -> Reported | None:
        """None before the first token."""


class SegmentEngine(Protocol):
    """What a generator needs of an engine; `engine.engine.Engine` is one."""

    hf_dir: Path
    vocab_size: int
    max_model_len: int

    @property
    def kv_blocks(self) -> int:
        """Blocks of `block_size` tokens that the KV cache holds for requests."""

    def submit(self, request: SegmentRequest) -> SegmentStream:
        """Queue a request; the segments of its stream come out of `step`."""

    def step(self) -> list[Finished]:
        """One forward pass over everything that runs; what finished in it."""

    def abort(self) -> None:
        """Drop every unfinished request."""

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""


class SegmentStream:
    """What has been sampled for one `SegmentRequest`. `abort` takes the request out of vLLM."""

    def __init__(self, request: SegmentRequest, abort: Callable[[], None]) -> None:
        self.name = request.name
        self.waits = False
        """True between a delivered segment of a run and `extend` or `cancel`."""
        self._request = request
        self._abort = abort
        self._max_tokens = request.max_tokens
        self._min_tokens = request.min_tokens
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._likeliest: list[float] = []
        self._entropies: list[float] = []
        self._top: list[tuple[int, float]] = []
        self._start = 0  # where the present segment begins
        self._noted = request.noted

    def add(self, sampled: Sampled) -> None:
        """Take the tokens that vLLM reports: new ones when it looks at each token, else all at the end."""
        reported = sampled.logprobs
        if not sampled.token_ids or reported is None:
            return
        if [reported.token_ids[start] for start in reported.start_indices] != list(sampled.token_ids):
            raise EngineError(f"request {self.name!r}: the engine's logprobs are of other tokens than it sampled")
        self._tokens += sampled.token_ids
        self._logprobs += [reported.logprobs[start] for start in reported.start_indices]
        if self._request.entropy:
            for position in range(len(sampled.token_ids)):
                law = ranked(reported, position)[: self._request.entropy]
                self._entropies.append(top_k_entropy([logprob for _, logprob in law]))
        if self._request.peek:
            self._likeliest = [logprob for _, logprob in ranked(reported, -1)[: self._request.peek]]
        if self._request.top:
            self._top = ranked(reported, -1)[: self._request.top]

    def next_segment(self, reason: str | None, cached_tokens: int, vocab_size: int) -> Finished | None:
        """The segment that has just ended, None while it goes on. `reason`: vLLM's, None while it samples.

        Raises EngineError for logprobs that are not finite and ids outside the vocabulary.
        """
        ended = self._end(reason)
        if ended is None:
            return None
        end, why = ended
        begin = self._start
        tokens = self._tokens[self._start : end]
        logprobs = self._logprobs[self._start : end]
        if len(logprobs) != len(tokens) or not all(map(math.isfinite, logprobs)):
            raise EngineError(f"request {self.name!r}: logprobs are not finite; the engine's weights are broken")
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise EngineError(f"request {self.name!r}: sampled an id outside the vocabulary of {vocab_size}")
        peek = self._likeliest if end < len(self._tokens) else []
        more = self._request.run > 0 and reason is None
        if more:
            self._start = end
            self.waits = True
        entropies = self._entropies[begin:end]
        return Finished(self.name, tokens, logprobs, why, cached_tokens, peek, entropies, self._top, more)

    def take_computed(self, finished: Finished) -> tuple[int, int]:
        """(first, one past the last) place of the path whose experts go with the segment just delivered."""
        prefix = len(self._request.prefix)
        begin = self._noted
        # The token sampled last has not been computed. A segment before it may end with one that has.
        end = min(prefix + self._delivered(finished), prefix + len(self._tokens) - 1)
        self._noted = max(begin, end)
        return begin, self._noted

    def _delivered(self, finished: Finished) -> int:
        """Tokens of all segments up to and including `finished`, the last one."""
        return self._start if finished.more else self._start + len(finished.tokens)

    def extend(self, name: str, max_tokens: int, min_tokens: int = 1) -> None:
        """Go on with a segment of at most `max_tokens`; the stream is called `name` from now on.

        Raises EngineError unless it waits.
        """
        self._check_waiting()
        self.name = name
        self.waits = False
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens

    def cancel(self) -> None:
        """End after the segment that was delivered last. Raises EngineError unless it waits."""
        self._check_waiting()
        self.waits = False
        self._abort()

    def _check_waiting(self) -> None:
        if not self.waits:
            raise EngineError(f"request {self.name!r} is not a run that waits")

    def _end(self, reason: str | None) -> tuple[int, str] | None:
        """(where the segment ends, why), None while it goes on."""
        request = self._request
        seen = len(self._tokens) - self._start
        # A peeked-at token comes after the segment.
        last = seen - (request.peek > 0)
        # With a peek, the stop token may be the peeked-at one: then the border before it ends the segment.
        ended_itself = reason == "stop" and not request.peek
        long_enough = last > 0 and self._min_tokens <= last
        if not ended_itself and long_enough and self._tokens[self._start + last - 1] in request.borders:
            return self._start + last, "border"
        by_segment = request.looks_at_each_token and request.run > 0
        if by_segment and seen >= self._max_tokens and not ended_itself:
            return self._start + self._max_tokens, "length"
        if reason is None:
            return None
        if request.peek and seen > self._max_tokens:
            return self._max_tokens, "length"
        return len(self._tokens), reason


def ranked(reported: Reported, position: int) -> list[tuple[int, float]]:
    """(id, logprob in nats) of the tokens that vLLM reports for a position, likeliest first.

    vLLM adds the sampled token to the likeliest ones: there may be one more than was asked for.
    """
    range_of = slice(reported.start_indices[position], reported.end_indices[position])
    # Sampled and likely, it is reported twice.
    found = dict(zip(reported.token_ids[range_of], reported.logprobs[range_of], strict=True))
    return sorted(found.items(), key=lambda one: (-one[1], one[0]))
