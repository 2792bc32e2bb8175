"""Write down an unfinished tree, and go on with it later: over ranks, steps and restarts.

    state = dump(search)                     # a JSON-safe dict; the search must be `paused`
    search = load(state, rollout, stop)      # then search.resume(policy_version, rollout)

What is written is everything that later decisions depend on: the tree, its generator, what it waits for and what has
arrived. The stop rules and the configuration are the run's, not the tree's, and are given again.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from treepo_mega.config import RolloutConfig
from treepo_mega.tree.node import Tree
from treepo_mega.tree.search import Segment, TreeSearch, Want
from treepo_mega.tree.stop import StopRules


def dump(search: TreeSearch) -> dict[str, Any]:
    """All that `load` needs, JSON-safe. Raises ValueError for a search that is not paused."""
    if not search.paused:
        raise ValueError(f"prompt {search.tree.prompt_id!r}: only a paused tree can be carried over")
    version, internal, gauss = search._rng.getstate()
    return {
        "tree": search.tree.to_dict(),
        "seed": search._seed,
        "align": search._align,
        "step": search._step,
        "full": search._full,
        "rng": [version, list(internal), gauss],
        "level": list(search._level.items()),
        "arrived": [(i, asdict(s)) for i, s in search._arrived.items()],
        "held": [asdict(w) for w in search._held],
        "quotas": search._quotas.dump() if search._quotas is not None else None,
    }


def load(state: dict[str, Any], rollout: RolloutConfig, stop: StopRules) -> TreeSearch:
    """The search that `dump` wrote down, paused. Raises ValueError when `rollout.transfer` is another one now."""
    tree = Tree.from_dict(state["tree"])
    if (state["quotas"] is not None) != (rollout.transfer == "quota"):
        raise ValueError(
            f"prompt {tree.prompt_id!r} was carried over under another rollout.transfer than {rollout.transfer!r}: "
            "finish the run with the old one, or start from a checkpoint without carried-over trees"
        )
    search = TreeSearch(
        tree.prompt_id, tree.prompt_tokens, rollout, seed=state["seed"], stop=stop, align=state["align"]
    )
    version, internal, gauss = state["rng"]
    search.tree, search._step, search._full, search._new = tree, state["step"], state["full"], []
    search._rng.setstate((version, tuple(internal), gauss))
    search._level = {int(i): n for i, n in state["level"]}
    search._arrived = {int(i): Segment(**s) for i, s in state["arrived"]}
    search._held = [Want(**w) for w in state["held"]]
    if search._quotas is not None:
        search._quotas.load(state["quotas"], tree.nodes)
    return search
