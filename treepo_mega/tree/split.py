"""Cut trees that are larger than a micro-batch into pieces, repeating as little as possible. Pure NumPy.

A *piece* is a run of consecutive leaves (in depth-first order) of one tree with all their ancestors. A tree cut
between leaves k-1 and k holds the tokens they have in common twice, once in either piece, so a cut costs exactly
the length of their common prefix. `pieces` takes, of all ways to cut into pieces of at most `max_tokens`, one that
repeats the fewest tokens (and of those the one with the fewest pieces): dynamic programming over leaves.

Each token's loss is counted in one piece only: the one that holds the first leaf below it.
"""

from __future__ import annotations

import itertools

import numpy as np

from treepo_mega.config import ConfigError
from treepo_mega.tree.segments import Ints, Segments


def pieces(segments: Segments, max_tokens: int) -> Ints:
    """[P, 3] (group, first leaf, one past the last): whole trees, and the pieces of trees above `max_tokens`.

    Leaves in the forest's depth-first order; pieces cover every leaf once, in order. Raises ConfigError naming the
    longest trajectory when one alone exceeds `max_tokens`.
    """
    groups = len(segments.prompt)
    bounds = np.searchsorted(segments.group[segments.leaf_segment], np.arange(groups + 1))
    whole = np.stack([np.arange(groups), bounds[:-1], bounds[1:]], 1).astype(np.int64)
    path = (segments.position + segments.length)[segments.leaf_segment]
    if len(path) and path.max() > max_tokens:
        raise ConfigError(f"a trajectory of {path.max()} tokens does not fit train.max_tokens_per_gpu={max_tokens}")
    large = segments.tokens_per_group() > max_tokens
    if not large.any():
        return whole
    # Tokens that leaf k brings beside those of the leaves before it; the rest of its path is shared with leaf k-1.
    fresh = np.bincount(segments.leaf_lo, segments.length, len(path)).astype(np.int64)
    out = []
    for group, lo, hi in whole.tolist():
        if large[group]:
            cuts = cut(path[lo:hi].tolist(), fresh[lo:hi].tolist(), max_tokens)
            out += [(group, lo + start, lo + stop) for start, stop in itertools.pairwise(cuts)]
        else:
            out.append((group, lo, hi))
    return np.array(out, np.int64).reshape(-1, 3)


def cut(path: list[int], fresh: list[int], max_tokens: int) -> list[int]:
    """Borders 0 = c_0 < ... < c_m = leaves of the cheapest cut of one tree. `path` [L], `fresh` [L] in tokens.

    Leaves i..j-1 together hold path[i] + sum(fresh[i+1 .. j-1]) tokens. Quadratic in the leaves of a piece.
    """
    count = len(path)
    best: list[tuple[int, int]] = [(0, 0)]  # (repeated tokens, pieces) of the first j leaves
    came: list[int] = [0]
    for stop in range(1, count + 1):
        held = 0
        choice = (1 << 62, 0)
        cut_at = stop - 1
        for start in range(stop - 1, -1, -1):
            # The piece holds leaf `start` with its whole path, and of the later leaves what they bring. A longer piece
            # never holds less: once one is too long, all further ones are.
            if held + path[start] > max_tokens:
                break
            repeated, parts = best[start]
            # A tuple: among equal repetitions, fewer pieces win.
            here = (repeated + (path[start] - fresh[start] if start else 0), parts + 1)
            if here < choice:
                choice = here
                cut_at = start
            held += fresh[start]
        best.append(choice)
        came.append(cut_at)
    borders = [count]
    while borders[-1]:
        borders.append(came[borders[-1]])
    return borders[::-1]
