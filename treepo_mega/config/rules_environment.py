"""The rules that join the keys of environments with others; `config.check` applies them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from treepo_mega.text.reward_name import REWARD

if TYPE_CHECKING:
    from treepo_mega.config import Config


def check_environment(cfg: Config) -> list[str]:
    """What turns cannot be combined with, as sentences; nothing without an environment but the reward that needs it."""
    name = cfg.data.environment
    if name is None:
        return _check_reward(cfg)
    rollout = cfg.rollout
    bad = []

    def refuse(wrong: bool, key: str, value: object, instead: str, why: str) -> None:
        if wrong:
            bad.append(f"data.environment with {key} {value}: {why}; set {key}={instead}")

    refuse(
        rollout.partial_rollout is not None, "rollout.partial_rollout", rollout.partial_rollout, "null",
        "a state of an environment does not outlive its step",
    )  # fmt: skip
    refuse(
        rollout.leaves == "adaptive", "rollout.leaves", "adaptive", "fixed",
        "trees grow on after their states are gone",
    )  # fmt: skip
    refuse(
        rollout.forks, "rollout.branching.at", rollout.branching.at, "border",
        "branches begin within turns whose end their tools were asked for",
    )  # fmt: skip
    refuse(
        rollout.engine.tensor_parallel_size > 1, "rollout.engine.tensor_parallel_size",
        rollout.engine.tensor_parallel_size, "1", "each rank of an engine would ask tools of its own",
    )  # fmt: skip
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
