"""One rank of test_trees.py: trees through one layout after another, compared with transformers on flat sequences.

    trees_worker.py DIRECTORY CELLS.json [CASE...]

CELLS is a list of {"layout", "kind", "tied", "recompute", "depth", "split", ...} as test_trees.py makes it.
Neighbours of the same layout and model share an actor; those with "twins" are made of gpu_twins.py. Rank 0 writes what
it measured to DIRECTORY/results.json, one dict a cell, in order; and to updates.json, one dict a CASE of
update_cells.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.moe.moe_layer import MoELayer

from tests.actor.exact import measure_exact
from tests.actor.gpu_twins import pretend_gpu
from tests.actor.oracle import configuration, write_checkpoint
from tests.actor.tree_oracle import advantages, fill_in, flat_step, forest, prefixes_of_rows, regimes, relative
from tests.actor.update_cells import measure_update
from tests.ranks import leave_layout
from tests.tree.parts import assert_equal, sent
from tests.whole import whole_tensors
from treepo_mega.actor.batch import deal_batch, lay_out_batch, lesson_of, plan_batch
from treepo_mega.actor.fetch import Draft, fetch
from treepo_mega.actor.forward import run_schedule
from treepo_mega.actor.losses import PolicyLoss
from treepo_mega.actor.model import PolicyModel
from treepo_mega.actor.passes import correct_leaves
from treepo_mega.actor.update import Actor
from treepo_mega.checkpoint.load import local_params
from treepo_mega.config import Config
from treepo_mega.runtime import dist
from treepo_mega.tree.node import Tree
from treepo_mega.tree.pack import Batch, StepPlan
from treepo_mega.tree.segments import Segments

NAMES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "sp": "sequence_parallel",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def config_of(cell: dict[str, Any], hf_dir: Path) -> Config:
    """The cell's configuration; packs of 160 tokens cut the larger trees, packs of 4096 none."""
    parallel = {NAMES[k]: v for k, v in cell["layout"].items()} | (RECOMPUTE if cell["recompute"] else {})
    return configuration(
        hf_dir,
        *(f"parallel.{k}={v}" for k, v in parallel.items()),
        "parallel.use_distributed_optimizer=false",  # the reduced gradient is whole on every rank
        f"train.max_tokens_per_gpu={160 if cell['split'] else 4096}",
        f"train.prefix_sharing={cell.get('sharing', 'tree')}",
        "algo.use_tis=true",
        *([f"model.transformer_impl={cell['twins']}"] if "twins" in cell else []),
        *cell.get("overrides", ()),
    )


def plan(trees: list[Tree], cfg: Config) -> StepPlan:
    """This rank's packs of all of `trees` as one optimizer step."""
    segments = Segments.from_trees(trees, range(len(trees)), cfg.train.prefix_sharing)
    lesson = lesson_of(segments, advantages(trees), trees, cfg)
    whole = plan_batch(Batch(segments, lesson.credit()), cfg)
    assert_equal(plan_of_parts(trees, cfg), whole)
    return replace(whole, lesson=lesson)


def plan_of_parts(trees: list[Tree], cfg: Config) -> StepPlan:
    """The same of ranks that hold every n-th tree's contents and the structure of the others."""
    world = dist.world_size()
    parts = [
        tree if number % world == dist.rank() else far
        for number, (tree, far) in enumerate(zip(trees, sent(trees), strict=True))
    ]
    for number, tree in enumerate(parts):
        tree.home = number % world
    segments = Segments.from_trees(parts, range(len(parts)), cfg.train.prefix_sharing)
    batch = Batch(segments, lesson_of(segments, advantages(trees), trees, cfg).credit())
    dealt = deal_batch(batch, cfg)
    (batch,) = fetch([Draft(parts, batch, dealt)], parts, timeout_s=60)
    return lay_out_batch(batch, dealt, cfg)


def oracle(directory: Path, hf_dir: Path, cell: dict[str, Any], cfg: Config, trees: list[Tree]) -> dict[str, Any]:
    """The flat step, computed by rank 0 once and read by all."""
    parts = (cell["kind"], cell["tied"], cell["depth"], cell.get("seed", 0), *cell.get("overrides", ()))
    path = directory / f"oracle_{'_'.join(map(str, parts))}.pt"
    if dist.is_main() and not path.exists():
        torch.save(flat_step(hf_dir, cfg, trees, torch.float32), path)
    dist.barrier("the oracle", 120)
    return torch.load(path, weights_only=True)


