"""One round of prompts over the engines of this job: deal, sample, grade, exchange.

    sampled = sample_and_grade(generator, pool, jobs, rows, name="step 7", costs=costs, step=7)
    sampled.rows            # job index -> what `rows` made of its graded tree, on every rank
    sampled.paused          # job index -> the job of a tree that goes on in a later step

Training (`collect.py`) and evaluation (`eval.py`) sample through it. Prompts are dealt by expected cost, and an
engine that runs dry takes prompts from the others' lists (`dealing.py`). A tree lives on one engine. The ranks of
that engine sample it together. The first of them has it graded while the engine goes on (`grading.py`), and reports
it. A tree without signal is replaced meanwhile (`refill.py`), so a step has one round. Reports are columns without
tokens (`report.py`). Afterwards every rank holds the same structure and grades, so what follows is computed alike
everywhere. Tokens stay on the ranks of the engine until they are trained (`actor/fetch.py`).
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treepo_mega.config import Config, RolloutConfig
from treepo_mega.data.rewards import RewardPool
from treepo_mega.data.rewards.weighted import used_functions
from treepo_mega.monitor.timers import Timers
from treepo_mega.rollout.dealing import LocalQueue, Queue, SharedQueue, deal_by_cost, deal_to
from treepo_mega.rollout.durable import KeptRound
from treepo_mega.rollout.engine_costs import of_engine
from treepo_mega.rollout.generator import Generator
from treepo_mega.rollout.grading import Grading, MakeRow, Row
from treepo_mega.rollout.jobs import Grown, Job, carry
from treepo_mega.rollout.refill import NoSignal, RefillRule
from treepo_mega.rollout.report import TREE, complete, heard, lend_contents, told
from treepo_mega.rollout.turn_metrics import of_turns
from treepo_mega.runtime import dist
from treepo_mega.runtime.garbage import collection_put_off
from treepo_mega.tree.node import Tree
from treepo_mega.tree.regrow import with_grades


@dataclass(slots=True)
class SampledRound:
    """The result of a round, the same on every rank, but for contents of trees, which are where they were sampled."""

    rows: dict[int, Row] = field(default_factory=dict)
    """By the index of the job, ascending."""
    paused: dict[int, Job] = field(default_factory=dict)
    """What goes on in a later step, by the index of its job, ascending; states are on the ranks of their engines."""
    engines: dict[int, int] = field(default_factory=dict)
    """The engine that sampled each job of `rows`."""
    counts: dict[str, float] = field(default_factory=dict)
    """Sums over engines: `EngineCosts.counts`, stolen (prompts), gradings, gradings_early, which ended while their
    engine sampled, `RewardPool.take_costs` and `Idleness.counts`. Seconds: engine_s in all, idle_s waiting for the
    others at the end, and grader_wait_s waiting for graders with nothing to sample."""
    idle_share_max: float = 0.0
    """Largest share of the sampling time that a rank waited for the others at the end."""


def sample_and_grade(
    generator: Generator,
    pool: RewardPool,
    jobs: Sequence[Job],
    make_row: MakeRow,
    *,
    name: str,
    costs: Sequence[float],
    step: int,
    policy_version: int = 0,
    rollout: RolloutConfig | None = None,
    temperature: float | None = None,
    purpose: str = "train",
    waits_for: str = "generation",
    timers: Timers | None = None,
    engines: Sequence[int | None] | None = None,
    rule: RefillRule | None = None,
    no_signal: NoSignal | None = None,
    kept: KeptRound | None = None,
) -> SampledRound:
    """Sample and grade the trees of `jobs`, the same list on every rank. Collective over all ranks.

    `rule`: which positions of `jobs` behind those known now (`refill.Supply`) begin in place of trees whose row has
    `no_signal`. None: those that are known are all. `kept`: what of the round is on disk, and is not sampled again; the
    rest goes there as it comes.

    `costs`: expected tokens a job. `name` and `waits_for` stand in the messages about lost ranks. `timers` gets the
    phases `rollout` and `reward`, the latter what is left to grade and to exchange after sampling. `engines`: the
    engine that alone can sample a job; None: any, dealt by cost. Of a tree that grows on (`Job.begun`), only new leaves
    are graded and reported. The other arguments are those of `Generator.grow`. Raises what it raises, VerifierError
    once sampling has ended, and RankLost when an engine has not finished rollout.timeout_s after this one. After an
    error nothing is sampled or graded any more, and engine and pool are usable.
    """
    cfg = generator.cfg
    timers = timers or Timers()
    started = time.monotonic()
    queue = open_round(cfg, costs, name, engines, rule, kept.engines if kept is not None else ())
    # The ranks of one engine hold the same trees: the first of them speaks for the engine.
    grading = None
    if dist.rank() % cfg.rollout.engine.tensor_parallel_size == 0:
        functions = used_functions(cfg.reward.functions, purpose)

        def row_made(index: int, row: Row) -> None:
            # Before others are told: whoever knows that a tree has no signal finds it on disk.
            if kept is not None:
                kept.tree_graded(index, row)
            if no_signal is not None and no_signal(row):
                queue.no_signal()

        replaces = rule is not None and rule.may_replace
        grading = Grading(
            *(generator.decode, pool, jobs, functions, make_row),
            row_made=row_made,
            paused=None if kept is None else kept.tree_paused,
            timers=timers,
            replaces=replaces,
        )
    try:
        with timers("rollout"):
            with timers.span("sampling"):
                grown = generator.grow(
                    jobs,
                    queue,
                    step=step,
                    policy_version=policy_version,
                    rollout=rollout,
                    temperature=temperature,
                    purpose=purpose,
                    watcher=grading,
                )
            if grading is not None:
                grading.sampling_ended()
            sampled = list(grown.trees)
            if kept is not None:
                grown.trees |= kept.trees
                grown.paused |= kept.paused
            # Read before the barrier: the difference is what this engine waited for the others.
            busy_s = time.monotonic() - started
            with timers.span("waiting for other engines"):
                dist.barrier(waits_for, cfg.rollout.timeout_s)
            engine_s = time.monotonic() - started
        idle_s = engine_s - busy_s
        rows: dict[int, Row] = {}
        report: dict[str, Any] | None = None
        with timers("reward"):
            if grading is not None:
                with timers.span("grading"):
                    rows = _whole(grading.rows(sampled) | (kept.rows if kept is not None else {}), jobs, cfg)
                report = {
                    "engine": dist.rank() // cfg.rollout.engine.tensor_parallel_size,
                    "rows": told(rows),
                    # Their tokens stay here: no other rank reads them before they are trained.
                    "paused": np.array(list(grown.paused), np.int32),
                    "counts": _counts(generator, queue, grading, pool, idle_s, engine_s)
                    | (kept.counts() if kept is not None else {}),
                }
            with timers.span("exchange"):
                # Ranks without an engine of their own say nothing.
                merged = _merge(dist.tell_all(report), jobs, rows, grown)
                share = {"idle_share": idle_s / max(engine_s, 1e-9)}
                merged.idle_share_max = dist.max_over_ranks(share)["idle_share"]
                return merged
    except BaseException:
        # What is still with the graders would be answered in the next round.
        pool.abandon()
        raise


def _counts(
    generator: Generator, queue: Queue, grading: Grading, pool: RewardPool, idle_s: float, engine_s: float
) -> dict[str, float]:
    """What the round cost on this engine; `SampledRound.counts` are the sums."""
    return {
        **of_engine(generator.counts),
        **of_turns(generator.counts),
        "stolen": queue.stolen,
        "grader_wait_s": grading.waited_s,
        "idle_s": idle_s,
        "engine_s": engine_s,
        "gradings": grading.total,
        "gradings_early": grading.early,
        **pool.take_costs(),
        **grading.idleness.counts(idle_s),
    }


def open_round(
    cfg: Config,
    costs: Sequence[float],
    name: str,
    dealt_to: Sequence[int | None] | None = None,
    rule: RefillRule | None = None,
    done: Collection[int] = (),
) -> Queue:
    """This engine's way to the prompts of a new round, by their expected costs. All ranks call it alike.

    `dealt_to`: the engine of each prompt, which no other takes; None for those that any may take, which are dealt as
    even as can be beside them. `rule`: what begins where trees have no signal. `done`: prompts that nobody samples.
    """
    tp = cfg.rollout.engine.tensor_parallel_size
    engines = max(1, dist.world_size() // tp)
    costs = [0.0 if index in done else cost for index, cost in enumerate(costs)]
    pinned = deal_to(dealt_to or [None] * len(costs), costs, engines)
    pinned, deal = (
        [[index for index in of_engine if index not in done] for of_engine in lists]
        for lists in (pinned, deal_by_cost(costs, engines, pinned))
    )
    # A name of its own for every round: a list in the store is a counter, and counters only go up.
    key = f"round {next(_rounds())}, {name}"
    if engines == tp == 1:
        return LocalQueue([*pinned[0], *deal[0]], rule)
    engine, rank = divmod(dist.rank(), tp)
    timeout_s = cfg.rollout.timeout_s
    return SharedQueue(
        dist.store(),
        key,
        deal,
        costs,
        engine,
        rule=rule,
        pinned=pinned[engine],
        rank=rank,
        ranks=tp,
        timeout_s=timeout_s,
    )


@functools.cache
def _rounds() -> itertools.count[int]:
    """Numbers the rounds of this process: a list in the store is used once, and every rank opens the same rounds."""
    return itertools.count()


def _whole(rows: dict[int, Row], jobs: Sequence[Job], cfg: Config) -> dict[int, Row]:
    """`rows` whose trees have all their leaves again where they grew on, and what only this rank can find out."""
    home = dist.rank() if dist.world_size() > 1 else None
    for index, row in rows.items():
        if TREE in row:
            row[TREE] = complete(with_earlier_grades(jobs[index], row), cfg, home)
    return rows


def with_earlier_grades(job: Job, row: Row) -> Tree:
    """The tree of a row; one that grew on has its first leaves and their grades again."""
    tree: Tree = row[TREE]
    return tree if job.begun is None else with_grades(tree, job.begun)


def _merge(reports: dict[int, Any], jobs: Sequence[Job], own: dict[int, Row], grown: Grown) -> SampledRound:
    """One result of all engines' reports, by the rank that speaks; `own` rows and `grown` trees have contents."""
    merged = SampledRound()
    rows: dict[int, Row] = {}
    paused: dict[int, Job] = {}
    with collection_put_off():
        for speaker, report in reports.items():
            home = speaker if dist.world_size() > 1 else None
            of_engine = heard(report["rows"], jobs, home=home)
            merged.engines |= dict.fromkeys(of_engine, report["engine"])
            rows |= of_engine
            paused |= {index: carry(jobs[index], grown.paused.get(index), home) for index in report["paused"].tolist()}
            for key, value in report["counts"].items():
                merged.counts[key] = merged.counts.get(key, 0) + value
    for index, tree in grown.trees.items():
        if index in own:
            rows[index] |= {name: value for name, value in own[index].items() if name == TREE}
        elif TREE in rows[index]:
            # This rank shares the engine that sampled it: it may grow on here.
            lend_contents(rows[index][TREE], tree)
    # In the order of jobs, not of engines: sums over rows must round alike whichever engine sampled what.
    merged.rows = {index: rows[index] for index in sorted(rows)}
    merged.paused = {index: paused[index] for index in sorted(paused)}
    return merged
