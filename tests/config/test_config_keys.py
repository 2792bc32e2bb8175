"""What a person is told about sampling keys that cannot be used: which key, what was found, what would do."""

from __future__ import annotations

import pytest

from treepo_mega.config import Config, ConfigError, check, load_config, parse_config
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.search import Segment, TreeSearch
from treepo_mega.tree.stop import StopRules


def config(**rollout: object) -> Config:
    """Dotted keys of the section rollout; `debug.` leads to the section debug."""
    raw: dict[str, object] = {
        "model": {"hf_checkpoint": "m"},
        "data": {"train": [{"reasoning_gym": "chain_sum"}], "max_prompt_len": 64},
    }
    for key, value in {"n_samples_per_prompt": 8, "segment.length": 16, "max_response_len": 64, **rollout}.items():
        *sections, name = (key if key.startswith("debug.") else f"rollout.{key}").split(".")
        target: dict = raw
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value
    return parse_config(raw)


def complaint(**rollout: object) -> str:
    with pytest.raises(ConfigError) as error:
        check(config(**rollout), 1)
    return str(error.value)


def test_the_defaults_are_the_papers():
    r = config().rollout
    budget = r.branching.budget
    assert (budget.kind, r.branching.transfer, r.fallback.cut, budget.temperature) == ("equal", "level", "random", 2.0)
    assert check(config(), 1)


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("segment.length", 0, "greater than or equal to 1 (got 0)"),
        ("branching.budget.temperature", 0, "greater than 0 (got 0)"),
        ("branching.budget.kind", "entropie", "'equal', 'low_prob', 'high_prob' or 'entropy' (got 'entropie')"),
        ("branching.transfer", "levels", "'level' or 'quota' (got 'levels')"),
        ("fallback.cut", "lowest", "'random' or 'low_prob' (got 'lowest')"),
    ],
)
def test_an_impossible_value_names_its_key_and_what_was_expected(key, value, says):
    with pytest.raises(ConfigError) as error:
        config(**{key: value})
    assert f"rollout.{key}: " in str(error.value) and says in str(error.value)


def test_initial_branches_must_be_a_range_within_the_width():
    for impossible in ([3, 2], [0, 2]):
        said = complaint(**{"branching.initial": impossible})
        assert f"rollout.branching.initial {impossible}: expected [lo, hi]" in said
    said = complaint(**{"branching.initial": [2, 9]})
    assert "rollout.branching.initial [2, 9] exceeds rollout.n_samples_per_prompt 8" in said
    assert check(config(**{"branching.initial": [2, 8]}), 1)
    assert check(config(**{"branching.initial": [2, 9], "mode": "sequential"}), 1), (
        "sequential sampling has no branches"
    )


@pytest.mark.parametrize(
    "shape, reachable",
    [
        ({"n_samples_per_prompt": 17}, 16),
        ({"n_samples_per_prompt": 16}, None),
        ({"n_samples_per_prompt": 2, "branching.factor": 1}, 1),
        ({"max_response_len": 17}, 4),
        ({"max_response_len": 33}, None),
        ({"max_response_len": 33, "max_depth": 9, "n_samples_per_prompt": 9}, 8),  # the length ends paths first
        ({"branching.initial": [2, 3], "max_response_len": 20}, 6),
        ({"branching.initial": [2, 4], "max_response_len": 20}, None),
    ],
)
@pytest.mark.parametrize("transfer", ["level", "quota"])
def test_a_width_out_of_reach_is_refused_and_the_number_is_the_samplers(shape, reachable, transfer):
    shape = {**shape, "branching.transfer": transfer}
    cfg = config(**{"fallback.from": "none", **shape})
    if reachable is None:
        assert check(cfg, 1)
    else:
        said = complaint(**{"fallback.from": "none", **shape})
        assert (
            f"{reachable} leaves" in said and "rollout.n_samples_per_prompt" in said and "rollout.fallback.from" in said
        )
        assert check(config(**shape), 1), "fallback makes up for it"
    most = max(leaves_without_a_stop(cfg, seed) for seed in range(12))
    assert most == (reachable or cfg.rollout.n_samples_per_prompt)


