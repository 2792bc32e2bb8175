"""Tokens that siblings sampled alike, kept once: the trie of a tree's responses. Pure NumPy.

    segments, credit = merge_equal(segments, credit)

Two paths of a tree that begin with the same tokens have the same hidden states and logprobs there, whether the sampler
shared them or drew them twice. Their clipped terms add up in the masses as those of a shared segment do, so the loss
and its gradient stay what they were. A peaked policy draws most of its siblings alike; then most of a forest goes.

    before                          after
    root -+- 1: a b c               root --- a b -+- c
          `- 2: a b d                             `- d        mass of `a b`: that of 1 plus that of 2

Equal prefixes are found by a hash of each prefix: the sum of a 64-bit mix of (token, position) over it. Every merge is
compared token by token afterwards. A collision (a chance of 1e-5 in a step of 20 million tokens) is met with another
hash, so it never gives a wrong gradient. Linear in tokens, but for one sort of them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from treepo_mega.errors import TreepoError
from treepo_mega.tree.credit import Credit
from treepo_mega.tree.segments import Ints, Segments, arrange, path_sums

Hashes = npt.NDArray[np.uint64]


SALTS = range(4)
"""Hashes that are tried one after the other."""


class MergeError(TreepoError):
    """Two different prefixes had one hash under every salt, which is no chance: the arrays are damaged."""


def merge_equal(segments: Segments, credit: Credit) -> tuple[Segments, Credit]:
    """The trie of every group, and the credit of each of its segments: the sum over what was merged into it.

    Leaves keep their numbers; `Segments.node` names the first of the merged nodes. Prompts are not merged between
    groups. Raises MergeError where every hash collides.
    """
    if not len(segments):
        return segments, credit
    segment_of_token = np.repeat(np.arange(len(segments)), segments.length)
    start_of_segment = np.cumsum(segments.length) - segments.length
    offset_of_token = np.arange(len(segment_of_token)) - start_of_segment[segment_of_token]
    id_of_token = segments.tokens[segments.source[segment_of_token] + offset_of_token]
    before = _token_before(segments, start_of_segment, segment_of_token, offset_of_token)
    token, above = _first_of_prefix(segments, segment_of_token, offset_of_token, id_of_token, before)
    merged = np.bincount(token, minlength=len(token))
    begins = np.bincount(token, offset_of_token == 0, len(token)) > 0
    is_kept = token == np.arange(len(token))
    # A run goes on while the same segments share it: none has left, and none has begun.
    opens = is_kept & (begins | (above < 0) | (merged != merged[np.maximum(above, 0)]))
    # A kept token that opens no run follows its neighbour: the same segments share both, and the first names both.
    run_of_token = np.cumsum(opens) - 1
    opening = np.flatnonzero(opens)
    origin = segment_of_token[opening]
    end_of_leaf = _last_token(segments, start_of_segment)[segments.leaf_segment]
    leaves = np.empty(len(end_of_leaf), np.int64)
    leaves[segments.leaf_number] = run_of_token[token[end_of_leaf]]
    built, run_of_segment = arrange(
        parent=np.where(above[opening] >= 0, run_of_token[np.maximum(above[opening], 0)], -1),
        leaves=leaves,
        length=np.bincount(run_of_token[is_kept], minlength=len(opening)).astype(np.int64),
        source=segments.source[origin] + offset_of_token[opening],
        node=segments.node[origin],
        trained=segments.trained[origin],
        prompt=segments.prompt[segments.group[origin]],
        tokens=segments.tokens,
        logprobs=segments.logprobs,
    )
    # Every token of a run has the same segments merged into it, so its first one speaks for all.
    speaks = opens[token]
    run = run_of_token[token[speaks]]
    segment = segment_of_token[speaks]

    def summed(values: npt.NDArray) -> npt.NDArray:
        return np.bincount(run, values[segment], len(opening))[run_of_segment]

    count = summed(credit.count).astype(np.int64)
    return built, Credit(summed(credit.A_pos), summed(credit.A_neg), summed(credit.n), count)


def _first_of_prefix(
    segments: Segments, segment_of_token: Ints, offset_of_token: Ints, id_of_token: Ints, before: Ints
) -> tuple[Ints, Ints]:
    """[T] the first token with the same prefix, which names the prefix; and [T] the name of the prefix one shorter."""
    for salt in SALTS:
        key = _prefix_hashes(segments, segment_of_token, offset_of_token, id_of_token, salt)
        _, first_of_prefix, prefix_of_token = np.unique(key, return_index=True, return_inverse=True)
        # The first token with a prefix names it: then parents come before their children.
        token = first_of_prefix[prefix_of_token]
        above = np.where(before >= 0, token[np.maximum(before, 0)], -1)
        # Equal hashes are equal prefixes if the last tokens are equal and what is above them was merged, too.
        if (id_of_token == id_of_token[token]).all() and (above == above[token]).all():
            return token, above
    raise MergeError(
        f"{len(SALTS)} hashes in a row confused two prefixes of {len(token)} tokens; set train.prefix_sharing=tree"
    )


def _prefix_hashes(
    segments: Segments, segment_of_token: Ints, offset_of_token: Ints, id_of_token: Ints, salt: int
) -> Hashes:
    """[T] a hash of the path down to each token, its group included."""
    position = segments.position[segment_of_token] + offset_of_token
    mixed = _mix(_mix(id_of_token.astype(np.uint64) + np.uint64(salt << 40)) + position.astype(np.uint64))
    running = np.cumsum(mixed, dtype=np.uint64)
    # Sums of uint64 wrap around, and differences of wrapped sums are right all the same.
    before_segment = np.concatenate([[np.uint64(0)], running])[np.cumsum(segments.length) - segments.length]
    own = np.concatenate([[np.uint64(0)], running])[np.cumsum(segments.length)] - before_segment
    above = path_sums(segments.parent, own.view(np.int64)).view(np.uint64) - own
    within = running - before_segment[segment_of_token]
    group = _mix(segments.group.astype(np.uint64) + np.uint64(1))
    return above[segment_of_token] + within + group[segment_of_token]


def _mix(value: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit moves every output bit."""
    mixed = value + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _last_token(segments: Segments, start_of_segment: Ints) -> Ints:
    """[S] the last token at or above the end of each segment; a root has one, so there always is one."""
    holder = np.arange(len(segments))
    # A segment of no tokens ends where the next one up that has tokens ends.
    while (empty := segments.length[holder] == 0).any():
        holder = np.where(empty, segments.parent[holder], holder)
    return start_of_segment[holder] + segments.length[holder] - 1


def _token_before(segments: Segments, start_of_segment: Ints, segment_of_token: Ints, offset_of_token: Ints) -> Ints:
    """[T] the token before each one on its path; -1 for the first of a root."""
    last = _last_token(segments, start_of_segment)
    parent = segments.parent[segment_of_token]
    end_of_parent = np.where(parent >= 0, last[np.maximum(parent, 0)], -1)
    return np.where(offset_of_token > 0, np.arange(len(segment_of_token)) - 1, end_of_parent)
