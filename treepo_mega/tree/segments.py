"""The trees of an optimizer step as arrays, ready to be laid out. Pure NumPy, no Python loop over segments.

    s = Segments.from_trees(trees, prompts, sharing="tree")     # or "prompt", "none"; or Segments.from_paths(...)
    s.group, s.parent, s.length, s.position, ...                # one entry a segment, in depth-first pre-order

`sharing` says what is kept once. `tree`: the trees as they were sampled. `prompt`: the prompt once, below it every
trajectory by itself. `none`: every trajectory by itself, prompt included (the flat layout). The last two copy
segments, so that all three are forests of the same kind and nothing downstream knows which one it has.

Order. Segments are sorted by group (a *group* is one tree of this forest), then depth-first in pre-order, children
as they were added. So the descendants of segment s are s+1 .. s+below[s]-1, the leaves below it are
leaves[leaf_lo[s] : leaf_hi[s]], and everything else is cumulative sums. Segments without a leaf below them (their
reward was lost) are left out; segments of no tokens are kept, they cost nothing.

Time is linear in the number of segments and tokens: a handful of array passes, and one per depth level.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from operator import attrgetter
from typing import Literal

import numpy as np
import numpy.typing as npt

from treepo_mega.tree.node import Tree

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Sharing = Literal["tree", "prompt", "none"]


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One root-to-leaf path ready for training."""

    prompt_index: int
    """Index of its prompt in the batch: mini-batches keep equal indices together."""
    tokens: list[int]
    """Prompt and response."""
    prompt_len: int
    advantage: float
    rollout_logprobs: list[float]
    """Engine logprobs of the response tokens."""

    @property
    def response_len(self) -> int:
        """Trained tokens."""
        return len(self.tokens) - self.prompt_len


@dataclass(slots=True)
class Segments:
    """S segments of G trees with L leaves; see the module docstring for their order. All indices are into [S]."""

    group: Ints
    """[S] tree of this forest."""
    parent: Ints
    """[S] segment, -1 for a root."""
    below: Ints
    """[S] segments of the subtree, itself included."""
    source: Ints
    """[S] index of its first token in `tokens`."""
    length: Ints
    """[S] tokens."""
    position: Ints
    """[S] depth of its first token in the trajectory, tokens."""
    node: Ints
    """[S] the node it is a copy of, numbered over all trees in the order given; credit per node is looked up here."""
    trained: Bools
    """[S] whether its tokens are predicted: all but prompts."""
    leaf_lo: Ints
    """[S] first leaf below it, in depth-first order."""
    leaf_hi: Ints
    """[S] one past the last."""
    leaf_segment: Ints
    """[L] where each leaf ends, in depth-first order."""
    leaf_number: Ints
    """[L] the leaf's number in the order the caller gave (tree by tree, `tree.leaves` order)."""
    prompt: Ints
    """[G] prompt number of each tree."""
    tokens: Ints
    """All token ids; a copied segment refers to the same ones."""
    logprobs: Floats
    """Engine logprobs, as long as `tokens`; 0 for prompts."""

    def __len__(self) -> int:
        return len(self.parent)

    @classmethod
    def from_trees(cls, trees: Sequence[Tree], prompts: Sequence[int], sharing: Sharing = "tree") -> Segments:
        """Every trajectory of `trees`; tree i belongs to prompt number `prompts[i]`.

        Raises ValueError for an empty prompt (nothing predicts the first token) and for logprobs that do not match
        their tokens.
        """
        sizes = np.array([len(t.nodes) for t in trees], np.int64)
        base = np.cumsum(sizes) - sizes
        nodes = list(chain.from_iterable(t.nodes for t in trees))
        owner = np.repeat(np.arange(len(trees)), sizes)
        texts, scores = list(map(attrgetter("tokens"), nodes)), list(map(attrgetter("logprobs"), nodes))
        parent = np.fromiter(map(attrgetter("parent"), nodes), np.int64, len(nodes))
        length = np.fromiter(map(len, texts), np.int64, len(nodes))
        scored = np.fromiter(map(len, scores), np.int64, len(nodes))
        wrong = np.flatnonzero((scored != length) & (parent >= 0))
        if len(wrong):
            at = int(wrong[0])
            where = f"prompt {trees[owner[at]].prompt_id!r}, node {at - int(base[owner[at]])}"
            raise ValueError(f"{where}: {scored[at]} logprobs for {length[at]} tokens")
        counts = [len(t.leaves) for t in trees]
        leaves = np.fromiter(chain.from_iterable(t.leaves for t in trees), np.int64, sum(counts))
        return _build(
            parent=np.where(parent < 0, -1, parent + base[owner]),
            leaves=leaves + np.repeat(base, counts),
            length=length,
            tokens=np.fromiter(chain.from_iterable(texts), np.int64, int(length.sum())),
            scores=chain.from_iterable(compress(scores, (parent >= 0).tolist())),
            prompt=np.asarray(prompts, np.int64)[owner],
            sharing=sharing,
        )

    @classmethod
    def from_paths(cls, paths: Sequence[Trajectory]) -> Segments:
        """Trajectories one by one, nothing shared. Raises ValueError as `from_trees` does."""
        for i, t in enumerate(paths):
            if len(t.rollout_logprobs) != t.response_len:
                raise ValueError(f"trajectory {i}: {len(t.rollout_logprobs)} logprobs for {t.response_len} tokens")
        number = np.arange(2 * len(paths))
        return _build(
            parent=np.where(number % 2 == 1, number - 1, -1),
            leaves=number[1::2],
            length=np.array([[t.prompt_len, t.response_len] for t in paths], np.int64).reshape(-1),
            tokens=np.fromiter(chain.from_iterable(t.tokens for t in paths), np.int64),
            scores=chain.from_iterable(t.rollout_logprobs for t in paths),
            prompt=np.repeat(np.array([t.prompt_index for t in paths], np.int64), 2),
            sharing="tree",
        )

    def tokens_per_group(self) -> Ints:
        """[G] tokens of each tree, shared ones once."""
        return np.bincount(self.group, self.length, len(self.prompt)).astype(np.int64)

    def flat_lengths(self) -> Ints:
        """[L] trained tokens of each trajectory, in the caller's order of leaves."""
        at = self.leaf_segment
        prompts = self.length[self.parent < 0][self.group[at]]
        out = np.empty(len(at), np.int64)
        out[self.leaf_number] = self.position[at] + self.length[at] - prompts
        return out


