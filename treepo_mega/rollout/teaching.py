"""What a step learns from a graded tree: the one place where signal is decided. Pure.

    teaches = judge(tree, cfg, step=7)       # where the tree was graded; travels with it in its row
    trained = counted(tree, cfg)             # the tree as it is trained on

A prompt whose rewards (or verdicts: `rollout.filter_metric`) are all equal has no signal (DAPO's dynamic sampling), or
a plug-in says which trees have any. Both look at the leaves that count alone: `algo.leaf_weight`,
`algo.mask_truncated_samples`.
"""

from __future__ import annotations

from dataclasses import dataclass

from treepo_mega.config import Config
from treepo_mega.plugins import plugin_keeps
from treepo_mega.rollout.shaping import without_cut
from treepo_mega.text.function_path import is_function_path
from treepo_mega.tree.advantage import has_signal
from treepo_mega.tree.descent import fair_leaves
from treepo_mega.tree.node import Tree


@dataclass(frozen=True, slots=True)
class Teaches:
    """What a graded tree is good for. `trains`: the step keeps it; `differs`: its rewards do."""

    trains: bool
    differs: bool


def counted(tree: Tree, cfg: Config) -> Tree:
    """The tree with the leaves alone that count; it may have none."""
    if cfg.algo.leaf_weight == "descent":
        tree = fair_leaves(tree)
    return without_cut(tree) if cfg.algo.mask_truncated_samples else tree


def judge(tree: Tree, cfg: Config, *, step: int) -> Teaches:
    """Whether the step trains on a graded tree. Raises PluginError for what a filter plug-in says."""
    tree = counted(tree, cfg)
    if not tree.leaves:
        return Teaches(trains=False, differs=False)
    differs = _differs(tree, cfg, step)
    return Teaches(trains=differs or not cfg.rollout.dynamic_sampling, differs=differs)


def _differs(tree: Tree, cfg: Config, step: int) -> bool:
    """Whether a tree with leaves has signal, by rollout.filter_metric."""
    metric = cfg.rollout.filter_metric
    if is_function_path(metric):
        return plugin_keeps(metric, tree, step=step)
    return len(set(tree.verdicts)) > 1 if metric == "acc" else has_signal(tree)
