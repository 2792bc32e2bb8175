"""The trees of an optimizer step as arrays, one entry per segment. Pure NumPy, no Python loop over segments.

The segments of a tree are consecutive, in depth-first pre-order, and siblings keep the order they were added in. So
the subtree of segment s is s .. s+below[s]-1, and the leaves below it are leaf_lo[s] .. leaf_hi[s]-1. Time is linear
in segments and tokens: a handful of array passes, and one per level. Where a chat template hides turns from what comes
later, the tree is that of contexts (`tree/history.py`). An example of five segments (number: tokens):

    0: 10 11 -+- 1: 20 21 -+- 2: 30
              |            `- 3: 40 41
              `- 4: 50

>>> tree = Tree.start("a prompt", [10, 11])
>>> for parent, tokens in [(0, [20, 21]), (1, [30]), (1, [40, 41]), (0, [50])]:
...     child = tree.add_child(parent)
...     child.tokens, child.logprobs = tokens, [-token / 100 for token in tokens]
>>> tree.leaves = [2, 3, 4]
>>> segments = Segments.from_trees([tree], prompts=[7])
>>> for name in Segments.__slots__[:-3]:
...     print(f"{name:<12}", *getattr(segments, name).tolist())
group        0 0 0 0 0
parent       -1 0 1 1 0
below        5 3 1 1 1
source       0 2 4 5 7
length       2 2 1 2 1
position     0 2 4 4 2
node         0 1 2 3 4
trained      False True True True True
leaf_lo      0 0 0 1 2
leaf_hi      3 2 1 2 3
leaf_segment 2 3 4
leaf_number  0 1 2
prompt       7
tokens       10 11 20 21 30 40 41 50
logprobs     0.0 0.0 -0.2 -0.21 -0.3 -0.4 -0.41 -0.5
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from treepo_mega.tree.copies import Copies, Sharing, copies_of, ends_of
from treepo_mega.tree.elsewhere import is_here
from treepo_mega.tree.history import Ends, Parts, Trajectories, has_hidden, parts_of
from treepo_mega.tree.node import Tree
from treepo_mega.tree.routing import ExpertIds, ids_of, no_experts
from treepo_mega.tree.sums import Bools, Ints, levels, path_sums, preorder, subtree_sums

Floats = npt.NDArray[np.float64]


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
    """[S] index of its first token in `tokens`; where those are elsewhere, in those of all trees."""
    length: Ints
    """[S] tokens."""
    position: Ints
    """[S] depth of its first token in the trajectory, tokens."""
    node: Ints
    """[S] the node it is a copy of, numbered over all trees in the order given; credit per node is looked up here."""
    trained: Bools
    """[S] whether its tokens are predicted: all but prompts and observations."""
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
    """Engine logprobs, as long as `tokens`; 0 for prompts and observations."""
    experts: ExpertIds = field(default_factory=no_experts)
    """[as long as `tokens`, layers, top_k] the engine's (`tree/routing.py`); [.., 0, 0] where none are noted."""
    ends: Ends | None = None
    """Where turns are hidden: what the numbers in `leaf_number` mean, which are those of `ends` then. L is E above."""
    trajectories: Trajectories | None = None
    """Where turns are hidden, and nothing was merged: what trajectories say."""

    def __len__(self) -> int:
        return len(self.parent)

    @classmethod
    def from_trees(cls, trees: Sequence[Tree], prompts: Sequence[int], sharing: Sharing = "tree") -> Segments:
        """Every trajectory of `trees`; tree i belongs to prompt number `prompts[i]`.

        `sharing` says what is kept once. `tree`: the trees as they were sampled. `prompt`: the prompt, and below it
        every trajectory by itself. `none`: nothing, every trajectory has its own prompt (the flat layout). The last
        two copy segments: all three give forests of the same kind, and nothing downstream knows which one it has.

        Where contents of some tree are elsewhere (`tree/elsewhere.py`), `tokens` and `logprobs` are empty, and `source`
        counts the tokens of all nodes in the order given; `Stretches.furnish` gives such segments what is fetched.

        Raises ValueError for an empty prompt (nothing predicts the first token) and for logprobs that do not match
        their tokens.
        """
        size_of_tree = np.array([len(tree.nodes) for tree in trees], np.int64)
        first_node_of_tree = np.cumsum(size_of_tree) - size_of_tree
        tree_of_node = np.repeat(np.arange(len(trees)), size_of_tree)
        nodes = list(chain.from_iterable(tree.nodes for tree in trees))
        tokens_of_node = list(map(attrgetter("tokens"), nodes))
        logprobs_of_node = list(map(attrgetter("logprobs"), nodes))
        parent_of_node = np.fromiter(map(attrgetter("parent"), nodes), np.int64, len(nodes))
        length_of_node = np.fromiter(map(len, tokens_of_node), np.int64, len(nodes))
        scored_of_node = np.fromiter(map(len, logprobs_of_node), np.int64, len(nodes))
        wrong = np.flatnonzero((scored_of_node != length_of_node) & (parent_of_node >= 0))
        if len(wrong):
            node = int(wrong[0])
            tree = int(tree_of_node[node])
            where = f"prompt {trees[tree].prompt_id!r}, node {node - int(first_node_of_tree[tree])}"
            raise ValueError(f"{where}: {scored_of_node[node]} logprobs for {length_of_node[node]} tokens")
        parent_of_node = np.where(parent_of_node < 0, -1, parent_of_node + first_node_of_tree[tree_of_node])
        complete = all(map(is_here, tokens_of_node))
        # A root may carry logprobs in a hand-made tree; prompts are not trained, so they are left out here.
        scores = chain.from_iterable(compress(logprobs_of_node, (parent_of_node >= 0).tolist()))
        leaves_of_tree = [len(tree.leaves) for tree in trees]
        leaves = np.fromiter(chain.from_iterable(tree.leaves for tree in trees), np.int64, sum(leaves_of_tree))
        return _build(
            parent_of_node=parent_of_node,
            parts=parts_of(trees, parent_of_node, length_of_node) if has_hidden(trees) else None,
            leaves=leaves + np.repeat(first_node_of_tree, leaves_of_tree),
            length_of_node=length_of_node,
            tokens=np.fromiter(chain.from_iterable(tokens_of_node), np.int64) if complete else np.zeros(0, np.int64),
            logprobs=_scored(parent_of_node, length_of_node, scores) if complete else np.zeros(0),
            experts=ids_of(nodes, length_of_node) if complete else no_experts(),
            prompt_of_node=np.asarray(prompts, np.int64)[tree_of_node],
            observed_of_node=np.fromiter(map(attrgetter("observation"), nodes), np.bool_, len(nodes)),
            sharing=sharing,
        )

    @classmethod
    def from_paths(cls, paths: Sequence[Trajectory]) -> Segments:
        """Trajectories one by one, nothing shared. Raises ValueError as `from_trees` does."""
        for i, path in enumerate(paths):
            if len(path.rollout_logprobs) != path.response_len:
                counts = f"{len(path.rollout_logprobs)} logprobs for {path.response_len} tokens"
                raise ValueError(f"trajectory {i}: {counts}")
        # Two nodes per path: the prompt (even number) and the response below it (odd number).
        node = np.arange(2 * len(paths))
        parent_of_node = np.where(node % 2 == 1, node - 1, -1)
        length_of_node = np.array([[path.prompt_len, path.response_len] for path in paths], np.int64).reshape(-1)
        return _build(
            parent_of_node=parent_of_node,
            parts=None,
            leaves=node[1::2],
            length_of_node=length_of_node,
            tokens=np.fromiter(chain.from_iterable(path.tokens for path in paths), np.int64),
            logprobs=_scored(
                parent_of_node, length_of_node, chain.from_iterable(path.rollout_logprobs for path in paths)
            ),
            experts=no_experts(sum(len(path.tokens) for path in paths)),
            prompt_of_node=np.repeat(np.array([path.prompt_index for path in paths], np.int64), 2),
            observed_of_node=np.zeros(2 * len(paths), np.bool_),
            sharing="tree",
        )

    def tokens_per_group(self) -> Ints:
        """[G] tokens of each tree, shared ones once."""
        return np.bincount(self.group, self.length, len(self.prompt)).astype(np.int64)

    def flat_lengths(self) -> Ints:
        """[L] trained tokens of each trajectory, in the caller's order of leaves."""
        return self.leaf_sums(np.where(self.trained, self.length, 0))

    @property
    def part(self) -> Ints:
        """[S] the part of a node that each one is a copy of, numbered over all trees: the node, if it was not cut."""
        return self.node if self.trajectories is None else self.trajectories.part

    @property
    def leaf_count(self) -> int:
        """L: trajectories."""
        return len(self.leaf_number) if self.ends is None else self.ends.leaves

    @property
    def course(self) -> tuple[Ints, Ints]:
        """[S] the segment before each one in its trajectories, and [L] where they end, in any order.

        Raises ValueError where equal tokens were merged that come behind unlike turns (`Merged.leaf_sums`).
        """
        if self.ends is None:
            return self.parent, self.leaf_segment
        if self.trajectories is None:
            raise ValueError("turns are hidden, and equal tokens behind them were merged: ask Merged for sums")
        return self.trajectories.before, self.trajectories.leaf

    def first_trajectory(self, segment: Ints) -> Ints:
        """[N] number of the first trajectory through each of the segments `segment` [N]."""
        number = self.leaf_number[self.leaf_lo[segment]]
        return number if self.ends is None else self.ends.trajectory[number]

    def sum_below(self, value: npt.NDArray) -> npt.NDArray:
        """[S] sum of `value` [L], in the caller's order of leaves, over the trajectories through each segment."""
        if not len(self):
            return np.zeros(0, value.dtype)
        if self.ends is not None:
            before, leaf = self.course
            at_end = np.zeros(len(self), value.dtype)
            at_end[leaf] = value
            return subtree_sums(before, at_end, levels(before))
        # Sums of value[lo:hi]; every second one is of what lies between two intervals.
        borders = np.stack([self.leaf_lo, self.leaf_hi], 1).reshape(-1)
        # The 0 at the end: `reduceat` refuses a border one past the last value.
        return np.add.reduceat(np.append(value[self.leaf_number], np.zeros(1, value.dtype)), borders)[::2]

    def count_below(self) -> Ints:
        """[S] trajectories through each segment."""
        return self.leaf_hi - self.leaf_lo if self.ends is None else self.sum_below(np.ones(self.leaf_count, np.int64))

    def leaf_sums(self, value: npt.NDArray) -> npt.NDArray:
        """[L] sum of `value` [S] over each trajectory's segments, in the caller's order of leaves."""
        if self.ends is not None:
            before, leaf = self.course
            return path_sums(before, value)[leaf]
        of_leaf = np.empty(len(self.leaf_number), value.dtype)
        of_leaf[self.leaf_number] = path_sums(self.parent, value)[self.leaf_segment]
        return of_leaf