def measure(actor: Actor, cfg: Config, cell: dict[str, Any], directory: Path, hf_dir: Path) -> dict[str, Any]:
    """Logprobs, loss, entropy and every parameter's gradient of one cell against the flat oracle."""
    trees = forest(cell["depth"], cell.get("seed", 0))
    want = oracle(directory, hf_dir, cell, cfg, trees)
    step = plan(trees, cfg)
    known = actor.logprobs(step.packs)
    far = 0.0
    for pack, got in zip(step.packs, known or (), strict=False):
        expected = np.array([want["logprobs"][p] for p in prefixes_of_rows(pack)])
        far = max(far, float(np.abs(got - expected).max(initial=0)))
    # As in training: only the last stage knows old logprobs, and all ranks judge by what it says.
    if known:
        fill_in(step.packs, want["logprobs"])
    _, corrections = correct_leaves([step], cfg.algo)
    fill_in(step.packs, want["logprobs"])
    for chunk in actor.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    data = run_schedule(actor.chunks, step.packs, actor.head, loss=PolicyLoss(cfg.algo))
    stats = actor._mean_over_pairs(data, step.packs)
    whole = whole_tensors(cfg, actor.spec, [{n: p.main_grad for n, p in m.named_parameters()} for m in actor.models])
    worst = max(relative(got.cpu(), want["grads"][n]) for n, got in whole.items())
    # Ranks of one data-parallel rank's model plan the same packs.
    share = ps.get_data_parallel_world_size() / dist.world_size()
    counts = dist.sum_over_ranks({"real": float(step.real_tokens), "flat": float(step.flat_tokens)})
    return dist.max_over_ranks({"logprob_diff": far, "gradient_diff": worst, "packs": float(len(step.packs))}) | {
        "noted": float(sum(map(noted, actor.chunks))),
        "loss_diff": abs(stats["loss"] - want["loss"]),
        "corrections": corrections,
        "leaves": sum(len(tree.leaves) for tree in trees),
        "entropy_diff": abs(stats["entropy"] - want["entropy"]),
        "token_ratio": counts["real"] / counts["flat"],
        "regimes": sorted(regimes(step.packs, want["logprobs"], cfg.algo)),
        "loss_scale": abs(want["loss"]),
        "repeated": counts["real"] * share - sum(t.unique_tokens() + len(t.prompt_tokens) for t in trees),
    }


def noted(chunk: torch.nn.Module) -> int:
    """Tensors of a pack's length that dispatchers of experts still hold, on which a graph may hang."""
    layers = [module for module in chunk.modules() if isinstance(module, MoELayer)]
    values = [value for layer in layers for value in vars(layer.token_dispatcher).values()]
    return sum(isinstance(value, torch.Tensor) and value.numel() > 64 for value in values)


def names(model: PolicyModel) -> dict[str, list[str]]:
    """What the first chunk calls its parameters, and what a checkpoint calls its tensors."""
    stored = model.sharded_state_dict().values()
    return {
        "parameters": sorted(local_params(model)),
        "stored": sorted(t.key for t in stored if isinstance(t, ShardedTensor)),
    }


def actor_of(cell: dict[str, Any]) -> list[Any]:
    """What of a cell its actor depends on: keys of the loss may differ between cells that share one."""
    keys = ("layout", "kind", "tied", "recompute", "exact", "twins")
    return [*(cell.get(key) for key in keys), [key for key in cell.get("overrides", ()) if key.startswith("model.")]]


def main() -> None:
    """All cells, in this process."""
    directory, cells = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    results, started = [], time.time()
    for _, group in itertools.groupby(cells, key=actor_of):
        same = list(group)
        first = same[0]
        hf_dir = directory / f"{first['kind']}_{first['tied']}"
        cfg = config_of(first, hf_dir)
        dist.initialize(cfg)
        if dist.is_main() and not (hf_dir / "config.json").exists():
            write_checkpoint(hf_dir, first["kind"], first["tied"])
        dist.barrier("the checkpoint", 60)
        if first.get("exact"):
            results.append(measure_exact(cfg, hf_dir))
            leave_layout()
            continue
        with pretend_gpu() if first.get("twins") else contextlib.nullcontext({}) as calls:
            actor = Actor(cfg, hf_dir)
            for cell in same:
                results.append(measure(actor, config_of(cell, hf_dir), cell, directory, hf_dir))
            results[-1]["fused"] = calls.get("fused", 0)
            results[-1] |= names(actor.models[0])
        leave_layout()
        if dist.is_main():
            print(f"{time.time() - started:6.1f} s", first, results[-1], flush=True)
    updates = {}
    for case in sys.argv[3:]:
        updates[case] = measure_update(case, directory)
        if dist.is_main():
            print(f"{time.time() - started:6.1f} s", case, updates[case], flush=True)
    if dist.is_main():
        (directory / "results.json").write_text(json.dumps(results))
        (directory / "updates.json").write_text(json.dumps(updates))
    dist.leave()


if __name__ == "__main__":
    main()
