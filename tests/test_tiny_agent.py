"""The agent that ships with the project: its files, its task, and the batches that made it."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from treepo_mega.config import check, load_config
from treepo_mega.data.tasks import hidden_number as task
from treepo_mega.modelspec.mcore_layout import ModelSpec

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "examples" / "tiny_agent"
sys.path.insert(0, str(ROOT / "tools"))

import make_tiny_agent as tool  # noqa: E402


def test_it_is_small_and_its_recipe_fits_two_layouts() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 1.4 * 2**20
    assert (SHIPPED / "model.safetensors").stat().st_size < 2**20
    cfg = load_config(ROOT / "examples" / "agent_cpu.yaml", ["parallel.tensor_model_parallel_size=2"])
    check(cfg, 2, ModelSpec.from_hf(SHIPPED))
    assert cfg.environment.max_turns == task.MAX_ASKS


def test_held_out_problems_are_not_among_the_others() -> None:
    sides = {stem: tool.base.read_rows(SHIPPED / f"{stem}.jsonl") for stem in ("train", "eval")}
    assert {stem: len(rows) for stem, rows in sides.items()} == {"train": tool.TRAIN_ROWS, "eval": tool.EVAL_ROWS}
    bounds = {
        stem: {(row["prompt"].partition("=")[0].rstrip("?"), row["secret"]) for row in rows}
        for stem, rows in sides.items()
    }
    assert not bounds["train"] & bounds["eval"]


def test_the_template_writes_the_episodes_that_it_was_made_on() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    rng = random.Random(3)
    for problem, _ in zip(task.draw(rng, held_out=False), range(50), strict=False):
        turns = task.episode(problem, rng)
        ids, labels = tool.tokens_of(problem, turns)
        messages = [{"role": "user", "content": problem.prompt}]
        for said, answer in turns:
            messages.append({"role": "assistant", "content": said})
            messages += [{"role": "tool", "content": answer}] if answer else []
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        # The last tool's answer is followed by a turn, and a turn by what the template puts before the next.
        assert text.replace("<tool>", "").count("<eos>") == len(turns)
        rendered = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert rendered == ids
        spoken = [token for token in labels if token != -100]
        assert [task.SYMBOLS[token] for token in spoken].count("<eos>") == len(turns)
        for said, _ in turns:
            if said.startswith(task.CALL):
                call = json.loads(said.removeprefix("<tool_call>").removesuffix("</tool_call>"))
                assert call["name"] == "ask" and list(call["arguments"]) == ["number"]


def test_three_way_answers_find_every_number_by_halving() -> None:
    for span in task.SPANS:
        for secret in range(span):
            low, high, asked = 0, span - 1, 0
            while low < high:
                middle = (low + high) // 2
                answer = task.compare(secret, middle)
                asked += 1
                low, high = {"equal": (middle, middle), "less": (low, middle - 1), "more": (middle + 1, high)}[answer]
            assert low == secret and asked <= task.MAX_ASKS
