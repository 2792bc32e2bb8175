"""The `env/` metrics of a step, and the sums over engines that they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treepo_mega.rollout.turns import SUMS
from treepo_mega.tree.node import Tree


def of_turns(counts: Mapping[str, float]) -> dict[str, float]:
    """Of a generator's counts, those of `TurnsInFlight.sums`; nothing without an environment."""
    return {name: counts[name] for name in SUMS if name in counts}


def turn_metrics(trees: Sequence[Tree], counts: Mapping[str, float], totals: Mapping[str, float]) -> dict[str, float]:
    """Of the trees of a step, their summed `counts`, and the summed counts of engines; nothing without an environment.

    A call that several trajectories of a tree have in common was made once, and counts once.
    """
    if "env_answers" not in totals:
        return {}
    leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves]
    answers = max(1.0, totals["env_answers"])
    calls = max(1.0, counts.get("tool_calls", 0.0))
    return {
        "env/turns": sum(tree.turns(leaf) for tree, leaf in leaves) / max(1, len(leaves)),
        "env/observation_tokens": sum(tree.observed_length(leaf) for tree, leaf in leaves) / max(1, len(leaves)),
        "env/hidden_tokens": sum(map(_hidden, leaves)) / max(1, len(leaves)),
        "env/tool_calls": counts.get("tool_calls", 0.0),
        "env/tool_errors": counts.get("tool_errors", 0.0) / calls,
        "env/latency_s": totals["env_s"] / answers,
        "env/wait_share": totals["env_wait_s"] / max(1e-9, totals["engine_s"]),
        "env/state_copies": totals["env_copies"],
        "env/state_replays": totals["env_replays"],
        "env/worker_restarts": totals["env_restarts"],
        "env/lost": totals["env_lost"],
        "tree/stop_context": counts["stop/context"],
        "tree/stop_lost": counts["stop/lost"],
    }


def _hidden(leaf: tuple[Tree, int]) -> int:
    """Tokens of a trajectory that a chat template hid from its later turns."""
    tree, node_id = leaf
    return sum(tree.nodes[node].hidden for node in tree.ancestry(node_id))
