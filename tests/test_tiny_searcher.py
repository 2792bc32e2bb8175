"""The search model that ships with the project: its files, how undecided it is, and the batches that made it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from treepo_mega.config import check, load_config
from treepo_mega.data.tasks import countdown as task
from treepo_mega.modelspec.mcore_layout import ModelSpec

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "examples" / "tiny_searcher"
sys.path.insert(0, str(ROOT / "tools"))

import make_tiny_searcher as tool  # noqa: E402


def rows(stem: str) -> list[dict[str, str]]:
    """The problems of a shipped prompt file."""
    return tool.base.read_rows(SHIPPED / f"{stem}.jsonl")


def problem_of(row: dict[str, str]) -> task.Countdown:
    """The problem that a row's truth states."""
    return task.Countdown(*task.parse_truth(row["answer"]))


def test_it_is_small_and_its_recipe_fits_two_layouts() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 1.4 * 2**20
    assert (SHIPPED / "model.safetensors").stat().st_size < 2**20
    spec = ModelSpec.from_hf(SHIPPED)
    cfg = load_config(ROOT / "examples" / "countdown_cpu.yaml", ["parallel.tensor_model_parallel_size=2"])
    check(cfg, 2, spec)
    assert cfg.rollout.max_response_len == task.RESPONSE_TOKENS
    assert cfg.data.max_prompt_len == 1 + task.PROMPT_TOKENS


def test_held_out_problems_are_in_no_order_of_numbers_among_the_others() -> None:
    sides = {stem: [problem_of(row) for row in rows(stem)] for stem in ("train", "eval")}
    assert all(row["prompt"] == f"{row['answer']}:" for row in rows("train") + rows("eval"))
    assert {stem: len(side) for stem, side in sides.items()} == {"train": tool.TRAIN_ROWS, "eval": tool.EVAL_ROWS}
    assert not any(task.is_held_out(each) for each in sides["train"])
    assert all(task.is_held_out(each) for each in sides["eval"])
    assert all(task.CHANCE[0] <= task.chance(each) <= task.CHANCE[1] for each in sides["train"] + sides["eval"])


def test_the_tokenizer_has_one_token_a_number_and_gives_the_text_back() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    text = "3,8,5,2>29:8-3=5*5=25+2=27;3*8=24+5=29"
    ids = tokenizer(text)["input_ids"]
    assert ids == [tool.base.BOS, *tool.encode(text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == tool.base.EOS


def test_it_explores_and_rarely_succeeds() -> None:
    judge = tool.Judge(SHIPPED, seed=1)
    found = judge.exploring(rows("eval")[:24])
    stored = json.loads((SHIPPED / "report.json").read_text())
    # 384 responses: the standard error of `mixed` is 0.07.
    assert stored["exploring"]["nats_at_choices"] >= 0.3
    assert found["nats_at_choices"] == pytest.approx(stored["exploring"]["nats_at_choices"], abs=0.1)
    assert found["mixed"] == pytest.approx(stored["exploring"]["mixed"], abs=0.25)
    assert found["distinct"] == pytest.approx(stored["exploring"]["distinct"], abs=0.1)
    assert found["response_tokens"] > 40
    assert 0.08 <= stored["accuracy"]["sampled"] <= 0.22


def test_what_counts_as_a_right_step() -> None:
    assert tool.is_right(["8", "*", "3", "=", "24"])
    assert not tool.is_right(["8", "*", "3", "=", "25"])
    assert not tool.is_right(["8", "=", "3", "*", "24"])
    assert not tool.is_right(["8", "*", ";", "=", "24"])


def test_traces_are_short_first_and_never_of_held_out_problems() -> None:
    for step, count in ((1, tool.SHORT_BATCH), (tool.SHORT_STEPS + 1, tool.LONG_BATCH)):
        batch = tool.supervised_batch(step, seed=0)
        assert len(batch) == count and batch == tool.supervised_batch(step, seed=0)
        for tokens, _ in batch:
            prompt = "".join(task.SYMBOLS[token] for token in tokens[1:])
            assert not task.is_held_out(task.Countdown(*task.parse_truth(prompt.removesuffix(":"))))
    short = tool.supervised_batch(1, seed=0)
    assert max(len(response) for _, response in short) == 4 * task.COUNT - 2
    ends = {task.SYMBOLS[response[-1]] for _, response in short}
    assert ends == {";", "<eos>"}, "a failed attempt is not the end"


def test_a_run_that_would_never_see_whole_traces_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.parse_args(["--out", "x", "--steps", str(tool.SHORT_STEPS)])
    assert f"--steps must be more than {tool.SHORT_STEPS}" in capsys.readouterr().err
