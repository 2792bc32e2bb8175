"""Token ids and their text, packed for the page: ids once, as ranks by frequency; the bytes of each id once.

    ranks = rank_by_frequency(outline.tokens for outline in outlines)      # [K] ids, the most frequent first
    pack_ids(ids, ranks)                                                   # about a byte a frequent id
    pack_table(tokenizer.token_bytes(ranks.tolist()))                      # length and UTF-8 bytes of each

Numbers are LEB128: seven bits a byte, the lowest first, the eighth bit set while more follow. Bytes and not text,
because a token may be a part of a character.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from treepo_mega.tree.segments import Ints

SEVEN_BITS = 0x7F
MORE = 0x80


def rank_by_frequency(trees: Iterable[Sequence[Sequence[int]]]) -> Ints:
    """[K] int64: the ids that occur in the nodes' tokens of `trees`, the most frequent first, ties by id."""
    counts = np.zeros(0, np.int64)
    for nodes in trees:
        for tokens in nodes:
            found = np.bincount(np.asarray(tokens, np.int64), minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
    # Stable, so that ties stay in the order of ids and the page of a step is always the same.
    order = np.argsort(-counts, kind="stable")
    return order[: np.count_nonzero(counts)]


def pack_ids(ids: Sequence[int], ranks: Ints) -> bytes:
    """The places of `ids` in `ranks`, as LEB128; every id must be there."""
    place = np.zeros(int(ranks.max(initial=0)) + 1, np.int64)
    place[ranks] = np.arange(len(ranks))
    return leb128(place[np.asarray(ids, np.int64)])


def leb128(values: Ints) -> bytes:
    """Non-negative integers below 2**28, one after the other.

    >>> leb128(np.array([5, 300])).hex(" ")
    '05 ac 02'
    """
    widths = np.ones(len(values), np.int64)
    for shift in (7, 14, 21):
        widths += values >> shift > 0
    ends = np.cumsum(widths)
    out = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for place in range(4):
        has = widths > place
        more = np.where(widths[has] > place + 1, MORE, 0)
        out[ends[has] - widths[has] + place] = (values[has] >> (7 * place)) & SEVEN_BITS | more
    return out.tobytes()


def pack_table(texts: Sequence[bytes]) -> bytes:
    """The lengths of all texts as LEB128, then all texts."""
    return leb128(np.array([len(text) for text in texts], np.int64)) + b"".join(texts)
