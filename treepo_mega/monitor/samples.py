"""A step's trees as distributions and as texts, for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

from treepo_mega.monitor.completions import BRANCH, Decode, choose, credit, marked_pieces, printable
from treepo_mega.tree.elsewhere import is_here
from treepo_mega.tree.node import Tree


def distributions(trees: Sequence[Tree]) -> dict[str, list[float]]:
    """Advantages (a leaf, or a node where the estimator gives those), rewards and response lengths of all leaves."""
    lengths = [float(tree.response_length(leaf)) for tree in trees for leaf in tree.leaves]
    return {
        "histograms/advantages": [value for tree in trees for value in tree.advantages],
        "histograms/rewards": [value for tree in trees for value in tree.rewards],
        "histograms/response_lengths": lengths,
    }


def texts(trees: Sequence[Tree], count: int, decode: Decode) -> list[str]:
    """At most `count` leaves in words: best and worst of a prompt first, of trees whose tokens are on this rank.

    Segments begin on lines of their own. What the model wrote is one line a segment, without control characters.
    """
    here = [tree for tree in trees if all(is_here(node.tokens) for node in tree.nodes)]
    out = []
    for tree, index in choose(here, count):
        leaf = tree.leaves[index]
        head = f"reward {tree.rewards[index]:.3g}, advantage {credit(tree, index)}, stop {tree.nodes[leaf].stop}"
        parts = [
            f"{BRANCH if branches else '|'} {printable(piece)}" for branches, piece in marked_pieces(tree, leaf, decode)
        ]
        out.append("\n".join([f"{tree.prompt_id}: {head}", printable(decode(tree.prompt_tokens)), *parts]))
    return out
