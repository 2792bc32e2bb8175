"""Which parts of a tree's nodes say the same, without the tokens: a few numbers a segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Alike:
    """What `tree/merge.py` needs of a tree or a forest whose tokens are elsewhere.

    An *atom* is a run of a node's tokens that equal paths have in common as a whole. Nodes in the order of the tree,
    and the atoms of a node one after the other. Nodes without a leaf below them have none. Where a context ends within
    a node, the parts of nodes are meant (`tree/history.py`).
    """

    atoms: npt.NDArray[np.int64]
    """[nodes, or their parts] how many each has."""
    length: npt.NDArray[np.int64]
    """[A] tokens of each atom."""
    name: npt.NDArray[np.int64]
    """[A] equal for equal prefixes of one tree, unlike for others; 0, 1, ..."""

    @classmethod
    def joined(cls, of_trees: Sequence[Alike]) -> Alike:
        """One for a forest, of those of its trees in order."""
        names = [int(one.name.max(initial=-1)) + 1 for one in of_trees]
        base = np.repeat(np.cumsum([0, *names])[:-1], [len(one.name) for one in of_trees])
        return cls(
            atoms=_joined([one.atoms for one in of_trees]),
            length=_joined([one.length for one in of_trees]),
            name=_joined([one.name for one in of_trees]) + base,
        )


def _joined(parts: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *parts])
