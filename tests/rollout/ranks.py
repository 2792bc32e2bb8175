"""One rank of test_ranks.py: `torchrun ... ranks.py HF_DIR OTHER_HF_DIR TP_V`. Rank 0 prints one JSON line."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from tests.engine_weights import write_weights
from tests.rollout.fakes import everywhere
from treepo_mega.config import Config, parse_config
from treepo_mega.data.cursor import PromptCursor
from treepo_mega.data.prompts import Prompt
from treepo_mega.data.rewards import RewardPool, RewardResult
from treepo_mega.engine.cpu_segments import SHARED_MEMORY
from treepo_mega.engine.engine import Engine
from treepo_mega.monitor.registry import depends_on_time
from treepo_mega.monitor.timers import Timers
from treepo_mega.rollout import in_flight
from treepo_mega.rollout.collect import Collector, Forest
from treepo_mega.rollout.dealing import SharedQueue, deal_by_cost
from treepo_mega.rollout.eval import Evaluator
from treepo_mega.rollout.generator import Generator
from treepo_mega.rollout.jobs import Job
from treepo_mega.rollout.round import sample_and_grade
from treepo_mega.rollout.shaping import reward_leaves
from treepo_mega.runtime import dist as runtime_dist
from treepo_mega.tree.node import Tree


@contextlib.contextmanager
def a_segment_left_over(rank: int) -> Iterator[None]:
    """What another run of two ranks has, or left behind, under the name that vLLM gives to both."""
    plain = SHARED_MEMORY / f"-tp:0-[0-1]-cpushm_{rank}"
    planted = not plain.exists()
    if planted:
        plain.touch()
    try:
        yield
        assert plain.exists(), "it is another run's"
    finally:
        if planted:
            plain.unlink(missing_ok=True)


def evaluations(generator: Generator, cfg: Config, slow: int) -> dict[str, object]:
    """Two evaluations with few prompts in flight, one by forks, in which engine `slow` is slow (-1: none is)."""
    engine, real = generator.engine, generator.engine.step
    if dist.get_rank() == slow:
        engine.step = lambda: (time.sleep(0.05), real())[1]  # type: ignore[method-assign]
    few = cfg.rollout.engine.model_copy(update={"max_num_seqs": 2})
    one = {"mode": "sequential", "n_samples_per_prompt": 2, "engine": few}
    prompts = [Prompt(f"e{k}", "", [3 + k] * 20, str(k), "last_number", "test") for k in range(6)]
    with RewardPool(cfg.reward) as pool:
        evaluator = Evaluator(generator, pool, cfg)
        both = []
        forks = cfg.rollout.replace({"engine.max_num_seqs": 2, "branching.at": "fork", "branching.initial": (2, 2)})
        for rollout in (cfg.rollout.model_copy(update=one), forks):
            n = rollout.n_samples_per_prompt
            both.append(evaluator.evaluate(prompts, temperature=1.0, n=n, step=3, rollout=rollout))
    engine.step = real  # type: ignore[method-assign]
    stolen = sum(m.pop("stolen") for m in both)
    same = [{k: v for k, v in m.items() if k not in ("forwarded_tokens", "idle_share_max")} for m in both]
    return {"stolen": stolen, "metrics": same}


def grown_on(generator: Generator, cfg: Config) -> list[list]:
    """Trees that begin with a handful of leaves and grow on once that is graded, on the engines that have them."""
    prompts = [Prompt(f"g{k}", "", [3 + k] * 20, str(k), "last_number", "test") for k in range(3)]

    def report(tree: Tree, texts: list[str], results: list[RewardResult]) -> dict:
        return reward_leaves(tree, results, cfg)

    with RewardPool(cfg.reward) as pool:
        jobs = [Job(prompt, leaves=3) for prompt in prompts]
        first = sample_and_grade(generator, pool, jobs, report, name="handfuls", costs=[1.0] * 3, step=4)
        begun = [row["tree"] for row in first.rows.values()]
        jobs = [Job(prompt, leaves=8, begun=tree) for prompt, tree in zip(prompts, begun, strict=True)]
        engines = [first.engines[index] for index in range(3)]
        rest = sample_and_grade(generator, pool, jobs, report, name="rest", costs=[1.0] * 3, step=4, engines=engines)
    trees = whole([row["tree"] for row in rest.rows.values()])
    assert [len(tree.leaves) for tree in begun] == [3] * 3 and [len(tree.rewards) for tree in trees] == [8] * 3
    return [[tree.leaves, tree.rewards, [(n.path, n.tokens, n.stop) for n in tree.nodes]] for tree in trees]


def whole(trees: list[Tree]) -> list[Tree]:
    """The trees with their contents, on every rank."""
    return [Tree.from_dict(stored) for stored in everywhere(trees)]


def forked(generator: Generator, cfg: Config) -> list[list]:
    """A step of trees that branch at uncertain tokens, with leaves dealt to mixed prompts."""
    forks = {"branching.at": "fork", "branching.initial": (3, 3), "branching.fork.draw": "other"}
    leaves = {"leaves": "adaptive", "first_leaves": 3, "rollout_batch_size": 6, "dynamic_sampling": False}
    forest = step_of(generator, cfg, forks | leaves, prompts=6)
    trees = whole(forest.trees)
    return [[tree.leaves, tree.rewards, [(n.path, n.tokens, n.stop, n.fork) for n in tree.nodes]] for tree in trees]


def refilled(generator: Generator, cfg: Config) -> list:
    """A step in which prompts without signal are replaced: half of all, where two leaves toss a coin."""
    few = {"rollout_batch_size": 5, "n_samples_per_prompt": 2, "branching.factor": 2}
    forest = step_of(generator, cfg, few, prompts=7)
    kept = {name: value for name, value in forest.metrics.items() if not depends_on_time(name)}
    trees = whole(forest.trees)
    return [[[tree.prompt_id, tree.rewards, [(n.path, n.tokens) for n in tree.nodes]] for tree in trees], kept]


def step_of(generator: Generator, cfg: Config, changes: dict[str, Any], prompts: int) -> Forest:
    """A step of the collector over so many prompts, whose verdicts a model that knows nothing gets half right.

    The first engine is slow.
    """
    under = cfg.model_copy(update={"rollout": cfg.rollout.replace(changes | {"engine.max_num_seqs": 4})})
    coin = str(Path(__file__).with_name("coin.py")) + ":length_is_even"
    drawn = [Prompt(f"f{k}", "", [3 + k] * 20, "", coin, "test") for k in range(prompts)]
    engine, real = generator.engine, generator.engine.step
    if runtime_dist.rank() == 0:
        engine.step = lambda: (time.sleep(0.02), real())[1]  # type: ignore[method-assign]
    generator.cfg = under
    with RewardPool(under.reward) as pool:
        cursor = PromptCursor(drawn, seed=0, shuffle=False)
        forest = Collector(under, generator, pool, cursor, Timers()).collect(5)
    generator.cfg = cfg
    engine.step = real  # type: ignore[method-assign]
    return forest


def alone(generator: Generator, cfg: Config) -> list:
    """`forked` and `refilled` by this rank's engine, as in a launch of one rank.

    No round may follow, in which others take part.
    """
    with mock.patch.multiple(runtime_dist, rank=lambda: 0, world_size=lambda: 1):
        return [forked(generator, cfg), refilled(generator, cfg)]


def deadline_of_the_first_rank(generator: Generator, jobs: list[Job], store: dist.Store) -> None:
    """Both ranks of one engine go by the first one's clock: a rank that left alone would hang the other."""
    rank, real = dist.get_rank(), time.monotonic
    for late in (1, 0):
        queue = SharedQueue(store, f"{late} is late", [[0, 1, 2]], [1.0] * 3, 0, rank=rank, ranks=2, timeout_s=60)
        calls = itertools.count()
        # The clock of rank `late` leaps ahead once sampling has begun.
        clock = SimpleNamespace(monotonic=lambda n=calls, hit=late == rank: real() + 1e6 * (hit and next(n) > 4))
        in_flight.time = clock  # type: ignore[assignment]
        try:
            generator.grow(jobs, queue, step=1)
            ended = "whole"
        except in_flight.GenerationTimeout:
            ended = "timeout"
        in_flight.time = time
        assert ended == ("whole" if late else "timeout"), (rank, late, ended)
        assert not generator.engine.busy


