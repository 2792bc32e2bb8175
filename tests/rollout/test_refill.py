"""Continuous refill: what a step begins and trains on depends on its prompts alone, whatever ends when and where."""

from __future__ import annotations

import json
import random
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.ranks import run_ranks
from tests.rollout.fakes import (
    PROMPTS,
    FakeEngine,
    FakePool,
    fake_collector,
    fake_config,
    fake_generator,
    load,
    prompts,
    said,
    state_of,
)
from tests.world import run_world
from treepo_mega.config import Config
from treepo_mega.data.cursor import PromptCursor
from treepo_mega.data.rewards.weighted import used_functions
from treepo_mega.journal import folder
from treepo_mega.journal.file import read_records
from treepo_mega.monitor.timers import Timers
from treepo_mega.rollout.adaptive import LeafBudget
from treepo_mega.rollout.collect import Collector, Forest
from treepo_mega.rollout.dealing import DEADLINE_STEPS, Queue, SharedQueue, deal_by_cost
from treepo_mega.rollout.grading import Grading, Row
from treepo_mega.rollout.in_flight import GenerationTimeout
from treepo_mega.rollout.jobs import Job
from treepo_mega.rollout.refill import RefillRule, Supply
from treepo_mega.rollout.shaping import reward_leaves
from treepo_mega.rollout.teaching import judge


def smallest_prefix(rule: RefillRule, signal: list[bool]) -> int:
    """The definition that the rule must come to, by trying one prefix after the other."""
    return next(
        begun
        for begun in range(rule.begin, rule.most + 1)
        if begun == rule.most or sum(signal[:begun]) >= rule.need(begun)
    )


@st.composite
def rules(draw: st.DrawFn) -> RefillRule:
    wanted = draw(st.integers(0, 8))
    begin = draw(st.integers(wanted, 12))
    most = begin + draw(st.integers(0, 20))
    first = draw(st.integers(1, 4))
    budget = LeafBudget(first, first + draw(st.integers(0, 8)), begin * first + draw(st.integers(0, 60)))
    return RefillRule(begin, wanted, most, budget if draw(st.booleans()) else None)


@examples(200)
@given(rules(), st.randoms(use_true_random=False), st.sampled_from([0.0, 0.2, 0.6, 0.9]))
def test_the_begun_prefix_is_the_smallest_that_holds_enough(rule: RefillRule, rng: random.Random, share: float):
    signal = [rng.random() < share for _ in range(rule.most)]
    flying = list(range(rule.begin))
    begun = list(flying)
    empty = 0
    while flying:
        index = flying.pop(rng.randrange(len(flying)))
        if signal[index]:
            continue
        empty += 1
        position = rule.replaces(empty)
        if position is not None:
            assert rule.may_replace
            flying.append(position)
            begun.append(position)
    assert begun == list(range(len(begun))), "in the order of the cursor, each once"
    assert len(begun) == smallest_prefix(rule, signal)


@examples(100)
@given(rules())
def test_fewer_suffice_the_more_have_begun(rule: RefillRule):
    needs = [rule.need(begun) for begun in range(rule.begin, rule.most + 1)]
    assert needs == sorted(needs, reverse=True) and needs[-1] == 0


def test_a_supply_gives_the_same_prompts_whoever_asks_first_and_leaves_the_cursor_alone():
    def supply() -> tuple[Supply, PromptCursor]:
        cursor = PromptCursor(prompts(5), seed=1, shuffle=True)
        return Supply([Job(prompt) for prompt in cursor.take(3)], cursor.lookahead(), leaves=2), cursor

    one, cursor = supply()
    other, _ = supply()
    last = one[8].prompt.id
    assert [other[index].prompt.id for index in range(9)] == [job.prompt.id for job in one] and len(one) == 9
    assert last.endswith("@1"), "beyond the end of the epoch"
    assert [job.leaves for job in one] == [None] * 3 + [2] * 6
    assert [prompt.id for prompt in cursor.take(6)] == [job.prompt.id for job in one][3:]
    with pytest.raises(IndexError):
        Supply([], None)[0]


