"""Grading while sampling gives what grading afterwards gives, whatever ends when. Engine and graders are fakes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from treepo_mega.config import Config, parse_config
from treepo_mega.data.prompts import Prompt
from treepo_mega.data.rewards import RewardItem, RewardResult, VerifierError
from treepo_mega.monitor.registry import check_known, depends_on_time
from treepo_mega.rollout.grading import Grading
from treepo_mega.rollout.idleness import Occupancy
from treepo_mega.rollout.jobs import Grown, Job, Watcher
from treepo_mega.rollout.round import SampledRound, sample_and_grade
from treepo_mega.tree.node import ROOT, Tree

LEAVES = 4


def config(**reward: Any) -> Config:
    raw: dict[str, Any] = {"model": {"hf_checkpoint": "none"}, "data": {"train": [{"reasoning_gym": "chain_sum"}]}}
    return parse_config(raw | {"reward": reward})


def jobs(count: int) -> list[Job]:
    return [Job(Prompt(f"p{index}", "", [1], str(index), "exact", "test")) for index in range(count)]


def tree_of(job: Job, leaves: int = LEAVES) -> Tree:
    """A finished tree; the second leaf says what the first one does."""
    tree = Tree.start(job.prompt.id, job.prompt.tokens)
    for leaf in range(leaves):
        node = tree.add_child(ROOT)
        node.tokens, node.logprobs, node.stop = [int(job.prompt.answer), max(1, leaf)], [0.0, 0.0], "eos"
        tree.leaves.append(node.id)
    return tree


def verdict(item: RewardItem) -> RewardResult:
    """A score that names its item; an answer that ends in 3 is lost."""
    text = item.solution_str
    if text.endswith("3"):
        return RewardResult(None, f"{item.verifier} hung on {text}")
    return RewardResult(int(text.replace(" ", "")) + 1000 * len(item.verifier), None, {"acc": float(text[-1] == "1")})


class FakePool:
    """A pool whose gradings end when `rng` says so, or at the end; `broken`: a verifier that cannot be loaded."""

    def __init__(self, rng: random.Random, share: float, broken: str = "") -> None:
        self.rng = rng
        self.share = share
        self.broken = broken
        self.flying: dict[int, RewardItem] = {}
        self.submitted: list[RewardItem] = []
        self.abandoned = 0

    def submit(self, items: list[RewardItem]) -> list[int]:
        tickets = list(range(len(self.submitted), len(self.submitted) + len(items)))
        self.submitted += items
        self.flying |= dict(zip(tickets, items, strict=True))
        return tickets

    def poll(self, share: float | None = None) -> dict[int, RewardResult]:
        ended = [ticket for ticket in self.flying if self.rng.random() < (self.share if share is None else share)]
        self.rng.shuffle(ended)
        if any(self.flying[ticket].verifier == self.broken for ticket in ended):
            raise VerifierError(f"verifier {self.broken!r} cannot be loaded: why")
        return {ticket: verdict(self.flying.pop(ticket)) for ticket in ended}

    def wait(self) -> dict[int, RewardResult]:
        return self.poll(1.0)

    def take_costs(self) -> dict[str, int]:
        return {"remote_calls": 2, "remote_retries": 0}

    def wait_any(self) -> dict[int, RewardResult]:
        found: dict[int, RewardResult] = {}
        while self.flying and not found:
            found = self.poll(0.3)
        return found

    def abandon(self) -> None:
        self.abandoned += 1
        self.flying.clear()


class FakeGenerator:
    """Trees of `jobs` that are done in the order that `rng` says, with a step after each; the last one is paused."""

    def __init__(self, cfg: Config, rng: random.Random, fails: bool = False) -> None:
        self.cfg = cfg
        self.rng = rng
        self.fails = fails
        self.counts = {"engine_steps": 7.0, "running": 9.0}
        self.decoded = 0
        self.ended = False

    def decode(self, tokens: list[int]) -> str:
        self.decoded += 1
        return " ".join(map(str, tokens))

    def grow(self, jobs: list[Job], queue: Any, *, watcher: Watcher, **_: Any) -> Grown:
        taken = []
        while (index := queue.take()) is not None:
            taken.append(index)
        trees = {index: tree_of(jobs[index]) for index in taken[:-1]}
        for index in self.rng.sample(sorted(trees), len(trees)):
            watcher.tree_done(index, trees[index], None)
            watcher.step_done(Occupancy(1, blocked=False))
        if self.fails:
            raise RuntimeError("the engine failed")
        self.ended = True
        return Grown(trees, {taken[-1]: {"state": taken[-1]}} if taken else {})


def row(tree: Tree, texts: list[str], results: list[RewardResult]) -> dict[str, Any]:
    return {
        "id": tree.prompt_id,
        "texts": texts,
        "scores": [result.score for result in results],
        "errors": [result.error for result in results],
        "extra": [result.extra for result in results],
    }


def sampled(generator: FakeGenerator, pool: FakePool, count: int) -> SampledRound:
    return sample_and_grade(
        generator,  # type: ignore[arg-type]
        pool,  # type: ignore[arg-type]
        jobs(count),
        row,
        name="step 1",
        costs=[float(index) for index in range(count)],
        step=1,
    )


WEIGHTED = {"functions": [{"verifier": "exact"}, {"verifier": "boxed", "weight": 0.5}]}


@examples(60)
@given(st.integers(0, 6), st.randoms(use_true_random=False), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.booleans())
def test_the_rows_are_the_same_whatever_ends_when(count: int, rng: random.Random, share: float, weighted: bool):
    cfg = config(**WEIGHTED if weighted else {})
    afterwards = sampled(FakeGenerator(cfg, random.Random(0)), FakePool(random.Random(0), 0.0), count)
    assert afterwards.counts.get("gradings_early", 0) == 0, "this pool grades nothing before it is waited for"
    generator, pool = FakeGenerator(cfg, rng), FakePool(rng, share)
    found = sampled(generator, pool, count)
    assert list(found.rows.items()) == list(afterwards.rows.items())
    assert found.paused == afterwards.paused
    for index, told in found.rows.items():
        assert told["texts"] == [f"{index} {max(1, leaf)}" for leaf in range(LEAVES)]
        assert [score is None for score in told["scores"]] == [False, False, False, True], "the lost one, and no other"
    trees = max(0, count - 1)
    assert len(found.rows) == trees and generator.decoded == 3 * trees, "what two leaves say is decoded once"
    gradings = trees * LEAVES * (2 if weighted else 1)
    assert found.counts["gradings"] == len(pool.submitted) == gradings
    assert found.counts["remote_calls"] == 2
    assert pool.abandoned == 0 and not pool.flying
    if share == 1.0:
        assert found.counts["gradings_early"] == gradings


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["met afterwards", "met while sampling"])
def test_what_the_graders_meet_is_raised_once_sampling_has_ended(share: float):
    cfg = config(functions=[{"verifier": "boxed"}])
    generator, pool = FakeGenerator(cfg, random.Random(1)), FakePool(random.Random(1), share, broken="boxed")
    with pytest.raises(VerifierError, match="verifier 'boxed' cannot be loaded: why"):
        sampled(generator, pool, 4)
    assert generator.ended, "the ranks that share the engine would wait for this one amid a step"
    assert pool.abandoned and not pool.flying
    pool.broken = ""
    assert len(sampled(generator, pool, 4).rows) == 3, "engine and pool are usable"


def test_nothing_stays_with_the_graders_when_the_engine_fails():
    pool = FakePool(random.Random(1), 0.1)
    with pytest.raises(RuntimeError, match="the engine failed"):
        sampled(FakeGenerator(config(), random.Random(1), fails=True), pool, 4)
    assert len(pool.submitted) == 3 * LEAVES and pool.abandoned and not pool.flying


def test_of_a_tree_that_grew_on_only_new_leaves_are_graded():
    (first,) = jobs(1)
    begun = tree_of(first, leaves=2)
    pool = FakePool(random.Random(1), 0.0)
    jobs_ = [Job(first.prompt, begun=begun)]
    grading = Grading(lambda tokens: f"{tokens[-1]}", pool, jobs_, [], row)  # type: ignore[arg-type]
    grading.tree_done(0, tree_of(first), None)
    grading.sampling_ended()
    assert grading.rows([0])[0]["texts"] == ["2", "3"]
    assert (grading.total, grading.early) == (2, 0)


def test_the_share_is_documented_as_a_matter_of_time():
    assert check_known("reward/overlapped_share").unit == "share" and depends_on_time("reward/overlapped_share")
