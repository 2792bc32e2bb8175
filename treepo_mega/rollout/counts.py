"""What sampling costs: tokens of one tree as its requests come and go, and the sums over finished trees.

`rollout/README.md` lists every key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treepo_mega.engine.stream import Finished
from treepo_mega.tree.node import Tree
from treepo_mega.tree.stop import STOP_REASONS, TURN_STOP_REASONS

PREFIX_COUNTS = ("cached_tokens", "recomputed_tokens", "forwarded_tokens", "forwarded_pairs")
"""What `TokenCounts` adds to a tree's counts, which begin with 0."""

SAMPLING_COUNTS = ("generated_tokens", "dropped_tokens", *PREFIX_COUNTS)
"""Counts that are metrics of the rollout by the same names."""


@dataclass(slots=True)
class TokenCounts:
    """What sampling a tree cost, added to its `counts`."""

    counts: dict[str, float]

    def add_prefix(self, prefix_tokens: int, finished: Finished) -> None:
        """The prefix of a new request: found in the cache, or computed again."""
        recomputed = prefix_tokens - finished.num_cached_tokens
        self.counts["cached_tokens"] += finished.num_cached_tokens
        self.counts["recomputed_tokens"] += recomputed
        # The last token sampled is not forwarded: no token follows it, but for a peeked-at one.
        self.counts["forwarded_tokens"] += recomputed - 1 + bool(finished.peek)
        self.counts["forwarded_pairs"] += _pairs(finished.num_cached_tokens, prefix_tokens)

    def add_forwarded(self, before: int, finished: Finished) -> None:
        """Sampled tokens that went through the model, behind `before` tokens of their path."""
        self.counts["forwarded_tokens"] += len(finished.tokens)
        # As above: the request's last token is not forwarded.
        unseen = not (finished.more or finished.peek)
        self.counts["forwarded_pairs"] += _pairs(before, before + len(finished.tokens) - unseen)

    def add_void(self, tokens: int) -> None:
        """Tokens sampled after the end of a path: void, but paid for."""
        self.counts["generated_tokens"] += tokens
        self.counts["dropped_tokens"] += tokens


def _pairs(start: int, end: int) -> int:
    """(query, key) pairs of the tokens at positions [start, end) of a path, each of which sees itself and all before.

    >>> _pairs(0, 3), _pairs(2, 3), _pairs(3, 3)
    (6, 3, 0)
    """
    return (end * (end + 1) - start * (start + 1)) // 2


def summarize(trees: Sequence[Tree]) -> dict[str, float]:
    """The additive counts of finished trees (see `rollout/README.md`), and token_ratio."""
    counts: dict[str, float] = {"prompts": len(trees), "trees_short": 0, "leaves": 0}
    counts |= {f"stop/{reason}": 0 for reason in (*STOP_REASONS, *TURN_STOP_REASONS)}
    counts |= {"unique_tokens": 0, "flat_tokens": 0}
    for tree in trees:
        counts["trees_short"] += tree.shortfall is not None
        counts["leaves"] += len(tree.leaves)
        counts["unique_tokens"] += tree.unique_tokens()
        counts["flat_tokens"] += tree.flat_tokens()
        for leaf in tree.leaves:
            counts[f"stop/{tree.nodes[leaf].stop}"] += 1
        for name, value in tree.counts.items():
            counts[name] = counts.get(name, 0) + value
    counts["token_ratio"] = counts["unique_tokens"] / counts["flat_tokens"] if counts["flat_tokens"] else 1.0
    return counts
