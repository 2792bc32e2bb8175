"""Named settings: `preset: treepo_paper` stands for the keys below it, and every key that is written wins over it.

    preset: fair_trees
    algo: {advantage_estimator: grpo}      # instead of the preset's rloo

A preset says how to sample, to give credit and to train. Model, data, layout and run directory stay yours. The resolved
configuration (`--dry-run`, config.yaml of a run) shows each key with the value that the preset gave it. Pure data and
one function over plain dicts.
"""

from __future__ import annotations

import copy
from typing import Any

TREEPO_PAPER: dict[str, Any] = {
    "data": {"max_prompt_len": 1024},
    "rollout": {
        "mode": "tree",
        "rollout_batch_size": 512,
        "n_samples_per_prompt": 16,
        "temperature": 1.0,
        "max_response_len": 7168,
        "max_depth": 14,
        "segment": {"length": 512},
        "branching": {"at": "border", "factor": 2, "initial": [2, 8], "transfer": "level", "budget": {"kind": "equal"}},
        "fallback": {"from": "finished", "cut": "random"},
        "dynamic_sampling": True,
        "filter_metric": "acc",
        "oversample": 3.0,
        "max_refills": 9,
        "allow_smaller_batch": False,
        "stop": {"answer_box": False, "repetition_window": 32, "repetition_count": 8},
    },
    "reward": {"on_lost": 0.0, "overlong": {"buffer_len": 512, "penalty": 0.5}},
    "algo": {
        "advantage_estimator": "treepo",
        "leaf_weight": "uniform",
        "whiten_advantages": True,
        "eps_clip": 0.2,
        "eps_clip_high": 0.28,
        "eps_clip_c": 10.0,
        "kl_loss_coef": 0.0,
        "entropy_coef": 0.0,
        "loss_agg_mode": "token-mean",
        "use_tis": False,
    },
    "train": {
        "num_steps_per_rollout": 16,
        # Twice the longest trajectory; the default would not hold one.
        "max_tokens_per_gpu": 16384,
        "lr": 1e-6,
        "lr_warmup_iters": 10,
        "lr_decay_style": "constant",
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "clip_grad": 1.0,
    },
}
"""Li et al., 2025, as their training script and the paper have it; examples/qwen25_7b_treepo.yaml lists deviations."""

FAIR_TREES: dict[str, Any] = {
    "rollout": {
        "mode": "tree",
        "branching": {"at": "border", "factor": 2, "transfer": "level", "budget": {"kind": "equal"}},
        # Leaves that fallback makes are no fair sample: how often a path is cut depends on how it ended.
        "fallback": {"from": "none"},
    },
    "algo": {"advantage_estimator": "rloo", "leaf_weight": "descent", "whiten_advantages": False},
    "train": {"prefix_sharing": "content"},
}
"""The gradient of the policy itself (docs/benchmarks.md, estimators): leaves count by their descent."""

ENTROPY_TREES: dict[str, Any] = {
    "rollout": {
        "mode": "tree",
        "branching": {
            "at": "border",
            "factor": 2,
            "initial": [4, 4],
            "transfer": "level",
            # Leaves go where the policy is about as uncertain as elsewhere in the tree, or more.
            "budget": {"kind": "entropy", "floor": 0.5},
        },
        "fallback": {"from": "none"},
        # Fewer engine steps for the same trees: what is left over trains a step later.
        "oversample": 1.5,
        "surplus": "carry",
    },
    "algo": {"advantage_estimator": "rloo", "leaf_weight": "descent", "whiten_advantages": True},
    "train": {"prefix_sharing": "content"},
}
"""What reached the highest accuracy for its tokens in docs/evidence.md (`entropy4-carry24`, with half more prompts)."""

PRESETS: dict[str, dict[str, Any]] = {
    "treepo_paper": TREEPO_PAPER,
    "fair_trees": FAIR_TREES,
    "entropy_trees": ENTROPY_TREES,
}


def expand_preset(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` over the keys of the preset that it names, sections joined; `raw` itself without a known preset.

    An unknown name stays, for the validation of the key to refuse it.
    """
    name = raw.get("preset")
    if not isinstance(name, str) or name not in PRESETS:
        return raw
    return _over(copy.deepcopy(PRESETS[name]), raw)


def _over(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `under`: mappings are joined, any other value replaces the one below."""
    for key, value in over.items():
        below = under.get(key)
        under[key] = _over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return under
