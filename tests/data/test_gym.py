"""reasoning-gym sources, from items to scores, with the real library."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from treepo_mega.config import DataConfig, PromptSource, RewardConfig
from treepo_mega.data.gym import GymError, make_items
from treepo_mega.data.prompts import Prompt, load_prompts
from treepo_mega.data.rewards import RewardItem, RewardPool


class Characters:
    """The part of a tokenizer that plain prompts need."""

    eos_token_id, eos_token, unk_token_id, chat_template = 1, "<eos>", None, None

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in t] for t in texts]}


def item(prompt: Prompt, answer: str, **changes: Any) -> RewardItem:
    return RewardItem(prompt.verifier, prompt.data_source, answer, prompt.answer, {**prompt.extra, **changes})


def test_a_task_from_items_to_scores() -> None:
    params = {"min_terms": 2, "max_terms": 2}
    sources = [
        PromptSource(reasoning_gym="chain_sum", params=params, size=3, seed=7),
        # Its entries hold tuples: scored from their JSON form, a right answer would get 0.05.
        PromptSource(reasoning_gym="arc_agi", size=1),
    ]
    loaded = load_prompts(sources, DataConfig(train=sources, max_prompt_len=20_000, prompt_suffix=" "), Characters())
    assert [p.id for p in loaded] == ["chain_sum:0", "chain_sum:1", "chain_sum:2", "arc_agi:0"]
    assert {p.verifier for p in loaded} == {"reasoning_gym"}
    first = loaded.prompts[0]
    assert first.extra["entry"]["metadata"]["num_terms"] == 2
    wrong = str(int(first.answer) + 1)
    items = [item(p, p.answer) for p in loaded]
    items += [item(first, rf"It is \boxed{{{first.answer}}}."), item(first, f"<answer> {first.answer} </answer>")]
    items += [item(first, rf"\boxed{{{first.answer}}}, no, \boxed{{{wrong}}}"), item(first, "")]
    items += [item(first, first.answer, entry={"question": "another"})]
    items += [RewardItem("reasoning_gym", "x", "1", "1", {})]
    with RewardPool(RewardConfig()) as pool:
        results = pool.score(items)
    assert [r.score for r in results] == [1.0] * 6 + [0.0, 0.0, None, None]
    assert results[6].extra["raw_score"] < 1.0
    assert "is not the prompt's question any more" in str(results[8].error)
    assert "has no reference to its task" in str(results[9].error)


def test_items_do_not_depend_on_the_hash_seed_of_the_rank() -> None:
    code = "from treepo_mega.data.gym import make_items; print(make_items('word_ladder', {}, seed=5, size=3))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_bad_tasks_are_named() -> None:
    unknown = r"reasoning_gym: chain_sums: unknown task 'chain_sums' \(did you mean 'chain_sum'\?\)"
    with pytest.raises(GymError, match=unknown):
        make_items("chain_sums", {}, seed=0, size=1)
    with pytest.raises(GymError, match=r"params \{'min_term': 2\}: .*unexpected keyword argument 'min_term'"):
        make_items("chain_sum", {"min_term": 2}, seed=0, size=1)
