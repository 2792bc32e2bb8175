"""Ranks of test_routing.py. `routing_worker.py engine DIRECTORY`: a real engine's routing in the actor, on one rank.
`routing_worker.py layouts DIRECTORY`: any routing, in layouts of this many ranks. `routing_worker.py turns DIRECTORY`:
an engine over these ranks that reads observations between turns, and an actor with the experts shared out among them.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from megatron.core import parallel_state as ps

from tests.actor.oracle import configuration as actor_configuration
from tests.actor.oracle import trajectories, write_checkpoint
from tests.ranks import leave_layout, report_found
from tools.bench.moe_replay import batch_of, configuration, measure, routed, sample, write_model
from treepo_mega.actor.forward import count_multiple, padding_multiple, run_schedule
from treepo_mega.actor.losses import PolicyLoss
from treepo_mega.actor.model import equal_lengths
from treepo_mega.actor.moe import routers
from treepo_mega.actor.passes import optimizer_steps
from treepo_mega.actor.routing import take_routing
from treepo_mega.actor.update import Actor
from treepo_mega.engine.engine import Engine
from treepo_mega.engine.routing import RoutingNotes
from treepo_mega.engine.stream import EngineError
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.runtime import dist
from treepo_mega.tree.node import Tree
from treepo_mega.tree.pack import Pack, StepPlan, plan_step
from treepo_mega.tree.routing import unnoted
from treepo_mega.tree.stop import TurnRules

RECOMPUTED = [
    "parallel.recompute_granularity=full",
    "parallel.recompute_method=uniform",
    "parallel.recompute_num_layers=1",
]
TP = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PP = ["parallel.pipeline_model_parallel_size=2"]
LAYOUTS = {
    "tp2 sp": TP,
    "pp2": PP,
    "pp2 recomputed": PP + RECOMPUTED,
    "pp2 vpp2 recomputed": [*PP, "parallel.virtual_pipeline_model_parallel_size=2", *RECOMPUTED],
    "cp2": ["parallel.context_parallel_size=2"],
    "dp2 ep2 recomputed": ["parallel.expert_model_parallel_size=2", *RECOMPUTED],
}


def with_engine(directory: Path) -> dict[str, object]:
    """Trees of a real engine, scored and trained on; bf16, so that the actor by itself would choose otherwise."""
    hf_dir = write_model(directory / "model", layers=3, experts=8, top_k=2)
    cfg = configuration(hf_dir, "bf16")
    dist.initialize(cfg)
    engine = Engine(hf_dir, cfg, seed=0)
    trees = sample(engine, cfg, 3)
    noted = [len(node.tokens) - len(node.experts) for tree in trees for node in tree.nodes if node.children]
    actor = Actor(cfg, hf_dir)
    found = measure(trees, actor, cfg)
    take_routing(actor.models)
    packs = plan_step(batch_of(trees), dp_size=1, dp_rank=0, max_tokens=cfg.train.max_tokens_per_gpu).packs
    for pack in packs:
        pack.on_policy = True
    metrics = optimizer_steps(actor, [StepPlan(packs)], PolicyLoss(cfg.algo))
    worker = engine._llm.collective_rpc("note_routing", args=(ModelSpec.from_hf(hf_dir),))[0]._runner
    try:
        RoutingNotes(_Worker(worker), replace(ModelSpec.from_hf(hf_dir), num_layers=4))
        refused = ""
    except EngineError as error:
        refused = str(error)
    return found | {
        "missing_above_children": max(noted),
        "trees": len(trees),
        "leaves": sum(len(tree.leaves) for tree in trees),
        "update": {name: metrics[name] for name in ("train/routing_differs", "rollout/routing_noted")},
        "update_mismatch": metrics["rollout/logprob_abs_diff_mean"],
        "refused": refused,
    }


def over_turns(directory: Path) -> dict[str, object]:
    """Trees over turns, sampled by one engine over all ranks, in fp32: actor and engine should choose alike."""
    hf_dir = directory / "model"
    size = int(os.environ["WORLD_SIZE"])
    cfg = configuration(
        hf_dir,
        "fp32",
        "data.max_prompt_len=200",
        f"rollout.engine.tensor_parallel_size={size}",
        f"parallel.expert_model_parallel_size={size}",
    )
    dist.initialize(cfg)
    if dist.is_main():
        write_model(hf_dir, layers=3, experts=8, top_k=2)
    dist.barrier("the checkpoint", 60)
    engine = Engine(hf_dir, cfg, seed=0)

    def answer(tree: Tree, node_id: int) -> list[int]:
        """Longer than a block of the cache at times, and another for each path."""
        rng = np.random.default_rng(list(tree.nodes[node_id].path))
        return rng.integers(3, engine.vocab_size, int(rng.integers(5, 40))).tolist()

    # A sixth of the vocabulary ends a turn. The window of a prompt has room for what is observed.
    ends = range(0, engine.vocab_size, 6)
    trees = sample(engine, cfg, 4, ends=ends, turns=TurnRules(3, 120), answer=answer)
    on_ranks = dist.gather_objects([[node.experts.ids.tolist() for node in tree.nodes] for tree in trees])
    observed = [node for tree in trees for node in tree.nodes if node.observation and node.children]
    found = measure(trees, Actor(cfg, hf_dir), cfg)
    return found | {
        "ranks_differ": sum(told != on_ranks[0] for told in on_ranks),
        "observations": len(observed),
        "observed_tokens": sum(len(node.tokens) for node in observed),
        "observed_unnoted": sum(len(node.tokens) - len(node.experts) for node in observed),
    }


class _Worker:
    """A worker of vLLM, as far as `RoutingNotes` reads it."""

    def __init__(self, model_runner: object) -> None:
        self.model_runner = model_runner


def ours(pack: Pack, *, sequence_parallel: bool) -> np.ndarray:
    """[t, layers, top_k] of the tokens that this rank's routers see."""
    assert pack.experts is not None
    ids = pack.experts if pack.local is None else pack.experts[pack.local]
    share = len(ids) // ps.get_tensor_model_parallel_world_size() if sequence_parallel else len(ids)
    first = ps.get_tensor_model_parallel_rank() * share if sequence_parallel else 0
    return ids[first : first + share]


