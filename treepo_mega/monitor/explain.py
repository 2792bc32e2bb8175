"""Why a step changed no weights, as a line for the console. Pure."""

from __future__ import annotations

from collections.abc import Mapping


def why_nothing(metrics: Mapping[str, float]) -> str:
    """Why a step has nothing to train on, by its metrics.

    >>> counts = {"rollout/prompts_dropped_zero_std": 0, "rollout/trees_carried_over": 4}
    >>> why_nothing(counts)
    'no tree was finished, 4 go on in the next step (rollout.partial_rollout)'
    >>> why_nothing(counts | {"rollout/prompts_dropped_zero_std": 2, "rollout/trees_carried_over": 0})
    'no prompt had differing rewards, nothing to learn from'
    """
    dropped = int(metrics["rollout/prompts_dropped_zero_std"])
    carried = int(metrics["rollout/trees_carried_over"])
    if not carried:
        return "no prompt had differing rewards, nothing to learn from"
    finished = f"none of {dropped} finished prompts had differing rewards" if dropped else "no tree was finished"
    return f"{finished}, {carried} go on in the next step (rollout.partial_rollout)"


def why_rejected(metrics: Mapping[str, float]) -> str:
    """Why every trajectory of a step was left out.

    >>> why_rejected({"rollout/leaves_rejected": 8.0})
    'all 8 trajectories were rejected, because engine and trainer are too far apart (algo.rollout_rs, \
algo.rollout_token_veto_threshold)'
    """
    rejected = int(metrics["rollout/leaves_rejected"])
    return (
        f"all {rejected} trajectories were rejected, because engine and trainer are too far apart (algo.rollout_rs, "
        "algo.rollout_token_veto_threshold)"
    )