def make_row(cfg: Config, tree: Any, results: Any) -> Row:
    row = reward_leaves(tree, results, cfg)
    return row | {"trains": judge(tree, cfg, step=3).trains}


def sample_on(
    cfg: Config,
    queue: Queue,
    jobs: Supply,
    seed: int,
    share: float,
    out: dict[int, Row] | None,
    lockstep: threading.Barrier | None = None,
) -> None:
    """What one rank does in a round: `round.sample_and_grade` before the exchange; `out` None: without graders."""
    grading = None
    if out is not None:
        grading = Grading(
            lambda tokens: " ".join(map(str, tokens)),
            FakePool(random.Random(seed), share),  # type: ignore[arg-type]
            jobs,
            used_functions(cfg.reward.functions, "train"),
            lambda tree, texts, results: make_row(cfg, tree, results),
            row_made=lambda index, row: None if row["trains"] else queue.no_signal(),
        )
    generator = fake_generator(cfg, seed)
    generator.engine.lockstep = lockstep  # type: ignore[attr-defined]
    grown = generator.grow(jobs, queue, step=3, watcher=grading)
    if grading is not None:
        grading.sampling_ended()
        out |= grading.rows(grown.trees)


def sampled(cfg: Config, engines: int, ranks: int, seed: int, share: float) -> dict[int, Row]:
    """The rows of a round over so many engines, of so many ranks each."""
    cursor = PromptCursor(prompts(PROMPTS), seed=0, shuffle=False)
    begin = [Job(prompt) for prompt in cursor.take(round(4 * cfg.rollout.oversample))]
    rule = RefillRule(len(begin), 4, len(begin) * (1 + cfg.rollout.max_refills))
    store, costs = dist.HashStore(), [1.0] * len(begin)
    rows: dict[int, Row] = {}
    errors: list[Exception] = []
    meet = [threading.Barrier(ranks, timeout=60) for _ in range(engines)]

    def one(engine: int, rank: int) -> None:
        try:
            queue = SharedQueue(
                store, "r", deal_by_cost(costs, engines), costs, engine, rule=rule, rank=rank, ranks=ranks, timeout_s=60
            )
            # Ranks of one engine see the same batches; their graders are the first one's.
            jobs = Supply(begin, cursor.lookahead())
            sample_on(cfg, queue, jobs, seed * 100 + engine, share, None if rank else rows, meet[engine])
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=one, args=(e, r)) for e in range(engines) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not errors, errors
    return dict(sorted(rows.items()))


def tree_of(row: Row) -> dict[str, Any]:
    return json.loads(json.dumps(row | {"tree": row["tree"].to_dict()}))


@examples(30)
@given(
    st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)]),
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    st.sampled_from([{}, {"oversample": 1.5}, {"oversample": 2.0, "max_refills": 1}, {"max_refills": 0}]),
    st.sampled_from([256, 4]),
)
def test_the_trees_of_a_round_are_the_same_on_any_engines_in_any_order(layout, seed, share, keys, room):
    engines, ranks = layout
    cfg = fake_config(engine={"max_num_seqs": room}, **keys)
    found = sampled(cfg, engines, ranks, seed, share)
    # Each prompt alone says whether it has signal; the rule then says which begin.
    begin = round(4 * cfg.rollout.oversample)
    rule = RefillRule(begin, 4, begin * (1 + cfg.rollout.max_refills))
    alone = alone_rows()
    begun = smallest_prefix(rule, [row["trains"] for row in alone])
    assert list(found) == list(range(begun))
    assert [tree_of(row) for row in found.values()] == alone[:begun]


_ALONE: list[Row] = []


def alone_rows() -> list[Row]:
    """The rows of the first prompts, each sampled and graded alone; made once."""
    if not _ALONE:
        cfg = fake_config()
        jobs = Supply([Job(prompt) for prompt in prompts(PROMPTS)], None)
        for index in range(PROMPTS):
            out: dict[int, Row] = {}
            queue = SharedQueue(dist.HashStore(), "r", [[index]], [1.0] * PROMPTS, 0)
            sample_on(cfg, queue, jobs, 7, 1.0, out)
            _ALONE.append(tree_of(out[index]))
        signal = [row["trains"] for row in _ALONE]
        assert 0.2 < sum(signal) / PROMPTS < 0.8, "else the cases are all alike"
    return _ALONE


