"""Trees that wait for another step, for exchange.py: where their tokens go, measured between ranks and by count.

Every third tree of a step is left over (rollout.oversample 1.5, rollout.surplus carry) and trains in the next one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from exchange_job import BYTES_PER_TOKEN, Layout, Meter, configuration, join, on_ranks, plan  # noqa: E402
from synthetic import synthetic_tree  # noqa: E402
from treepo_mega.actor.fetch import deliver  # noqa: E402
from treepo_mega.rollout.contents import waiting_at_main  # noqa: E402
from treepo_mega.rollout.report import complete  # noqa: E402
from treepo_mega.runtime import dist, parcels  # noqa: E402
from treepo_mega.runtime.packed import pack  # noqa: E402
from treepo_mega.tree.columns import from_columns, to_columns  # noqa: E402
from treepo_mega.tree.node import Tree  # noqa: E402
from treepo_mega.tree.stretches import Stretches  # noqa: E402


def waiting_prompts(layout: Layout) -> list[int]:
    """Those whose trees train in the next step."""
    return list(range(2, layout.prompts, 3))


def work_waiting(rank: int, layout: Layout, port: int, answers: Any) -> None:
    """One gloo rank: trees that wait for another step to all ranks, to who trains them, and to rank 0; what it got."""
    join(rank, layout, port)
    prompts = waiting_prompts(layout)
    trees = []
    for prompt in prompts:
        tree = complete(synthetic_tree(prompt), configuration(), layout.home(prompt))
        (far,) = from_columns(to_columns([tree]), [tree.prompt_id])
        far.home = tree.home
        trees.append(tree if tree.home == rank else far)
    torch.distributed.barrier()
    meter = Meter()
    own = [tree.to_dict() for tree in trees if tree.home == rank]
    dist.tell_all(own or None)
    whole = meter.take()
    steps, _, _, deliveries = plan(trees, layout, prompts)
    replica_of_rank = layout.replica_of_rank()
    deliver(
        deliveries,
        [Stretches.of([trees[place] for place in chosen]) for chosen in steps],
        replica_of_rank,
        timeout_s=120,
    )
    received = meter.take()
    at_main = waiting_at_main([], trees, timeout_s=120)["surplus"]
    saved = meter.take()
    if rank == 0:
        expected = [synthetic_tree(prompt).nodes for prompt in prompts]
        if [Tree.from_dict(stored).nodes for stored in at_main] != expected:
            raise RuntimeError("what would be saved is not what was sampled")
    sizes = deliveries.tokens_between(layout.replicas, layout.ranks)[replica_of_rank[rank]]
    answers.put(
        {
            "whole": whole,
            "received": received,
            "bound": BYTES_PER_TOKEN * int(sizes.sum() - sizes[rank]),
            "saved": saved,
            "rank": rank,
            "tokens": sum(tree.unique_tokens() for tree in trees),
        }
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measured_waiting(layout: Layout) -> dict[str, Any]:
    """`work_waiting` on all ranks."""
    said = on_ranks(work_waiting, layout)
    worst = max(said, key=lambda answer: answer["received"])
    return {
        "ranks": layout.ranks,
        "measured": True,
        "trees": len(waiting_prompts(layout)),
        "tokens": worst["tokens"],
        "whole_bytes_per_rank": max(answer["whole"] for answer in said),
        "bytes_per_rank": worst["received"],
        "bound": worst["bound"],
        "saved_bytes_of_main": max(answer["saved"] for answer in said if answer["rank"] == 0),
        "saved_bytes_of_others": max(answer["saved"] for answer in said if answer["rank"]),
    }


def waiting_by_count(layout: Layout, pool: Sequence[Tree]) -> dict[str, Any]:
    """The same of a large job, whose trees repeat those of `pool`."""
    prompts = waiting_prompts(layout)
    trees = [pool[prompt % len(pool)] for prompt in prompts]
    _, _, _, deliveries = plan(trees, layout, prompts)
    sizes = deliveries.tokens_between(layout.replicas, layout.ranks)
    replica_of_rank = np.array(layout.replica_of_rank())
    of_rank = sizes[replica_of_rank].sum(1) - sizes[replica_of_rank, np.arange(layout.ranks)]
    worst = int(of_rank.argmax())
    bound = BYTES_PER_TOKEN * int(of_rank[worst])
    packed = [len(pack([synthetic_tree(number).to_dict()])) for number in range(len(pool))]
    whole = sum(packed[prompt % len(pool)] for prompt in prompts)
    sizes_told = 8 * layout.ranks
    return {
        "ranks": layout.ranks,
        "measured": False,
        "trees": len(trees),
        "tokens": sum(tree.unique_tokens() for tree in trees),
        "whole_bytes_per_rank": whole + sizes_told,
        "bytes_per_rank": bound + parcels.HEADER.size * int((sizes[replica_of_rank[worst]] > 0).sum()) + sizes_told,
        "bound": bound,
        "saved_bytes_of_main": whole + sizes_told,
        "saved_bytes_of_others": sizes_told,
    }