@dataclass(slots=True)
class _Copies:
    """A forest as (node copied, parent copy, copies that are leaves); parents come before their children."""

    node: Ints
    parent: Ints
    leaf: Ints


def _copies(parent: Ints, leaves: Ints, sharing: Sharing) -> _Copies:
    if sharing == "tree":
        return _Copies(np.arange(len(parent)), parent, leaves)
    if sharing not in ("prompt", "none"):
        raise ValueError(f"prefix sharing {sharing!r}: expected tree, prompt or none")
    # Climb from all leaves at once; `chains[d]` holds each leaf's ancestor d steps up, -1 above its root.
    chains = [leaves]
    while (chains[-1] >= 0).any():
        chains.append(np.where(chains[-1] >= 0, parent[chains[-1]], -1))
    table = np.stack(chains[:-1]) if len(leaves) else np.zeros((1, 0), np.int64)
    depth = (table >= 0).sum(0)
    # Root first, leaf last, one trajectory after the other.
    lead = np.cumsum(depth) - depth
    of = np.repeat(np.arange(len(leaves)), depth)
    rank = np.arange(int(depth.sum())) - lead[of]
    node = table[depth[of] - 1 - rank, of]
    up = np.where(rank > 0, np.arange(len(node)) - 1, -1)
    leaf = lead + depth - 1
    if sharing == "prompt":
        # The first trajectory's copy of a root stands for all of them; parents still come first.
        roots = rank == 0
        first = np.full(len(parent), -1, np.int64)
        first[node[roots][::-1]] = np.flatnonzero(roots)[::-1]
        kept = ~roots | (first[node] == np.arange(len(node)))
        number = np.cumsum(kept) - 1
        stands = np.where(roots, first[node], np.arange(len(node)))
        leaf = number[stands[leaf]]
        up = np.where(up >= 0, number[stands[np.maximum(up, 0)]], -1)[kept]
        node = node[kept]
    return _Copies(node, up, leaf)