def in_layout(overrides: list[str], directory: Path) -> dict[str, float]:
    """Random experts replayed in an update: routings that are not those of the pack, and how many were looked at."""
    hf_dir = directory / "checkpoint"
    cfg = actor_configuration(hf_dir, *overrides, "rollout.routing_replay=all", "algo.kl_loss_coef=0")
    dist.initialize(cfg)
    if dist.is_main() and not (hf_dir / "config.json").exists():
        write_checkpoint(hf_dir, "qwen3_moe", tied=False)
    dist.barrier("the checkpoint", 60)
    spec = ModelSpec.from_hf(hf_dir)
    actor = Actor(cfg, hf_dir)
    packs = plan_step(
        trajectories(),
        dp_size=ps.get_data_parallel_world_size(),
        dp_rank=ps.get_data_parallel_rank(),
        max_tokens=80,
        multiple=padding_multiple(cfg),
        count_multiple=count_multiple(cfg),
        equal_lengths=equal_lengths(cfg),
        cp_size=ps.get_context_parallel_world_size(),
        cp_rank=ps.get_context_parallel_rank(),
    ).packs
    for number, pack in enumerate(packs):
        # The same on all ranks that compute the pack.
        rng = np.random.default_rng([number, ps.get_data_parallel_rank()])
        order = rng.random((len(pack.tokens), spec.num_layers, spec.num_experts)).argsort(-1)
        pack.experts = order[..., : spec.experts_per_token].astype(np.uint8)
        pack.experts[rng.random(len(pack.tokens)) < 0.2] = unnoted(np.uint8)
        pack.on_policy = True
    actor.optimizer.zero_grad()
    for chunk in actor.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    with routed(actor) as seen:
        run_schedule(actor.chunks, packs, actor.head, loss=PolicyLoss(cfg.algo), replay=True)
    recomputes = cfg.parallel.recompute_granularity == "full"
    expected = [ours(pack, sequence_parallel=cfg.parallel.sequence_parallel) for pack in packs]
    found = {"differs": 0.0, "compared": 0.0, "left": 0.0, "routers_unmoved": 0.0}
    for router, calls in zip(routers(actor.models), seen, strict=True):
        # Forward passes go through the micro-batches in order, and backward passes, which recompute, do too.
        for wanted in {True, not recomputes}:
            of_pass = [call.chosen for call in calls if call.gradients == wanted]
            for ids, chosen in zip(expected, of_pass, strict=True):
                known = ids[:, 0, 0] != unnoted(np.uint8)
                engine = np.zeros((len(ids), spec.num_experts), bool)
                np.put_along_axis(
                    engine, np.where(known[:, None], ids[:, router.layer_number - 1], 0).astype(int), True, 1
                )
                found["differs"] += float((engine[known] != chosen[known]).any(1).sum())
                found["compared"] += float(known.sum())
                # The others are routed, by their own logits.
                found["left"] += float((chosen[~known].sum(1) == spec.experts_per_token).sum())
        found["routers_unmoved"] += float(router.weight.main_grad.abs().sum() == 0)
    out = dist.sum_over_ranks(found)
    leave_layout()
    return out


def main() -> None:
    kind, directory = sys.argv[1], Path(sys.argv[2])
    if kind == "layouts":
        report_found({name: in_layout(overrides, directory) for name, overrides in LAYOUTS.items()})
        return
    report_found({"engine": with_engine, "turns": over_turns}[kind](directory))


if __name__ == "__main__":
    main()