def _scored(parent_of_node: Ints, length_of_node: Ints, scores: Iterable[float]) -> Floats:
    """[tokens] `scores`, which are the logprobs of the tokens that are not a root's, and 0 for roots."""
    is_scored = np.repeat(parent_of_node >= 0, length_of_node)
    logprobs = np.zeros(len(is_scored))
    logprobs[is_scored] = np.fromiter(scores, np.float64, int(is_scored.sum()))
    return logprobs


def _build(
    *,
    parent_of_node: Ints,
    parts: Parts | None,
    leaves: Ints,
    length_of_node: Ints,
    tokens: Ints,
    logprobs: Floats,
    experts: ExpertIds,
    prompt_of_node: Ints,
    observed_of_node: Bools,
    sharing: Sharing,
) -> Segments:
    """From nodes in any order with parents first: copy, leave out what has no leaf below it, sort.

    `parts`: where turns are hidden. A segment of no tokens is kept: it costs nothing.
    """
    trained_of_node = (parent_of_node >= 0) & ~observed_of_node
    source_of_node = np.cumsum(length_of_node) - length_of_node
    if parts is None:
        copies = copies_of(parent_of_node, parent_of_node, leaves, sharing)
        node = copies.part_of_copy
        length = length_of_node[node]
        source = source_of_node[node]
    else:
        copies = copies_of(parts.context, parts.before, parts.last[leaves], sharing)
        node = parts.node[copies.part_of_copy]
        length = parts.length[copies.part_of_copy]
        source = source_of_node[node] + parts.offset[copies.part_of_copy]
    ends, first_trajectory = (copies.copy_of_leaf, None) if parts is None else ends_of(copies)
    built, copy_of_segment = arrange(
        parent=copies.parent_of_copy,
        leaves=ends,
        length=length,
        source=source,
        node=node,
        trained=trained_of_node[node],
        prompt=prompt_of_node[node],
        tokens=tokens,
        logprobs=logprobs,
        experts=experts,
    )
    if first_trajectory is not None:
        _follow(built, copies, copy_of_segment, first_trajectory)
    return built