def collected(cfg: Config, seed: int, share: float, steps: int, killed: int | None = None) -> list[Forest]:
    """Steps of a collector; `killed`: its engine fails at that step of the last one, and a run goes on from before."""
    made = fake_collector(cfg, seed, share)
    out = [made.collect(step) for step in range(steps - 1)]
    if killed is not None:
        saved = state_of(made)
        engine = made.generator.engine
        assert isinstance(engine, FakeEngine)
        engine.at_step = (engine.steps + killed, fail)
        with pytest.raises(RuntimeError, match="killed"):
            made.collect(steps - 1)
        made = fake_collector(cfg, seed, share)
        load(made, saved)
    return [*out, made.collect(steps - 1)]


def fail() -> None:
    raise RuntimeError("killed")


WORKER = Path(__file__).with_name("refill_worker.py")
FORKS = {
    "mode": "tree",
    "segment": {"length": 8},
    "branching": {"at": "fork", "initial": [2, 2], "fork": {"signal": "logprob", "distance": 1, "waves": 2}},
}
PARTIAL = {"mode": "tree", "segment": {"length": 2}, "partial_rollout": 4}
"""Half of the trees go on in the next step."""
KEYS = [
    {},
    FORKS,
    FORKS | {"leaves": "adaptive", "first_leaves": 2},
    {"oversample": 1.5, "surplus": "carry"},
    {"oversample": 2.0},
    PARTIAL,
    {"leaves": "adaptive", "first_leaves": 2},
    {"schedule": "level"},
]


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_steps_are_equal_in_any_order_of_ends_and_after_a_kill_amid_a_rollout(keys: dict[str, Any]):
    cfg = fake_config(n_samples_per_prompt=4, **keys)
    whole = said(collected(cfg, 0, 1.0, 4))
    assert said(collected(cfg, 1, 0.1, 4)) == whole
    assert said(collected(cfg, 2, 0.0, 4)) == whole, "graders that finish nothing before they are waited for"
    assert said(collected(cfg, 3, 0.5, 4, killed=2)) == whole
    assert sum(metrics["rollout/refills"] for _, metrics in whole) > 0, "some prompts were replaced"
    assert (sum(metrics["tree/forks"] for _, metrics in whole) > 0) == ("branching" in keys)


def test_steps_are_equal_on_one_two_and_four_ranks_and_after_all_are_killed_amid_a_rollout(tmp_path: Path):
    """Engines of one rank and of two. Four ranks are killed in their last step, and two go on later.

    What engines had finished then, their own prompts and stolen ones, is on disk and is not sampled again.
    """
    carry = {"n_samples_per_prompt": 4, "oversample": 1.5, "surplus": "carry"}
    keys = [PARTIAL | carry, FORKS | carry]
    whole = [said(collected(fake_config(**each), 0, 0.5, 3)) for each in keys]
    assert all(metrics["rollout/refills"] > 0 for _, metrics in whole[1][1:])
    assert all(metrics["rollout/trees_resumed"] > 0 for _, metrics in whole[0][1:])
    four, two = tmp_path / "4", tmp_path / "2"

    for where in (four, two):
        where.mkdir()
    code, _, _ = run_world(4, [str(WORKER), str(four), "3", json.dumps(keys), "killed"], 120)
    assert code != 0 and len(json.loads((four / "1.1.json").read_text())) == 2, "what the last step began is lost"
    for name in ("1.1.json", "1.1.state.json"):
        shutil.copy(four / name, two)
    shutil.copytree(four / "1.1.run", two / "1.1.run")
    finished = sum(len(read_records(path).records) for path in folder.files_of(two / "1.1.run", 2))
    run_ranks(2, WORKER, two, 3, json.dumps(keys), "whole", timeout=120)
    made = [four / name for name in ("0.2.json", "0.1.json", "1.2.json")]
    made += [two / name for name in ("0.2.json", "0.1.json", "1.2.json", "1.1.json")]
    for path in made:
        assert json.loads(path.read_text()) == whole[int(path.name[0])], path
    assert json.loads((two / "1.1.restored.json").read_text()) == [finished] and finished > 0, "of four ranks' files"


