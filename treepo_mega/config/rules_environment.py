"""The rules that join the keys of environments with others; `config.check` applies them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from treepo_mega.text.reward_name import REWARD

if TYPE_CHECKING:
    from treepo_mega.config import Config, RolloutConfig


def check_environment(cfg: Config) -> list[str]:
    """What turns cannot be combined with, as sentences; nothing without an environment but the reward that needs it."""
    name = cfg.data.environment
    if name is None:
        return _check_reward(cfg) + _check_turns_are_wanted(cfg.rollout)
    rollout = cfg.rollout
    bad = _check_turn_segments(cfg) if rollout.mode == "tree" else []

    def refuse(wrong: bool, key: str, value: object, instead: str, why: str) -> None:
        if wrong:
            bad.append(f"data.environment with {key} {value}: {why}; set {key}={instead}")

    refuse(
        rollout.debug.schedule == "level", "debug.schedule", "level", "async",
        "levels have no time at which tools are asked",
    )  # fmt: skip
    refuse(
        not cfg.data.apply_chat_template, "data.apply_chat_template", "false", "true",
        "the chat template writes what stands between two turns",
    )  # fmt: skip
    return bad


def _check_reward(cfg: Config) -> list[str]:
    named = [("data.verifier", cfg.data.verifier)]
    named += [(f"reward.functions.{i}.verifier", part.verifier or "") for i, part in enumerate(cfg.reward.functions)]
    sources = [*enumerate(cfg.data.train), *enumerate(cfg.data.eval)]
    named += [(f"verifier of source {i}", source.verifier or "") for i, source in sources]
    return [
        f"{key} {REWARD} is the reward that an environment gives, and there is none: set data.environment"
        for key, verifier in named
        if verifier == REWARD
    ]


def _check_turns_are_wanted(rollout: RolloutConfig) -> list[str]:
    """Without an environment nothing is answered."""
    bad = []
    if rollout.segment.end == "turn":
        bad.append(
            "rollout.segment.end turn needs data.environment: without one a response is a single turn; use "
            "length, newline or sentence"
        )
    if rollout.branching.after_observation is not None:
        bad.append(
            f"rollout.branching.after_observation {rollout.branching.after_observation} has no effect without "
            "data.environment: nothing is observed; leave it out, or set rollout.branching.factor"
        )
    return bad


def _check_turn_segments(cfg: Config) -> list[str]:
    """Segments that are turns have no length of their own, and enough of them fit on a path."""
    rollout = cfg.rollout
    bad = []
    if rollout.forks and rollout.branching.after_observation is not None:
        bad.append(
            f"rollout.branching.after_observation {rollout.branching.after_observation} has no effect with "
            "rollout.branching.at fork: branches start where the model was uncertain; leave it out, or set "
            "rollout.segment.end=turn to fork after observations only"
        )
    if rollout.segment.end != "turn":
        return bad
    if rollout.token_budget is not None:
        bad.append(
            f"rollout.token_budget {rollout.token_budget} with rollout.segment.end turn: nobody knows what the next "
            "segment will cost; set rollout.segment.end=length, or rollout.n_samples_per_prompt alone"
        )
    if rollout.debug.segment_alignment == "kv_block":
        bad.append("debug.segment_alignment kv_block needs rollout.segment.end length: turns end where they end")
    branching = rollout.branching
    first = branching.factor if branching.initial is None else branching.initial[1]
    answered = cfg.environment.max_turns if rollout.max_depth is None else rollout.max_depth - 1
    # Bounded exponent: past 2**64 leaves the answer is the same.
    reachable = first * branching.width(observed=True) ** min(answered, 64)
    if rollout.fallback.from_ == "none" and reachable < rollout.leaves_at_most and not rollout.forks:
        bad.append(
            f"rollout.n_samples_per_prompt: {rollout.leaves_at_most} leaves are out of reach with "
            f"rollout.fallback.from none and rollout.segment.end turn: {first} branches at the prompt and "
            f"{branching.width(observed=True)} after each of {answered} observations give {reachable}; raise "
            "rollout.branching.after_observation"
        )
    return bad
