"""What a tree and its driver exchange: a `Want` goes out, a `Segment` comes back (see `tree/search.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from treepo_mega.errors import TreepoError
from treepo_mega.tree.routing import Experts


class RoutingMissing(TreepoError):
    """The engine did not say which experts it chose; the message says for what and which key asks."""


@dataclass(frozen=True, slots=True)
class Want:
    """A segment to sample: at most `max_tokens` tokens after `prefix` (prompt and response so far), with `seed`.

    If `peek` > 0 and the segment does not end its path, the logprobs of the `peek` likeliest next tokens are wanted
    too. `min_tokens`: from here on a border token ends the segment, when `rollout.segment.end` is not length.

    `run` > 0: no branch will start on this path. The driver may sample up to `run` tokens in one request and deliver
    them segment by segment. After each delivery the tree wants the next, with `after` naming the delivered node. If no
    such want follows, the path has ended and the remaining tokens are void.

    `entropy` > 0: the entropy over that many likeliest tokens is wanted with every sampled token. `top` > 0: of one
    token, those likeliest ones in its place are wanted; the tree chooses.
    """

    node_id: int
    prefix: list[int]
    max_tokens: int
    seed: int
    peek: int = 0
    min_tokens: int = 1
    run: int = 0
    after: int | None = None
    entropy: int = 0
    top: int = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """A sampled segment. `logprobs`: nats, one a token. `finish_reason`: "stop", "length" or "border".

    `peek`: logprobs of the likeliest next tokens, descending; empty where none were wanted or the path ended.
    `entropies`: nats, one a token where they were wanted, else empty. `top`: (id, logprob), descending, likewise.
    `experts`: those of its path's tokens from place `experts_from` on, where they were wanted (`tree/routing.py`).
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    peek: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    top: list[tuple[int, float]] = field(default_factory=list)
    experts: Experts | None = None
    experts_from: int = 0

    def part(self, begin: int, end: int) -> Segment:
        """Its tokens `begin` .. `end` - 1; the peek, the reason and the experts of the path stay."""
        if begin == 0 and end >= len(self.tokens):
            return self
        return Segment(
            self.tokens[begin:end],
            self.logprobs[begin:end],
            self.finish_reason,
            self.peek,
            self.entropies[begin:end],
            self.top,
            self.experts,
            self.experts_from,
        )


def check_segment(segment: Segment, most: int, where: str, *, entropies: bool, experts: bool = False) -> None:
    """Raise ValueError unless a segment has 1 to `most` tokens, a logprob for each, and entropies as they are wanted.

    Raises RoutingMissing for a segment without experts where they are wanted.

    >>> check_segment(Segment([5, 6], [-0.1, -0.2], "length"), 2, "node 1", entropies=False)
    """
    size = len(segment.tokens)
    if not 0 < size <= most:
        raise ValueError(f"{where}: wanted 1 to {most} tokens, got {size}")
    if len(segment.logprobs) != size:
        raise ValueError(f"{where}: {size} tokens but {len(segment.logprobs)} logprobs")
    wanted = size if entropies else 0
    if len(segment.entropies) != wanted:
        raise ValueError(f"{where}: wanted {wanted} entropies, got {len(segment.entropies)}")
    if experts and segment.experts is None:
        raise RoutingMissing(
            f"{where}: the engine returned no routing, and rollout.routing_replay needs the experts of every sampled "
            "token. Set rollout.routing_replay=off, or use an engine that notes them (engine/routing.py)"
        )