def _follow(built: Segments, copies: Copies, copy_of_segment: Ints, first_trajectory: Ints) -> None:
    """Note in `built`, which is laid out by contexts, how trajectories go through it."""
    segment_of_copy = np.full(len(copies.part_of_copy), -1, np.int64)
    segment_of_copy[copy_of_segment] = np.arange(len(copy_of_segment))
    before = copies.before_of_copy[copy_of_segment]
    built.trajectories = Trajectories(
        before=np.where(before >= 0, segment_of_copy[np.maximum(before, 0)], -1),
        leaf=segment_of_copy[copies.copy_of_leaf],
        part=copies.part_of_copy[copy_of_segment],
    )
    leaves = len(copies.copy_of_leaf)
    flat = np.zeros(len(first_trajectory), np.int64)
    built.ends = Ends(first_trajectory, flat, leaves)
    length_of_context = built.position + built.length
    # Where history is rewritten, a context ends and is one to compute.
    leaves_it = (built.trajectories.before != built.parent) & (built.trajectories.before >= 0)
    ended = np.where(leaves_it, length_of_context[np.maximum(built.trajectories.before, 0)], 0)
    flat[:leaves] = built.leaf_sums(ended) + length_of_context[built.trajectories.leaf]


def arrange(
    *,
    parent: Ints,
    leaves: Ints,
    length: Ints,
    source: Ints,
    node: Ints,
    trained: Bools,
    prompt: Ints,
    tokens: Ints,
    logprobs: Floats,
    experts: ExpertIds,
) -> tuple[Segments, Ints]:
    """Pieces in any order with parents first, as segments in their order; and [S] the piece that each one is.

    `leaves` [L]: the piece at which each leaf ends, in the caller's order. `tokens`, `logprobs` and `experts` are what
    `source` points into, the rest is [C], one a piece. Pieces without a leaf below them are left out. Raises
    ValueError for an empty prompt.
    """
    piece, parent_of_segment, segment_of_piece, below = _depth_first(parent, leaves)
    length_of_segment = length[piece]
    is_root = parent_of_segment < 0
    if (empty := length_of_segment[is_root] == 0).any():
        raise ValueError(
            f"the prompt of tree {int(np.flatnonzero(empty)[0])} is empty: nothing predicts its first token"
        )
    segment_of_leaf = segment_of_piece[leaves]
    leaves_before = np.concatenate([[0], np.cumsum(np.bincount(segment_of_leaf, minlength=len(piece)))])
    leaves_before = leaves_before.astype(np.int64)
    leaf_number = np.argsort(segment_of_leaf, kind="stable")
    built = Segments(
        group=np.cumsum(is_root) - 1,
        parent=parent_of_segment,
        below=below,
        source=source[piece],
        length=length_of_segment,
        position=path_sums(parent_of_segment, length_of_segment) - length_of_segment,
        node=node[piece],
        trained=trained[piece],
        leaf_lo=leaves_before[:-1],
        leaf_hi=leaves_before[np.arange(len(piece)) + below],
        leaf_segment=segment_of_leaf[leaf_number],
        leaf_number=leaf_number,
        prompt=prompt[piece[is_root]],
        tokens=tokens,
        logprobs=logprobs,
        experts=experts,
    )
    return built, piece


def _depth_first(parent_of_copy: Ints, copy_of_leaf: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Copies with a leaf below them, in pre-order: ([S] copy, [S] parent, [C] segment of each copy, [S] subtree size).

    A copy without a leaf (its reward was lost) is left out; its segment is -1.
    """
    if not len(copy_of_leaf):
        nothing = np.zeros(0, np.int64)
        return nothing, nothing, nothing, nothing
    by_level = levels(parent_of_copy)
    ends_of_copy = np.bincount(copy_of_leaf, minlength=len(parent_of_copy))
    is_reached = subtree_sums(parent_of_copy, ends_of_copy, by_level) > 0
    by_level = [level[is_reached[level]] for level in by_level]
    size_of_copy = subtree_sums(parent_of_copy, is_reached.astype(np.int64), by_level)
    segment_of_copy = np.where(is_reached, preorder(parent_of_copy, size_of_copy, by_level), -1)
    copy = np.empty(int(is_reached.sum()), np.int64)
    copy[segment_of_copy[is_reached]] = np.flatnonzero(is_reached)
    parent = parent_of_copy[copy]
    return copy, np.where(parent >= 0, segment_of_copy[parent], -1), segment_of_copy, size_of_copy[copy]