def levels(parent: Ints) -> list[Ints]:
    """Indices by depth: roots, their children, and so on. Pointer jumping, then one stable sort."""
    size = len(parent)
    depth = (parent >= 0).astype(np.int64)
    up = np.where(parent >= 0, parent, np.arange(size))
    while depth[up].any():
        depth += depth[up]
        up = up[up]
    order = np.argsort(depth, kind="stable")
    return np.split(order, np.cumsum(np.bincount(depth, minlength=1))[:-1])


def path_sums(parent: Ints, value: Ints) -> Ints:
    """[S] sum of `value` from the root to each segment, itself included. Pointer jumping."""
    total, up = value.astype(np.int64), np.where(parent >= 0, parent, len(parent))
    total, up = np.append(total, 0), np.append(up, len(parent))
    while (up < len(parent)).any():
        total = total + total[up]
        up = up[up]
    return total[:-1]


def subtree_sums(parent: Ints, value: npt.NDArray, by_level: list[Ints]) -> npt.NDArray:
    """[S] sum of `value` over each subtree, from the deepest level up."""
    total = value.copy()
    for index in by_level[:0:-1]:
        np.add.at(total, parent[index], total[index])
    return total


def _preorder(parent: Ints, below: Ints, by_level: list[Ints]) -> Ints:
    """[S] rank of each segment in depth-first pre-order: roots in index order, and siblings in index order."""
    size = len(parent)
    order = np.argsort(parent, kind="stable")  # siblings together
    before = np.cumsum(below[order]) - below[order]
    up = parent[order]
    first = np.searchsorted(up, up)  # each family's first member
    offset = np.empty(size, np.int64)
    offset[order] = before - before[first]
    rank = np.empty(size, np.int64)
    rank[by_level[0]] = offset[by_level[0]]
    for index in by_level[1:]:
        rank[index] = rank[parent[index]] + 1 + offset[index]
    return rank


def _build(
    *,
    parent: Ints,
    leaves: Ints,
    length: Ints,
    tokens: Ints,
    scores: Iterable[float],
    prompt: Ints,
    sharing: Sharing,
) -> Segments:
    """From nodes in any order with parents first: copy, leave out what has no leaf below it, sort.

    `scores` are the logprobs of the tokens that are not a root's.
    """
    trained = parent >= 0
    inside = np.repeat(trained, length)
    logprobs = np.zeros(len(tokens))
    logprobs[inside] = np.fromiter(scores, np.float64, int(inside.sum()))
    source = np.cumsum(length) - length
    copy = _copies(parent, leaves, sharing)
    order, parent, rank, below = _depth_first(copy.parent, copy.leaf)
    node, size = copy.node[order], length[copy.node[order]]
    root = parent < 0
    if (bad := size[root] == 0).any():
        raise ValueError(f"the prompt of tree {int(np.flatnonzero(bad)[0])} is empty: nothing predicts its first token")
    ends = np.bincount(rank[copy.leaf], minlength=len(parent))
    before = np.concatenate([[0], np.cumsum(ends)]).astype(np.int64)
    leaf_order = np.argsort(rank[copy.leaf], kind="stable")
    return Segments(
        group=np.cumsum(root) - 1,
        parent=parent,
        below=below,
        source=source[node],
        length=size,
        position=path_sums(parent, size) - size,
        node=node,
        trained=trained[node],
        leaf_lo=before[:-1],
        leaf_hi=before[np.arange(len(parent)) + below],
        leaf_segment=rank[copy.leaf][leaf_order],
        leaf_number=leaf_order,
        prompt=prompt[node[root]],
        tokens=tokens,
        logprobs=logprobs,
    )


def _depth_first(parent: Ints, leaf: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Segments with a leaf below them, in pre-order: (old index, parent, [old] -> new index, size of the subtree)."""
    if not len(leaf):
        none = np.zeros(0, np.int64)
        return none, none, none, none
    by_level = levels(parent)
    reached = subtree_sums(parent, np.bincount(leaf, minlength=len(parent)), by_level) > 0
    by_level = [index[reached[index]] for index in by_level]
    below = subtree_sums(parent, reached.astype(np.int64), by_level)
    rank = np.where(reached, _preorder(parent, below, by_level), -1)
    order = np.empty(int(reached.sum()), np.int64)
    order[rank[reached]] = np.flatnonzero(reached)
    up = parent[order]
    return order, np.where(up >= 0, rank[up], -1), rank, below[order]