def main(hf: Path, other: Path, tp: int) -> None:
    """Every check raises; rank 0 reports what the test compares between layouts."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank, world = dist.get_rank(), dist.get_world_size()
    cfg = parse_config(
        {
            "model": {"hf_checkpoint": str(hf)},
            "data": {"train": [{"reasoning_gym": "chain_sum"}], "max_prompt_len": 64},
            "rollout": {
                "n_samples_per_prompt": 6,
                "max_response_len": 48,
                "segment": {"length": 16},
                "engine": {"max_num_batched_tokens": 1024, "tensor_parallel_size": tp},
            },
        }
    )
    with a_segment_left_over(rank) if tp > 1 else contextlib.nullcontext():
        engine = Engine(hf, cfg)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "cpushm" in line]
    # Without AVX-512, vLLM's ranks have no shared memory and talk over gloo.
    assert bool(mapped) == (tp > 1 and hasattr(torch.ops._C, "init_shm_manager"))
    assert all("treepo-" in line and line.endswith("(deleted)") for line in mapped), "a killed run leaves no name"
    assert os.environ["LOCAL_WORLD_SIZE"] == str(world)
    generator = Generator(engine, cfg, AutoTokenizer.from_pretrained(hf))
    prompts = [SimpleNamespace(id=f"p{k}", tokens=[3 + k] * 33, data_source="test") for k in range(3)]
    # One engine a rank: the prompts come from a queue that both take from. One engine over both: the same on all.
    deal = deal_by_cost([1.0, 1.0, 1.0], world // tp)
    store = dist.PrefixStore("test", dist.distributed_c10d._get_default_store())
    queue = SharedQueue(store, "step 0", deal, [1.0] * 3, rank // tp, rank=rank % tp, ranks=tp, timeout_s=60)
    grown = generator.grow([Job(p) for p in prompts], queue, step=0)
    trees = [grown.trees[i] for i in sorted(grown.trees)]
    idle = generator.rollout([] if rank else prompts[:1], step=1) if tp == 1 else []
    assert len(idle) == (tp == 1 and rank == 0)
    evaluated = [evaluations(generator, cfg, slow) for slow in ((0, 1) if tp == 1 else (-1,))]
    if tp > 1:
        deadline_of_the_first_rank(generator, [Job(p) for p in prompts], store)
    whole = grown_on(generator, cfg)
    at_forks = forked(generator, cfg)
    at_refills = refilled(generator, cfg)
    by_one = alone(generator, cfg) if tp == 1 and rank == 0 else None
    write_weights(engine, other, tp=tp, tp_rank=rank % tp)
    scores = engine.score(prompts[0].tokens, 0.7)
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == world, "the trainer's process group survives the engine"
    paths: list[object] = [None] * world
    told = [[t.prompt_id, [(n.path, n.tokens, n.stop) for n in t.nodes]] for t in trees]
    dist.all_gather_object(paths, told)
    if rank == 0:
        parts = paths[:1] if tp > 1 else paths
        assert tp == 1 or paths[0] == paths[1]
        trees = sorted(t for part in parts for t in part)  # type: ignore[attr-defined]
        found = {"trees": trees, "scores": scores, "evaluated": evaluated, "grown_on": whole}
        print(json.dumps(found | {"forked": at_forks, "refilled": at_refills, "alone": by_one}))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # not through the engine's destructor, which tears the process group down under the other ranks


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
