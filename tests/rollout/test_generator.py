"""Trees from the real engine: what each segment was conditioned on, seeds, schedules, deadlines, distribution."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.rollout.conftest import BLOCK, config
from tests.rollouts import rollout_config
from treepo_mega.config import RolloutConfig
from treepo_mega.engine.engine import Engine
from treepo_mega.rollout.dealing import LocalQueue
from treepo_mega.rollout.generator import Generator
from treepo_mega.rollout.idleness import Occupancy
from treepo_mega.rollout.in_flight import GenerationTimeout
from treepo_mega.rollout.jobs import Grown, Job, PromptError, Rewards
from treepo_mega.tree.node import Tree


@dataclass(frozen=True)
class FakePrompt:
    """What a rollout reads of a `data.prompts.Prompt`."""

    id: str
    tokens: list[int]
    data_source: str = "test"


@pytest.fixture
def generator(engine: Engine, tiny_llama: Path) -> Generator:
    return Generator(engine, config(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama))


@pytest.fixture(params=["copies", "vllm alone"])
def copies(engine: Engine, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a branch inside a KV block copies its beginning, or computes it again as vLLM alone would."""
    if request.param != "copies":
        monkeypatch.setattr(engine.branch_cache, "enabled", False)
    return request.param == "copies"


def prompts(n: int, length: int = 33) -> list[FakePrompt]:
    rng = random.Random(5)
    return [FakePrompt(f"p{k}", [rng.randrange(3, 54) for _ in range(length)]) for k in range(n)]


def logprobs_of(tree: Tree, leaf: int) -> list[float]:
    """Engine logprobs of the response that ends at `leaf`."""
    return [logprob for node in tree.ancestry(leaf)[1:] for logprob in tree.nodes[node].logprobs]


def change(generator: Generator, **fields: object) -> RolloutConfig:
    return rollout_config(generator.cfg.rollout, **fields)


def tokens(trees: list[Tree]) -> list[list[tuple[tuple[int, ...], list[int], str | None]]]:
    return [[(n.path, n.tokens, n.stop) for n in t.nodes] for t in trees]


class Told:
    """A watcher that writes down each tree as it is told of it, and after how many steps."""

    def __init__(self) -> None:
        self.trees: list[tuple[int, dict]] = []
        self.steps = 0
        self.first = 0

    def tree_done(self, index: int, tree: Tree, rewards: Rewards | None) -> None:
        assert rewards is None, "no environment"
        self.first = self.first or self.steps
        self.trees.append((index, json.loads(json.dumps(tree.to_dict()))))

    def step_done(self, occupancy: Occupancy) -> None:
        assert 1 <= occupancy.running <= 3 and not occupancy.blocked
        self.steps += 1


@pytest.mark.parametrize("mode", ["tree", "sequential"])
def test_a_watcher_is_told_of_each_tree_once_when_it_changes_no_more(generator: Generator, mode: str):
    told = Told()
    rollout = change(generator, mode=mode, n_samples_per_prompt=3, max_response_len=32, engine__max_num_seqs=3)
    made = [Job(prompt) for prompt in prompts(4)]
    grown = generator.grow(made, LocalQueue([0, 1, 2, 3]), step=0, rollout=rollout, watcher=told)
    assert sorted(index for index, _ in told.trees) == sorted(grown.trees) == [0, 1, 2, 3]
    for index, tree in told.trees:
        assert tree == json.loads(json.dumps(grown.trees[index].to_dict()))
    assert 0 < told.first < told.steps == generator.counts["engine_steps"], "others are still sampled then"


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
            assert np.abs(want.numpy() - np.array(logprobs_of(tree, leaf))).max() <= 1e-4


def test_counts_add_up(generator, copies):
    trees = generator.rollout(prompts(3), step=0, rollout=change(generator, debug__continue_paths="never"))
    c = generator.counts
    nodes = [n for t in trees for n in t.nodes[1:]]
    assert (c["prompts"], c["leaves"], c["trees_short"]) == (3, 24, 0)
    assert c["segments"] == len(nodes)
    assert c["generated_tokens"] - c["dropped_tokens"] == sum(len(n.tokens) for n in nodes)
    submitted = sum(len(t.prefix(n.parent)) for t in trees for n in t.nodes[1:])
    assert c["cached_tokens"] + c["recomputed_tokens"] == submitted
    if copies:
        assert c["recomputed_tokens"] <= c["segments"] + 3 * 2 * 32, "a token each, and whole prompts at the start"
    else:
        assert c["cached_tokens"] > 0.4 * submitted and c["cached_tokens"] % BLOCK == 0
    assert sum(c[f"stop/{s}"] for s in ("eos", "answer", "length", "depth", "repetition")) == 24
    assert c["token_ratio"] == c["unique_tokens"] / c["flat_tokens"] < 1
    assert c["engine_steps"] > 0 and c["seconds"] > 0
    assert c["forwarded_tokens"] == c["recomputed_tokens"] + c["generated_tokens"] - c["segments"]
    assert c["running"] >= c["generated_tokens"], "every sampled token was a place in some batch"