def leaves_without_a_stop(cfg: Config, seed: int) -> int:
    """Leaves of a tree in which no path ends before its length."""
    stop = StopRules.from_config(cfg.rollout, [0], lambda tokens: " ".join(map(str, tokens)))
    search = TreeSearch("p", [1], cfg.rollout, seed=seed, stop=stop)
    while not search.done:
        for want in search.wants():
            tokens = [1 + derive_seed(want.seed, i) % 9999 for i in range(want.max_tokens)]
            search.take(want.node_id, Segment(tokens, [-1.0] * len(tokens), "length"))
    return len(search.tree.leaves)


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"token_budget": 100, "branching.transfer": "quota"},
            "rollout.token_budget needs rollout.branching.transfer level",
        ),
        ({"token_budget": 3}, "rollout.token_budget 3 is less than one segment (rollout.segment.length 16)"),
        ({"token_budget": 100, "mode": "sequential"}, "rollout.token_budget needs rollout.mode tree"),
        ({"partial_rollout": 8, "mode": "sequential"}, "rollout.partial_rollout needs rollout.mode tree"),
        ({"partial_rollout": 8, "debug.schedule": "level"}, "rollout.partial_rollout needs debug.schedule async"),
        ({"branching.look_alike_tokens": 2}, "no effect with rollout.branching.look_alikes keep"),
        (
            {"branching.look_alikes": "cut", "branching.look_alike_tokens": 17},
            "look_alike_tokens 17 exceeds rollout.segment.length 16",
        ),
        ({"branching.look_alikes": "cut", "branching.at": "fork"}, "look_alikes cut needs rollout.branching.at border"),
        ({"most_leaves": 32}, "rollout.most_leaves 32 has no effect with rollout.leaves fixed"),
        ({"leaves": "adaptive", "most_leaves": 5}, "rollout.most_leaves 5 is below rollout.n_samples_per_prompt"),
        ({"leaves": "adaptive", "first_leaves": 16}, "rollout.first_leaves 16 is not below"),
        ({"leaves": "adaptive", "token_budget": 999}, "adaptive with rollout.token_budget"),
        ({"branching.budget.temperature_end": 1.0}, "has no effect with rollout.branching.budget.kind equal"),
        ({"branching.budget.floor": 0.5}, "budget.floor has no effect with rollout.branching.budget.kind equal"),
        ({"branching.budget.scale": "rank"}, "budget.scale has no effect with rollout.branching.budget.kind equal"),
        (
            {"branching.budget.kind": "entropy", "branching.budget.temperature_end": 1.0},
            "budget.scale share, which has no temperature",
        ),
        (
            {"branching.budget.kind": "entropy", "branching.budget.floor": 1.5},
            "budget.floor 1.5 with rollout.branching.budget.scale share: expected at most 1",
        ),
        (
            {"branching.budget.kind": "high_prob", "branching.budget.floor": 0.1},
            "needs rollout.branching.budget.scale share, rank or zscore",
        ),
        (
            {"segment.end": "newline", "segment.min_length": 17},
            "segment.min_length 17 exceeds rollout.segment.length 16",
        ),
        ({"segment.end": "newline", "debug.segment_alignment": "kv_block"}, "needs rollout.segment.end length"),
        ({"segment.end": []}, "a list names at least one string"),
        ({"segment.end": ["a", ""]}, "none of them is empty"),
        ({"max_depth": 2}, "no path could reach it"),
        (
            {"engine": {"quantization": "fp8_per_channel"}},
            "engine.quantization needs rollout.engine.dtype bf16",
        ),
    ],
)
def test_keys_that_contradict_one_another_are_named(changes, says):
    assert says in complaint(**changes)


@pytest.mark.parametrize("estimator", ["grpo", "segment"])
def test_subgroups_can_only_be_rejected_by_an_estimator_that_has_them(estimator):
    keys = {"model.hf_checkpoint": "m", "data.train": "[{path: t}]", "algo.reject_zero_std_subgroups": "true"}
    overrides = [f"{key}={value}" for key, value in keys.items()]
    assert check(load_config(None, overrides), 1)
    with pytest.raises(ConfigError, match=f"needs algo.advantage_estimator treepo or .*: {estimator} has no subgroups"):
        check(load_config(None, [*overrides, f"algo.advantage_estimator={estimator}"]), 1)


@pytest.mark.parametrize(
    "rollout, says",
    [
        (
            {"branching.transfer": "quota"},
            "rollout.branching.transfer quota has no effect with rollout.branching.at fork",
        ),
        ({"branching.budget.kind": "entropy"}, "rollout.branching.budget.kind entropy has no effect"),
        ({"max_depth": 9}, "rollout.max_depth has no effect"),
        ({"debug.segment_alignment": "kv_block"}, "debug.segment_alignment kv_block has no effect"),
        (
            {"branching.fork.threshold": 0.5, "branching.fork.signal": "logprob"},
            "rollout.branching.fork.threshold needs rollout.branching.fork.signal entropy, which is logprob",
        ),
        (
            {"branching.fork.threshold": 0.5, "token_budget": 512},
            "rollout.branching.fork.threshold with rollout.token_",
        ),
        (
            {"branching.fork.threshold": 0.5, "leaves": "adaptive"},
            "rollout.branching.fork.threshold with rollout.leaves adaptive",
        ),
        (
            {"branching.at": "border", "branching.fork.draw": "other"},
            "rollout.branching.fork.draw has no effect with rollout.branching.at border",
        ),
    ],
)
def test_keys_that_do_not_go_with_forks_are_refused(rollout, says):
    assert says in complaint(**{"branching.at": "fork", **rollout})


def test_forks_go_with_what_is_said_to_go_with_them():
    for rollout in (
        {"fallback.from": "none"},
        {"token_budget": 512},
        {"partial_rollout": 16},
        {"segment.end": "newline"},
    ):
        assert check(config(**{"branching.at": "fork", **rollout}), 1)


def test_descent_wants_forks_that_are_fair_samples():
    cfg = config(**{"branching.at": "fork", "fallback.from": "none"})
    cfg.algo.leaf_weight = "descent"
    with pytest.raises(ConfigError, match=r"leaf_weight descent .* set rollout.branching.fork.threshold"):
        check(cfg, 1)
    cfg.rollout.branching.fork.threshold = 0.5
    assert check(cfg, 1)
