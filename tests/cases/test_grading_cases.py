"""Inputs of people that were graded wrongly or accepted silently: cases 04, 05, 09, 10, 11 and 16, and their kinds."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from treepo_mega.config import DataConfig, RewardConfig
from treepo_mega.data.prompts import PromptSet, load_prompts
from treepo_mega.data.rewards import RewardItem, RewardPool
from treepo_mega.data.rewards.lost import RewardsLostError, report_lost
from treepo_mega.data.rewards.verifiers import load_verifier
from treepo_mega.data.rows import PromptError

GRADES = [
    ("04", "\\boxed{25}", "25\\$", 1),
    ("04", "\\boxed{20\\$}", "20\\$", 1),
    ("04", "\\boxed{26}", "25\\$", 0),
    ("04", "\\boxed{18}", "\\$18", 1),
    ("05", "<answer>42</answer>", "42", 1),
    ("05", "<think>41</think>\n<answer>42</answer>", "42", 1),
    ("05", "So it is 7\n<answer>8</answer>", "7", 0),
    ("05", "<answer> 7 </answer>", "7", 1),
    ("10", "\\boxed{silent}", "listen", 0),
    ("10", "\\boxed{AC}", "CA", 0),
    ("10", "\\boxed{listen}", "listen", 1),
]


class Letters:
    """A tokenizer with a token a character."""

    eos_token_id = eos_token = chat_template = unk_token_id = None

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, Any]:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def load(folder: Path, rows: list[str], **data: Any) -> PromptSet:
    file = folder / "train.jsonl"
    file.write_text("".join(row + "\n" for row in rows))
    cfg = DataConfig(train=[{"path": str(file)}], **data)
    return load_prompts(cfg.train, cfg, Letters())


@pytest.mark.parametrize("case, answer, gold, want", GRADES)
def test_cases_04_05_10_grades(case: str, answer: str, gold: str, want: int) -> None:
    assert load_verifier("math")(data_source=case, solution_str=answer, ground_truth=gold)["score"] == want


def test_case_09_sentinels_are_refused_with_their_lines(tmp_path: Path) -> None:
    rows = [
        '{"problem": "Show it.", "answer": "proof", "solution": "2a+2b"}',
        '{"problem": "Sum?", "answer": "4"}',
        '{"problem": "Find all n.", "answer": "notfound", "solution": "-"}',
    ]
    with pytest.raises(PromptError) as caught:
        load(tmp_path, rows)
    message = str(caught.value)
    assert "train.jsonl, line 1: 'proof' stands for a missing answer" in message
    assert "train.jsonl, line 3: 'notfound'" in message
    assert "cannot grade 2 of 3 truths" in message
    assert "data.label_key" in message
    assert "data.verifier" in message


@pytest.mark.parametrize("verifier", ["math", "boxed", "last_number", "exact"])
@pytest.mark.parametrize(
    "truth", ['"  "', '"\\t"', '"\\u00a0"', "NaN", "Infinity", "-Infinity", '["A", " "]', "[1, NaN]"]
)
def test_case_11_blank_and_non_finite_truths_are_refused_at_load(tmp_path: Path, verifier: str, truth: str) -> None:
    with pytest.raises(PromptError, match=r"train\.jsonl, line 1: .*(data\.label_key)"):
        load(tmp_path, [f'{{"prompt": "a?", "answer": {truth}}}', '{"prompt": "b?", "answer": "2"}'], verifier=verifier)


def test_case_11_what_math_verify_cannot_read_is_refused_at_load(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": "a?", "answer": text}) for text in ("x^2", "}{", "}{")]
    with pytest.raises(PromptError, match=r"line 2: math-verify cannot read it .*line 3: .*cannot grade 2 of 3 truths"):
        load(tmp_path, rows)
    assert len(load(tmp_path, rows, verifier="exact")) == 3


def test_case_16_any_of_several_accepted_answers_counts(tmp_path: Path) -> None:
    rows = [{"prompt": "Pick one.", "answer": ["A", "B"]}, {"prompt": "Half?", "answer": ["0.5", "1/2"]}]
    rows += [{"prompt": "Root?", "answer": [2, -2]}, {"prompt": "Skywork?", "answer": '["\\\\frac{1}{2}"]'}]
    prompts = list(load(tmp_path, [json.dumps(row) for row in rows]))
    responses = [("\\boxed{B}", 1), ("\\boxed{C}", 0)], [("\\boxed{\\frac{1}{2}}", 1), ("\\boxed{0.6}", 0)]
    responses += [("\\boxed{-2}", 1), ("\\boxed{3}", 0)], [("\\boxed{0.5}", 1), ("\\boxed{5}", 0)]
    grade = load_verifier("math")
    for prompt, tries in zip(prompts, responses, strict=True):
        for response, want in tries:
            got = grade(data_source="x", solution_str=response, ground_truth=prompt.answer)["score"]
            assert got == want, (prompt.answer, response)


def test_many_lost_rewards_are_a_warning_and_all_lost_an_error(caplog: pytest.LogCaptureFixture) -> None:
    good = RewardItem("math", "x", "\\boxed{1}", "1")
    bad = RewardItem("math", "x", "\\boxed{1}", "proof")
    with RewardPool(RewardConfig()) as pool, caplog.at_level(logging.WARNING):
        pool.score([good] * 30 + [bad])
        report_lost(pool.take_tally(), "step 1")
        assert caplog.text == "", "one in 31 is a metric only"
        pool.score([good] * 3 + [bad])
        report_lost(pool.take_tally(), "step 2")
        assert "step 2: 1 of 4 rewards were lost: verifier 'math' lost 1, first: ValueError" in caplog.text
        pool.score([bad] * 4)
        with pytest.raises(RewardsLostError, match=r"step 3: 4 of 4 .*'math' lost 4, first: .*'proof'.*data\.verifier"):
            report_lost(pool.take_tally(), "step 3")
        report_lost(pool.take_tally(), "step 4")  # nothing was graded: nothing was lost
