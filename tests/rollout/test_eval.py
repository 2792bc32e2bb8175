"""Evaluation metrics by hand on crafted samples, and once through the real engine and the real graders."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.rollout.conftest import config
from tests.rollouts import rollout_config
from treepo_mega.config import RewardConfig
from treepo_mega.data.prompts import Prompt
from treepo_mega.data.rewards import RewardPool
from treepo_mega.engine.engine import Engine
from treepo_mega.rollout.eval import EvaluationError, Evaluator, Graded, grade, metrics
from treepo_mega.rollout.generator import Generator
from treepo_mega.tree.node import ROOT, Tree


def tree(stops: list[str], length: int = 3) -> Tree:
    out = Tree.start("p", [1])
    for stop in stops:
        node = out.add_child(ROOT)
        node.tokens, node.logprobs, node.stop = [5] * length, [0.0] * length, stop
        out.leaves.append(node.id)
    return out


def test_metrics_by_hand():
    texts = [["\\boxed{4}", "so \\boxed{ 4 }", "\\boxed{5}"], ["7", "8", "9"], ["x\n1", "y\n1", "2"]]
    scores = [[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [None, None, 1.0]]
    trees = [tree(["answer"] * 3), tree(["eos", "length", "depth"]), tree(["eos"] * 3, length=6)]
    m = metrics([grade(*row) for row in zip(trees, texts, scores, strict=True)], 3)
    assert m["avg@3"] == pytest.approx(4 / 7), "lost samples are left out"
    assert m["pass@3"] == 1.0
    assert m["maj@3"] == pytest.approx(1 / 3), "4 is right; 7 wins the tie; 1 was lost"
    assert (m["prompts"], m["samples"], m["graded"], m["lost"]) == (3, 9, 7, 2)
    assert m["response_len"] == pytest.approx(4) and m["truncated"] == pytest.approx(2 / 9)


def test_what_a_rank_tells_is_json_and_no_prompts_have_no_score():
    told = json.loads(json.dumps(asdict(grade(tree(["eos", "length"], 9), ["7", "8"], [0.0, None]))))
    m = metrics([Graded(**told)], 2)
    assert (m["avg@2"], m["lost"], m["truncated"], m["response_len"]) == (0.0, 1, 0.5, 9)
    assert metrics([], 2)["avg@2"] == metrics([], 2)["pass@2"] == 0.0


def test_through_the_engine_and_the_graders(engine: Engine, tiny_llama: Path):
    cfg = config(tiny_llama)
    cfg.rollout = rollout_config(cfg.rollout, n_samples_per_prompt=4, max_response_len=24, segment__length=8)
    engine.reset_prefix_cache()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    generator = Generator(engine, cfg, tokenizer)
    greedy = cfg.rollout.model_copy(update={"mode": "sequential", "n_samples_per_prompt": 1})
    made = [Prompt(f"p{k}", t, tokenizer.encode(t), "?", "exact", "test") for k, t in enumerate(("1+2=", "3+4="))]
    trees = generator.rollout(made, step=0, rollout=greedy, temperature=0.0)
    said = generator.decode(trees[0].response(trees[0].leaves[0]))
    known = [Prompt(p.id, p.text, p.tokens, said, p.verifier, p.data_source) for p in made]
    with RewardPool(RewardConfig()) as pool:
        evaluator = Evaluator(generator, pool, cfg)
        m = evaluator.evaluate(known, temperature=0.0, n=1, step=5)
        none = evaluator.evaluate([], temperature=1.0, n=4, step=5)
        four = evaluator.evaluate(known, temperature=1.0, n=4, step=5)
        again = evaluator.evaluate(known, temperature=1.0, n=4, step=5)
    assert m["avg@1"] == m["pass@1"] == m["maj@1"] == 0.5, "right on the prompt whose greedy answer was taken"
    assert none["samples"] == 0 and (four["samples"], four["graded"]) == (8, 8)
    told = ("forwarded_tokens", "idle_share_max")  # the second time the prompts are cached
    assert {k: v for k, v in four.items() if k not in told} == {k: v for k, v in again.items() if k not in told}
    with pytest.raises(EvaluationError, match="greedy"):
        evaluator.evaluate(known, temperature=0.0, n=4, step=5)
