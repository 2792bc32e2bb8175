"""A reward of your own, and a dataset of your own columns: grade four answers in the worker processes of a run.

    python examples/python/custom_reward.py

The function has verl's signature. A run takes it by path:

    data.verifier=examples/python/custom_reward.py:compute_score

Worker processes import this file. Keep heavy imports inside functions, as `main` does.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

ROWS = [
    {"question": "a6b+7=", "target": "13"},
    {"question": "a60b-9=", "target": "51"},
]
"""A dataset with column names of its own: `data.input_key` and `data.label_key` name them."""

ANSWERS = [
    ("a6b+7=", "b+7=13;\\boxed{13}"),
    ("a6b+7=", "b+7=3;\\boxed{3}"),
    ("a60b-9=", "b-9=52;\\boxed{52}"),
    ("a60b-9=", "I do not know"),
]
"""What a model might write: right, last digit right, wrong, no box at all."""


# --8<-- [start:reward]
def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    """1 for the right number in the last box, 0.25 for a right last digit, else 0.

    A plain float would do. A dict may carry further scalars beside `score`.
    """
    boxes = re.findall(r"\\boxed\{(\d+)\}", solution_str)
    answer = boxes[-1] if boxes else ""
    if answer == ground_truth:
        score = 1.0
    elif answer.endswith(ground_truth[-1]):
        score = 0.25
    else:
        score = 0.0
    return {"score": score, "boxed": float(bool(boxes))}


# --8<-- [end:reward]


def main() -> None:
    """Read the dataset as a run would, grade every answer in a killable process, print the scores."""
    from transformers import AutoTokenizer

    from treepo_mega.config import parse_config
    from treepo_mega.data.prompts import load_prompts
    from treepo_mega.data.rewards import RewardItem, RewardPool

    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "sums.jsonl"
        dataset.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
        cfg = parse_config(
            {
                "model": {"hf_checkpoint": "examples/tiny_reasoner"},
                "data": {
                    "train": [{"path": str(dataset)}],
                    "input_key": "question",
                    "label_key": "target",
                    "verifier": f"{__file__}:compute_score",
                },
            }
        )
        tokenizer = AutoTokenizer.from_pretrained(cfg.model.hf_checkpoint, local_files_only=True)
        prompts = {prompt.text: prompt for prompt in load_prompts(cfg.data.train, cfg.data, tokenizer)}

    items = []
    for question, answer in ANSWERS:
        prompt = prompts[question]
        items.append(RewardItem(prompt.verifier, prompt.data_source, answer, prompt.answer, prompt.extra))
    with RewardPool(cfg.reward) as pool:
        results = pool.score(items)
    for (question, answer), result in zip(ANSWERS, results, strict=True):
        outcome = f"lost: {result.error}" if result.score is None else f"score {result.score:g} {result.extra}"
        print(f"{question:<8} {answer:<20} {outcome}")


if __name__ == "__main__":
    main()