def test_what_runs_on_is_not_computed_twice(generator, copies):
    """Prompts of 33 tokens and segments of 16 on blocks of 32: every other border is in the middle of a block."""
    again = change(generator, debug__continue_paths="never")
    generator.rollout(prompts(3), step=0, rollout=again)
    resubmitted = dict(generator.counts)
    trees = generator.rollout(prompts(3), step=0)
    c = generator.counts
    unique = sum(len(n.tokens) for t in trees for n in t.nodes)
    assert c["recomputed_tokens"] < resubmitted["recomputed_tokens"]
    if copies:
        assert c["forwarded_tokens"] <= unique + c["dropped_tokens"], "prompts included"
    else:
        assert c["forwarded_tokens"] < resubmitted["forwarded_tokens"]
    assert unique - 24 <= c["forwarded_tokens"] <= unique + c["recomputed_tokens"]


def test_what_a_rollout_costs_does_not_depend_on_what_ran_before(generator):
    """An evaluation's compute is compared between samplers, and a resumed run's numbers with an uninterrupted one's."""
    counted = []
    for _ in range(2):
        generator.rollout(prompts(3), step=0)
        # Seconds are the machine's, and so is what is fitted to them.
        counted.append({k: v for k, v in generator.counts.items() if k != "seconds" and not k.startswith("cost/")})
    assert counted[0] == counted[1] and counted[0]["recomputed_tokens"] >= 3 * 33


def test_runs_are_the_same_watched_or_not(generator):
    """The engine reports a run segment by segment only when its text may end it: the tokens are the same."""
    stop = generator.cfg.rollout.stop.model_copy(update={"answer_box": False, "repetition_window": 0})
    generator.decode = lambda ids: ""
    watched = generator.rollout(prompts(4), step=2)
    alone = generator.rollout(prompts(4), step=2, rollout=change(generator, stop=stop))
    assert tokens(watched) == tokens(alone)


def test_an_answer_ends_a_run_where_it_stands(generator):
    """Token 25 opens a box, 26 closes it: with many of both, runs end early and nothing behind the box is kept."""
    generator.decode = lambda ids: "".join("\\boxed{" if i % 5 == 0 else "}" if i % 5 == 1 else "x" for i in ids)
    trees = generator.rollout(prompts(4), step=0)
    ended = [t for t in trees for i in t.leaves if t.nodes[i].stop == "answer"]
    assert ended and generator.counts["dropped_tokens"] > 0
    for tree in trees:
        for leaf in tree.leaves:
            assert generator.decode(tree.response(leaf)[:-1]).count("\\boxed{x}") == 0
        assert len(tree.leaves) == 8 and not generator.engine.busy


@pytest.mark.parametrize("paths", ["auto", "never"])
@pytest.mark.parametrize("budget", ["equal", "entropy"])
def test_the_level_synchronous_schedule_gives_the_same_trees(generator, paths, budget):
    generator.eos_token_ids = list(range(2, 9))
    r = change(generator, debug__continue_paths=paths, branching__budget__kind=budget)
    trees = generator.rollout(prompts(4), step=1, rollout=r)
    steps = generator.counts["engine_steps"]
    level = generator.rollout(prompts(4), step=1, rollout=rollout_config(r, debug__schedule="level"))
    assert trees == level or [t.to_dict() | {"counts": 0} for t in trees] == [
        t.to_dict() | {"counts": 0} for t in level
    ]
    assert generator.counts["engine_steps"] >= steps


