"""Trees from the real engine: what each segment was conditioned on, seeds, schedules, deadlines, distribution."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from treepo_mega.config import Config, RolloutConfig, parse_config
from treepo_mega.rollout.engine import Engine
from treepo_mega.rollout.generator import Generator
from treepo_mega.tree.node import Tree

BLOCK = 32


@dataclass(frozen=True)
class FakePrompt:
    """What a rollout reads of a `data.prompts.Prompt`."""

    id: str
    tokens: list[int]
    data_source: str = "test"


def config(hf: Path) -> Config:
    raw = {
        "model": {"hf_checkpoint": str(hf)},
        "data": {"train": [{"reasoning_gym": "chain_sum"}], "max_prompt_len": 64},
        "rollout": {
            "n_samples_per_prompt": 8,
            "max_response_len": 64,
            "segment_length": 16,
            "engine": {"max_num_batched_tokens": 1024, "block_size": BLOCK},
        },
    }
    return parse_config(raw)


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, keep_alive: list[object]) -> Engine:
    made = Engine(tiny_llama, config(tiny_llama))
    keep_alive.append(made)
    return made


@pytest.fixture
def generator(engine: Engine, tiny_llama: Path) -> Generator:
    return Generator(engine, config(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama))


def prompts(n: int, length: int = 33) -> list[FakePrompt]:
    rng = random.Random(5)
    return [FakePrompt(f"p{k}", [rng.randrange(3, 54) for _ in range(length)]) for k in range(n)]


def change(generator: Generator, **fields: object) -> RolloutConfig:
    return generator.cfg.rollout.model_copy(update=fields)


def tokens(trees: list[Tree]) -> list[list[tuple[tuple[int, ...], list[int], str | None]]]:
    return [[(n.path, n.tokens, n.stop) for n in t.nodes] for t in trees]


def test_every_segment_has_the_logprobs_of_its_own_path(generator, tiny_llama):
    """transformers is asked about every recorded path: a segment sampled after another prefix would not agree."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    generator.eos_token_ids = list(range(2, 9))  # many paths end early
    trees = generator.rollout(prompts(4), step=0)
    assert any(n.fallback for t in trees for n in t.nodes), "the case that is easy to get wrong has to occur"
    for tree, prompt in zip(trees, prompts(4), strict=True):
        assert (tree.prompt_id, tree.prompt_tokens) == (prompt.id, prompt.tokens)
        assert len(tree.leaves) == 8 and tree.shortfall is None
        for leaf in tree.leaves:
            path = tree.prefix(leaf)
            with torch.no_grad():
                table = model(torch.tensor([path])).logits[0, :-1].double().log_softmax(-1)
            want = table.gather(1, torch.tensor(path[1:])[:, None])[len(prompt.tokens) - 1 :, 0]
            assert np.abs(want.numpy() - np.array(tree.response_logprobs(leaf))).max() <= 1e-4


def test_counts_add_up(generator):
    trees = generator.rollout(prompts(3), step=0)
    c = generator.counts
    nodes = [n for t in trees for n in t.nodes[1:]]
    assert (c["prompts"], c["leaves"], c["trees_short"]) == (3, 24, 0)
    assert c["segments"] == len(nodes)
    assert c["generated_tokens"] - c["dropped_tokens"] == sum(len(n.tokens) for n in nodes)
    submitted = sum(len(t.prefix(n.parent)) for t in trees for n in t.nodes[1:])
    assert c["cached_tokens"] + c["recomputed_tokens"] == submitted
    assert c["cached_tokens"] > 0.4 * submitted and c["cached_tokens"] % BLOCK == 0
    assert sum(c[f"stop/{s}"] for s in ("eos", "answer", "length", "depth", "repetition")) == 24
    assert c["token_ratio"] == c["unique_tokens"] / c["flat_tokens"] < 1
    assert c["engine_steps"] > 0 and c["seconds"] > 0