def test_what_is_left_over_trains_first_in_the_next_step_and_is_marked():
    cfg = fake_config(n_samples_per_prompt=4, oversample=3.0, surplus="carry")
    forests = collected(cfg, 0, 0.5, 3)
    metrics = [forest.metrics for forest in forests]
    assert metrics[0]["rollout/prompts_surplus"] > 0 and metrics[0]["rollout/wasted_tokens"] == 0
    assert metrics[1]["rollout/surplus_trained"] == metrics[0]["rollout/prompts_surplus"]
    older = int(metrics[1]["rollout/surplus_trained"])
    versions = [{node.policy_version for node in tree.nodes[1:]} for tree in forests[1].trees]
    assert versions == [{0}] * older + [{1}] * (len(versions) - older)
    assert metrics[1]["rollout/stale_token_share"] > 0 and metrics[0]["rollout/stale_token_share"] == 0
    assert metrics[1]["rollout/prompts_trained"] == 4
    dropped = collected(cfg.replace({"rollout.surplus": "drop"}), 0, 0.5, 1)[0].metrics
    tokens = 4 * 2 * metrics[0]["rollout/prompts_surplus"]
    assert dropped["rollout/wasted_tokens"] == tokens, "four leaves of two tokens each"


def test_an_engine_that_waits_for_graders_has_a_deadline_that_says_so(monkeypatch: pytest.MonkeyPatch):
    cfg = fake_config()
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("treepo_mega.rollout.generator.time", SimpleNamespace(monotonic=lambda: clock.now))

    class Stuck(FakePool):
        def poll(self, share: float | None = None) -> dict:
            return {}

        def wait_any(self) -> dict:
            clock.now += 100
            return {}

    pool, cursor = Stuck(random.Random(0), 0.0), PromptCursor(prompts(8), seed=0, shuffle=False)
    collector = Collector(cfg, fake_generator(cfg), pool, cursor, Timers())  # type: ignore[arg-type]
    with pytest.raises(GenerationTimeout, match=r"rollout.timeout_s\) while the engine waited for graders"):
        collector.collect(0)
    assert not pool.flying, "nothing stays with the graders"


def test_the_first_rank_says_what_begins_at_fixed_steps_and_when_nothing_runs():
    store, rule = dist.HashStore(), RefillRule(begin=2, wanted=2, most=6)
    leader, follower = (
        SharedQueue(store, "r", [[0, 1]], [1.0] * 2, 0, rule=rule, rank=rank, ranks=2, timeout_s=20) for rank in (0, 1)
    )
    both = (leader, follower)
    assert [queue.take() for queue in both for _ in range(2)] == [0, 1, 0, 1]
    assert [queue.take() for queue in both] == [None, None]
    assert [queue.deadline_passed(False) for queue in both] == [False, False]
    leader.no_signal()
    assert leader.take() is None, "the other ranks do not know of it yet"
    for queue in both:
        assert not any(queue.deadline_passed(False) for _ in range(DEADLINE_STEPS - 1))
    assert leader.take() is None
    assert [queue.deadline_passed(False) for queue in both] == [False, False]
    assert [queue.take() for queue in both] == [2, 2]
    graders = iter([True, True, False])

    def settle() -> bool:
        leader.no_signal()
        return next(graders)

    assert [queue.more(settle, lambda: False) for queue in both] == ["begin", "begin"], "the first rank alone waits"
    assert [queue.take() for queue in both] == [3, 3]
    assert [queue.more(lambda: False, lambda: False) for queue in both] == ["end", "end"]
    assert [queue.more(lambda: True, lambda: True) for queue in both] == ["late", "late"]