def test_peeks_are_the_distribution_behind_their_node(generator, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    trees = generator.rollout(
        prompts(2), step=0, rollout=change(generator, branching__budget__kind="entropy", branching__budget__top_k=4)
    )
    peeked = [(t, n) for t in trees for n in t.nodes if n.peek]
    assert len(peeked) == generator.counts["peeked_tokens"] >= 4
    for tree, node in peeked:
        with torch.no_grad():
            law = model(torch.tensor([tree.prefix(node.id)])).logits[0, -1].double().log_softmax(-1)
        assert node.peek == pytest.approx(law.sort(descending=True).values[:4].tolist(), abs=1e-4)
        assert node.children, "only living paths are peeked at"


def forking(generator: Generator, **fields: object) -> RolloutConfig:
    return change(generator, branching__at="fork", branching__initial=(2, 2), **fields)


@pytest.mark.parametrize("draw", ["again", "other"])
def test_forks_inside_blocks_compute_nothing_twice(generator, copies, draw):
    """Trunks have ended before branches start from their blocks, most of which are cut by a fork somewhere inside."""
    r = forking(generator, branching__fork__waves=2, branching__fork__draw=draw)
    # Prompts of 33 and of 20 tokens: the second trunk shares a full block, and copies a part of one a step later.
    twenty = [replace(prompt, tokens=prompt.tokens[:20]) for prompt in prompts(2)]
    trees = generator.rollout([*prompts(4)[2:], *twenty], step=0, rollout=r)
    c = generator.counts
    assert c["forks"] == 4 * 6 and {len(t.leaves) for t in trees} == {8}
    inside = [n for t in trees for n in t.nodes if n.fork and (len(t.prefix(n.parent)) - 1) % BLOCK]
    assert len(inside) > 12
    unique = sum(len(n.tokens) for t in trees for n in t.nodes)
    if copies:
        assert c["forwarded_tokens"] - c["dropped_tokens"] <= 1.01 * unique, "prompts included"
    else:
        assert c["forwarded_tokens"] - c["dropped_tokens"] > 1.1 * unique


def test_a_tree_that_grows_on_finds_its_tokens_in_the_cache(generator, copies):
    """Graded in between: its forks then start inside blocks that the call before has left."""
    r = forking(generator, n_samples_per_prompt=8)
    queue = LocalQueue(range(4))
    jobs = [Job(prompt, leaves=2) for prompt in prompts(4)]
    begun = generator.grow(jobs, queue, step=0, rollout=r).trees
    before = sum(tree.counts["forwarded_tokens"] for tree in begun.values())
    jobs = [Job(prompt, begun=begun[index]) for index, prompt in enumerate(prompts(4))]
    trees = generator.grow(jobs, LocalQueue(range(4)), step=0, rollout=r).trees
    assert [len(trees[index].leaves) for index in range(4)] == [8] * 4
    whole = [generator.rollout([prompt], step=0, rollout=r)[0] for prompt in prompts(4)]
    assert [tree.nodes[1].tokens[:1] for tree in whole] == [trees[index].nodes[1].tokens[:1] for index in range(4)]
    spent = sum(tree.counts["forwarded_tokens"] - tree.counts["dropped_tokens"] for tree in trees.values())
    unique = sum(len(node.tokens) for tree in trees.values() for node in tree.nodes)
    assert spent > before
    assert (spent <= 1.01 * unique) == copies, "prompts included"


@pytest.mark.parametrize("signal, draw", [("entropy", "again"), ("entropy", "other"), ("logprob", "other")])
def test_forks_start_where_the_model_was_uncertain(generator, tiny_llama, signal, draw):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    generator.eos_token_ids = list(range(2, 6))
    r = forking(generator, branching__fork__signal=signal, branching__fork__top_k=4, branching__fork__draw=draw)
    trees = generator.rollout(prompts(3), step=0, rollout=r)
    if draw == "other":
        firsts = [[t.nodes[child].tokens[0] for child in n.children] for t in trees for n in t.nodes if n.parent >= 0]
        assert all(len(set(tokens)) == len(tokens) for tokens in firsts)
    assert generator.counts["fork_uncertainty"] > 0
    for tree in trees:
        for leaf in tree.leaves:
            path = tree.prefix(leaf)
            with torch.no_grad():
                law = model(torch.tensor([path])).logits[0, :-1].double().log_softmax(-1)[len(tree.prompt_tokens) - 1 :]
            sampled = law.gather(1, torch.tensor(tree.response(leaf))[:, None])[:, 0]
            assert np.abs(sampled.numpy() - np.array(logprobs_of(tree, leaf))).max() <= 1e-4
            entropies = [value for node in tree.ancestry(leaf)[1:] for value in tree.nodes[node].entropies]
            if signal == "logprob":
                assert not entropies
            else:
                top = law.sort(descending=True).values[:, :4].log_softmax(-1)
                assert entropies == pytest.approx((-top.exp() * top).sum(1).tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "debug", [{"debug__schedule": "level"}, {"stop__answer_box": False, "stop__repetition_window": 0}]
)
def test_forked_trees_do_not_depend_on_the_schedule_the_company_or_how_runs_are_watched(generator, debug):
    generator.decode = lambda ids: ""
    r = forking(generator, branching__fork__threshold=2.0, branching__fork__draw="other")
    trees = generator.rollout(prompts(4), step=1, rollout=r)
    assert {n.fork for t in trees for n in t.nodes} == {None, "rank", "threshold"}
    assert tokens(trees) == tokens(generator.rollout(prompts(4), step=1, rollout=rollout_config(r, **debug)))
    apart = [generator.rollout([p], step=1, rollout=r)[0] for p in reversed(prompts(4))][::-1]
    assert tokens(apart) == tokens(trees)


@pytest.mark.parametrize("transfer", ["level", "quota"])
def test_segments_end_at_steps_of_reasoning(generator, tiny_llama, transfer):
    r = change(generator, segment__end=["a", "q", "="], segment__min_length=3, branching__transfer=transfer)
    trees = generator.rollout(prompts(4), step=0, rollout=r)
    borders = generator.borders(r)
    assert len(borders) == 3
    ends = [n for t in trees for n in t.nodes[1:] if n.stop is None]
    assert all(3 <= len(n.tokens) <= 16 and (n.tokens[-1] in borders or len(n.tokens) == 16) for n in ends)
    assert any(len(n.tokens) < 16 for n in ends) and all(len(t.leaves) == 8 for t in trees)
    assert all(not borders & set(n.tokens[2:-1]) for t in trees for n in t.nodes[1:])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for tree in trees:
        path = tree.prefix(tree.leaves[-1])
        with torch.no_grad():
            table = model(torch.tensor([path])).logits[0, :-1].double().log_softmax(-1)
        want = table.gather(1, torch.tensor(path[1:])[:, None])[32:, 0].numpy()
        assert np.abs(want - np.array(logprobs_of(tree, tree.leaves[-1]))).max() <= 1e-4


def test_carried_over_trees_go_on_in_the_next_step(generator):
    """With the same weights, a tree that was carried over twice is the tree that was not."""
    whole = generator.rollout(prompts(3), step=5, rollout=change(generator, debug__continue_paths="never"))
    r = change(generator, partial_rollout=24)
    jobs, grown = [Job(p) for p in prompts(3)], Grown()
    finished = {}
    for step in (5, 6, 7):
        grown = generator.grow(jobs, LocalQueue(range(len(jobs))), step=step, policy_version=step, rollout=r)
        assert len(grown.trees) + len(grown.paused) == len(jobs)
        finished |= {t.prompt_id: t for t in grown.trees.values()}
        state = json.loads(json.dumps([grown.paused[i] for i in sorted(grown.paused)]))
        jobs = [Job(jobs[i].prompt, s) for i, s in zip(sorted(grown.paused), state, strict=True)]
    assert not jobs and len(finished) == 3
    for tree in whole:
        other = finished[tree.prompt_id]
        assert [(n.path, n.tokens, n.stop) for n in tree.nodes] == [(n.path, n.tokens, n.stop) for n in other.nodes]
        assert {n.policy_version for n in other.nodes[1:]} == {5, 6, 7}


def test_a_small_cache_is_shared_without_preemption(generator, tiny_llama, keep_alive, monkeypatch):
    """32 blocks for 6 trees of 8 leaves, each of which may need 5 blocks: segments wait instead of being thrown out."""
    cfg = config(tiny_llama)
    cfg.rollout.engine.kv_cache_memory_mb = 1
    small = Engine(tiny_llama, cfg)
    keep_alive.append(small)
    scheduler = small._llm.llm_engine.engine_core.engine_core.scheduler
    preempted = []
    real = scheduler._preempt_request
    monkeypatch.setattr(scheduler, "_preempt_request", lambda *a, **k: (preempted.append(1), real(*a, **k))[1])
    assert 16 <= small.kv_blocks <= 40
    tight = Generator(small, cfg, AutoTokenizer.from_pretrained(tiny_llama))
    forks = forking(generator, branching__fork__draw="other")
    forked = tight.rollout(prompts(6), step=0, rollout=forks)
    assert tokens(forked) == tokens(generator.rollout(prompts(6), step=0, rollout=forks))
    trees = tight.rollout(prompts(6), step=0)
    assert tokens(trees) == tokens(generator.rollout(prompts(6), step=0)), "the cache's size changes no tree"
    assert not preempted
    assert (
        tight.counts["running"] / tight.counts["engine_steps"]
        < generator.counts["running"] / (generator.counts["engine_steps"])
    )


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
    with pytest.raises(
        GenerationTimeout, match=r"1e-09 s.*with 4 segments unfinished: 'p0' path \(0,\), 'p0' path \(1,\)"
    ):
        generator.rollout(prompts(2), step=0, rollout=change(generator, timeout_s=1e-9))
    assert not generator.engine.busy
    assert len(generator.rollout(prompts(1), step=0)[0].leaves) == 8


def test_prompts_that_cannot_be_sampled_are_refused(generator):
    with pytest.raises(PromptError, match=r"'p0'.*66 tokens .*window of 129"):
        generator.rollout(prompts(1, length=66), step=0)
    with pytest.raises(PromptError, match="'p0' occurs twice"):
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
