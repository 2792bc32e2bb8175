"""Graded trees as columns, without their tokens: what every rank gets of every tree, 20 to 60 bytes a segment.

    told = to_columns(trees)                 # arrays, for `runtime/packed.py`
    from_columns(told, prompt_ids)           # trees whose tokens are `Elsewhere`

Structure, lengths, stop reasons, grades and counts are exact. Left out is what needs contents: tokens, logprobs,
entropies and peeks. Integers take the fewest bytes that hold them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, compress, islice
from typing import Any

import numpy as np

from treepo_mega.errors import TreepoError
from treepo_mega.tree.alike import Alike
from treepo_mega.tree.elsewhere import Elsewhere
from treepo_mega.tree.history import count_parts
from treepo_mega.tree.node import ForkRule, Node, Tree

FORKS: tuple[ForkRule | None, ...] = (None, "rank", "threshold")
"""Rules of `Node.fork` by their code."""
NO_STOP = -1
"""Code of a node that has no stop reason."""


class ColumnsError(TreepoError):
    """A tree is not what columns can say; the message names its prompt and node."""


def to_columns(trees: Sequence[Tree]) -> dict[str, Any]:
    """What `from_columns` makes trees of. Raises ColumnsError for children that their paths do not order."""
    nodes = list(chain.from_iterable(tree.nodes for tree in trees))
    stops = sorted({node.stop for node in nodes if node.stop is not None})
    code_of_stop = {None: NO_STOP} | {stop: code for code, stop in enumerate(stops)}
    _check_children(trees)
    columns: dict[str, Any] = {
        "nodes": _ints(len(tree.nodes) for tree in trees),
        "parent": _ints(node.parent for node in nodes),
        "place": _ints(node.path[-1] if node.path else 0 for node in nodes),
        "length": _ints(len(node.tokens) for node in nodes),
        "stops": stops,
        "stop": _ints(code_of_stop[node.stop] for node in nodes),
        "fallback": _ints(node.fallback for node in nodes),
        "fork": _ints(FORKS.index(node.fork) for node in nodes),
        "policy_version": _ints(node.policy_version for node in nodes),
        "level": _ints(node.level for node in nodes),
        "leaves": _ints(len(tree.leaves) for tree in trees),
        "leaf": _ints(chain.from_iterable(tree.leaves for tree in trees)),
        "rewards": _floats([tree.rewards for tree in trees]),
        "verdicts": _floats([tree.verdicts for tree in trees]),
        "shortfalls": {str(index): tree.shortfall for index, tree in enumerate(trees) if tree.shortfall is not None},
        "counts": _counts(trees),
    }
    if any(node.weight != 1.0 for node in nodes):
        columns["weight"] = np.array([node.weight for node in nodes])
    if any(node.observation for node in nodes):
        columns["observation"] = _ints(node.observation for node in nodes)
    if any(node.hidden for node in nodes):
        columns["hidden"] = _ints(node.hidden for node in nodes)
        columns["restated"] = _ints(node.restated for node in nodes)
    if all(tree.alike is not None for tree in trees):
        alike = [tree.alike for tree in trees if tree.alike is not None]
        columns["alike"] = {
            "atoms": _ints(chain.from_iterable(one.atoms.tolist() for one in alike)),
            "length": _ints(chain.from_iterable(one.length.tolist() for one in alike)),
            "name": _ints(chain.from_iterable(one.name.tolist() for one in alike)),
        }
    return columns


def from_columns(columns: dict[str, Any], prompt_ids: Sequence[str]) -> list[Tree]:
    """The trees of `to_columns`, of the prompts `prompt_ids`; contents are elsewhere."""
    nodes = _nodes(columns)
    end_of_tree = np.cumsum(columns["nodes"], dtype=np.int64).tolist()
    end_of_leaves = np.cumsum(columns["leaves"], dtype=np.int64).tolist()
    leaves = columns["leaf"].tolist()
    rewards = iter(_rows(columns["rewards"]))
    verdicts = iter(_rows(columns["verdicts"]))
    counts = iter(_counts_of(columns["counts"], len(prompt_ids)))
    trees = []
    first_node = first_leaf = 0
    for index, prompt_id in enumerate(prompt_ids):
        trees.append(
            Tree(
                prompt_id,
                _in_path_order(nodes[first_node : end_of_tree[index]]),
                leaves[first_leaf : end_of_leaves[index]],
                next(rewards),
                columns["shortfalls"].get(str(index)),
                next(counts),
                next(verdicts),
            )
        )
        first_node = end_of_tree[index]
        first_leaf = end_of_leaves[index]
    if "alike" in columns:
        for tree, alike in zip(trees, _alike(columns["alike"], list(map(count_parts, trees))), strict=True):
            tree.alike = alike
    return trees


def _nodes(columns: dict[str, Any]) -> list[Node]:
    """The nodes of all trees."""
    stops = [*columns["stops"], None]  # the last one is that of NO_STOP
    weights = columns["weight"].tolist() if "weight" in columns else [1.0] * len(columns["parent"])
    none = [0] * len(columns["parent"])
    observed = columns["observation"].tolist() if "observation" in columns else none
    hidden_tokens = columns["hidden"].tolist() if "hidden" in columns else none
    restated_tokens = columns["restated"].tolist() if "restated" in columns else none
    nodes: list[Node] = []
    first = 0
    rows = zip(
        columns["parent"].tolist(),
        columns["place"].tolist(),
        columns["length"].tolist(),
        columns["stop"].tolist(),
        columns["fallback"].tolist(),
        columns["fork"].tolist(),
        columns["policy_version"].tolist(),
        columns["level"].tolist(),
        weights,
        observed,
        hidden_tokens,
        restated_tokens,
        strict=True,
    )
    for parent, place, length, stop, fallback, fork, version, level, weight, observation, hidden, restated in rows:
        contents = Elsewhere.of(length)
        if parent < 0:
            first = len(nodes)
            path: tuple[int, ...] = ()
        else:
            up = nodes[first + parent]
            path = (*up.path, place)
            up.children.append(len(nodes) - first)
        nodes.append(
            Node(
                len(nodes) - first,
                parent,
                path,
                contents,
                contents if parent >= 0 else [],
                [],
                stops[stop],
                bool(fallback),
                version,
                [],
                level,
                [],
                FORKS[fork],
                weight,
                bool(observation),
                hidden=hidden,
                restated=restated,
            )
        )
    return nodes


def _in_path_order(nodes: list[Node]) -> list[Node]:
    """The nodes of one tree, the children of each in the order of their paths."""
    for node in nodes:
        # Ids need not follow paths: a fallback adds nodes to what is there.
        if len(node.children) > 1:
            node.children.sort(key=lambda child: nodes[child].path)
    return nodes


def _check_children(trees: Sequence[Tree]) -> None:
    """Raise ColumnsError unless the children of a node are those that name it, in the order of their paths."""
    for tree in trees:
        children: list[list[int]] = [[] for _ in tree.nodes]
        for node in tree.nodes[1:]:
            children[node.parent].append(node.id)
        for node in tree.nodes:
            known = sorted(children[node.id], key=lambda child: tree.nodes[child].path)
            if node.children != known or any(tree.nodes[child].path[:-1] != node.path for child in known):
                raise ColumnsError(
                    f"prompt {tree.prompt_id!r}, node {node.id}: it has the children {node.children}, and the nodes "
                    f"that name it as their parent are {known} in the order of their paths"
                )


def _ints(values: Iterable[Any]) -> np.ndarray:
    """Whole numbers in the fewest bytes that hold them all."""
    whole = np.fromiter(values, np.int64)
    for kind in (np.int8, np.int16, np.int32):
        small = whole.astype(kind)
        if np.array_equal(small, whole):
            return small
    return whole


def _floats(of_trees: Sequence[Sequence[float]]) -> dict[str, np.ndarray]:
    """Ragged rows of numbers."""
    return {
        "size": _ints(map(len, of_trees)),
        "value": np.fromiter(chain.from_iterable(of_trees), np.float64),
    }


def _rows(floats: dict[str, np.ndarray]) -> list[list[float]]:
    """The rows of `_floats`."""
    values = iter(floats["value"].tolist())
    return [list(islice(values, size)) for size in floats["size"].tolist()]


def _counts(trees: Sequence[Tree]) -> dict[str, Any]:
    """The counts of trees as a table; a tree need not have them all."""
    names = sorted({name for tree in trees for name in tree.counts})
    values = [[tree.counts.get(name, 0.0) for name in names] for tree in trees]
    present = [[name in tree.counts for name in names] for tree in trees]
    return {"names": names, "value": np.array(values, np.float64), "present": np.array(present, np.int8)}


def _counts_of(table: dict[str, Any], trees: int) -> list[dict[str, float]]:
    """The counts of each tree of `_counts`."""
    names = table["names"]
    if not names:
        return [{} for _ in range(trees)]
    if table["present"].all():
        return [dict(zip(names, row, strict=True)) for row in table["value"].tolist()]
    rows = zip(table["value"].tolist(), table["present"].tolist(), strict=True)
    return [dict(compress(zip(names, row, strict=True), has)) for row, has in rows]


def _alike(columns: dict[str, np.ndarray], parts_of_tree: Sequence[int]) -> list[Alike]:
    """What was compared of each tree."""
    atoms = columns["atoms"].astype(np.int64)
    end_of_tree = np.cumsum(parts_of_tree, dtype=np.int64)
    atoms_before = np.concatenate([[0], np.cumsum(atoms)])
    length = columns["length"].astype(np.int64)
    name = columns["name"].astype(np.int64)
    found = []
    for begin, end in zip((end_of_tree - parts_of_tree).tolist(), end_of_tree.tolist(), strict=True):
        own = slice(int(atoms_before[begin]), int(atoms_before[end]))
        found.append(Alike(atoms[begin:end], length[own], name[own]))
    return found
