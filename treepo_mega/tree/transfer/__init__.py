"""How a tree spends its budget of leaves: `level.py` level by level, `quota.py` as quotas, `fork.py` at the end.

    transfer = make_transfer(rollout, seed, rng, affordable)
    transfer.begin(width, missing)                   # the root is about to get that many children
    transfer.started(root, children)                 # their segments are on their way
    for parent, width in transfer.arrived(node, tree):      # who may branch, now that this segment is there
        transfer.started(parent, branch(parent, width))
    transfer.started_anew(children, missing)         # at rest: a fallback made these

A transfer decides who branches and how widely. It makes no node, no seed and no want: `tree/search.py` does.
"""

from treepo_mega.tree.transfer.base import Transfer, make_transfer
from treepo_mega.tree.transfer.fork import ForkTransfer
from treepo_mega.tree.transfer.level import LevelTransfer
from treepo_mega.tree.transfer.quota import QuotaTransfer

__all__ = ["ForkTransfer", "LevelTransfer", "QuotaTransfer", "Transfer", "make_transfer"]
