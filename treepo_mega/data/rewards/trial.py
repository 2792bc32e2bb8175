"""Reward functions of people's own, and servers, at the start: each grades an example answer, before engines are built.

    for line in try_rewards(pool, reward, prompts): print(line)

The answer is the truth of the first prompt in a box. A function that returns no reward is an error; one that raises is
a line, for it may be meant to refuse such an answer. A server has to answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from treepo_mega.data.rewards.items import RewardItem, Trajectory
from treepo_mega.data.rewards.pool import RewardPool
from treepo_mega.data.rewards.verifiers import VerifierError
from treepo_mega.text.function_path import is_function_path
from treepo_mega.text.reward_name import REWARD
from treepo_mega.text.server_name import server_of

if TYPE_CHECKING:
    from treepo_mega.config import RewardConfig
    from treepo_mega.data.prompts import Prompt


def verifiers_of(reward: RewardConfig, prompts: Iterable[Prompt]) -> list[str]:
    """The graders of `prompts`: those of `reward.functions`, else the prompts' own; each once."""
    used = [part.verifier or prompt.verifier for prompt in prompts for part in reward.functions]
    named = dict.fromkeys(used if reward.functions else (prompt.verifier for prompt in prompts))
    # No grader has the environment's own.
    return [name for name in named if name != REWARD]


def try_rewards(pool: RewardPool, reward: RewardConfig, prompts: Iterable[Prompt]) -> list[str]:
    """Lines for people. Raises VerifierError for a function that cannot be loaded, or returns what is no reward."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        for name in [part.verifier or prompt.verifier for part in reward.functions] or [prompt.verifier]:
            first.setdefault(name, prompt)
    items = [
        example_answer(name, prompt)
        for name, prompt in first.items()
        if is_function_path(name) or server_of(name) is not None
    ]
    notes = []
    for item, result in zip(items, pool.score(items) if items else (), strict=True):
        if result.score is not None:
            continue
        case = f"on the example answer {item.solution_str[:80]!r} to prompt {first[item.verifier].id!r}"
        # A server that does not answer now would lose a whole step; a function may be meant to refuse such an answer.
        if result.wrong_return or server_of(item.verifier) is not None:
            raise VerifierError(f"verifier {item.verifier!r} {case}: {result.error}")
        notes.append(f"verifier {item.verifier!r} {case}: {result.error}; such answers are lost (reward.on_lost)")
    # No step has these: they must not count as its rewards.
    pool.take_tally()
    pool.take_costs()
    return notes


def example_answer(verifier: str, prompt: Prompt) -> RewardItem:
    """The truth of `prompt` in a box, as if it had been sampled."""
    text = f"\\boxed{{{prompt.answer}}}"
    shown = Trajectory(prompt_id=prompt.id, tokens=len(text), stop="eos", turns=0, segments=1, fallback=False)
    return RewardItem(verifier, prompt.data_source, text, prompt.answer, prompt.extra, shown, prompt.text)