def test_trees_depend_on_the_seed_and_not_on_the_company(generator):
    together = generator.rollout(prompts(4), step=3)
    assert tokens(together) == tokens(generator.rollout(prompts(4), step=3))
    apart = [generator.rollout([p], step=3)[0] for p in reversed(prompts(4))][::-1]
    assert tokens(apart) == tokens(together), "as if dealt over four ranks, in another order"
    assert tokens(generator.rollout(prompts(4), step=4)) != tokens(together)
    assert tokens(generator.rollout(prompts(4), step=3, purpose="eval")) != tokens(together)


def test_sequential_mode_is_independent_samples_through_the_same_path(generator):
    trees = generator.rollout(prompts(2), step=0, rollout=change(generator, mode="sequential"), policy_version=4)
    for tree in trees:
        assert tree.nodes[0].children == tree.leaves == list(range(1, 9))
        assert {tree.nodes[i].stop for i in tree.leaves} <= {"eos", "answer", "length"}
        assert {n.policy_version for n in tree.nodes[1:]} == {4}
    assert generator.counts["token_ratio"] == 1.0


def test_greedy_override(generator):
    one = change(generator, mode="sequential", n_samples_per_prompt=1)
    a = generator.rollout(prompts(2), step=0, rollout=one, temperature=0.0)
    b = generator.rollout(prompts(2), step=9, rollout=one, temperature=0.0)
    assert tokens(a) == tokens(b)


def test_samples_follow_the_models_distribution(generator, tiny_llama):
    """Chi-square of 2000 single-token samples against softmax(logits / T), cells with at least 5 expected."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    (prompt,) = prompts(1)
    n = 2000
    r = change(generator, mode="sequential", n_samples_per_prompt=n, max_response_len=1)
    (tree,) = generator.rollout([prompt], step=0, rollout=r, temperature=0.7)
    with torch.no_grad():
        p = (model(torch.tensor([prompt.tokens])).logits[0, -1].double() / 0.7).softmax(-1).numpy()
    seen = np.bincount([tree.nodes[i].tokens[0] for i in tree.leaves], minlength=len(p))
    big = p * n >= 5
    observed, expected = np.append(seen[big], seen[~big].sum()), np.append(p[big], p[~big].sum()) * n
    chi2, freedom = float(((observed - expected) ** 2 / expected).sum()), len(observed) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5, f"chi2 {chi2:.1f} with {freedom} degrees of freedom"


def test_progress_grows_to_the_total(generator):
    seen: list[tuple[int, int]] = []
    generator.progress = lambda done, total: seen.append((done, total))
    generator.rollout(prompts(2), step=0)
    assert seen == sorted(seen) and seen[-1] == (16, 16) and len(set(seen)) == len(seen)


def test_no_prompts_return_at_once(generator):
    assert generator.rollout([], step=0) == []
    assert generator.counts["engine_steps"] == 0 and generator.counts["token_ratio"] == 1.0


def test_a_deadline_names_what_is_missing_and_leaves_the_engine_usable(generator):
    with pytest.raises(TimeoutError, match=r"1e-09 s.*with 4 segments unfinished: 'p0' path \(0,\), 'p0' path \(1,\)"):
        generator.rollout(prompts(2), step=0, rollout=change(generator, timeout_s=1e-9))
    assert not generator.engine.busy
    assert len(generator.rollout(prompts(1), step=0)[0].leaves) == 8


def test_prompts_that_cannot_be_sampled_are_refused(generator):
    with pytest.raises(ValueError, match=r"'p0'.*66 tokens .*window of 129"):
        generator.rollout(prompts(1, length=66), step=0)
    with pytest.raises(ValueError, match="'p0' occurs twice"):
        generator.rollout(prompts(1) * 2, step=0)
    assert not generator.engine.busy


def test_eos_ids_come_from_the_checkpoint_unless_named(generator, engine, tiny_llama):
    assert generator.eos_token_ids == [2]
    cfg = generator.cfg.model_copy(deep=True)
    cfg.rollout.stop.eos_token_ids = [5, 6]
    named = Generator(engine, cfg, AutoTokenizer.from_pretrained(tiny_llama))
    trees = named.rollout(prompts(2), step=0)
    ends = {t.nodes[i].tokens[-1] for t in trees for i in t.leaves if t.nodes[i].stop == "eos"}
    assert ends and ends <= {5, 6}
