"""What a step costs a rank beside sampling, grading and training: one core, one rank of a large job, no model.

    python tools/bench/overhead.py [--quick] [--prompts 512] [--ranks 128]

Synthetic trees (`synthetic.py`) of 16 leaves with about 4,000 tokens each are dealt to as many engines as ranks. One
rank is measured through all that follows sampling: what needs contents of its own trees (equal tokens, diversity),
telling them, hearing all others', metrics, advantages, credit, merging, dealing, sending, receiving, and laying out its
packs. Other ranks' part is made beside the clock. CPU seconds of one thread.

A table; the last line is JSON: {"prompts", "leaves", "tokens" (unique, of the step), "segments", "ranks",
"seconds": {part: s}, "total_s", "bar_s": 2.0, "met", "bytes_per_segment", "bytes_per_trained_token"}. --quick takes 128
prompts on 32 ranks: a rank's own share stays the same, and what grows with the step is a quarter.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from synthetic import Shape, synthetic_tree  # noqa: E402
from treepo_mega.actor.batch import advantages, lesson_of, sampled_sharing  # noqa: E402
from treepo_mega.config import load_config  # noqa: E402
from treepo_mega.rollout.counts import summarize  # noqa: E402
from treepo_mega.rollout.report import complete, heard, told  # noqa: E402
from treepo_mega.runtime.garbage import collection_put_off  # noqa: E402
from treepo_mega.runtime.packed import pack, unpack  # noqa: E402
from treepo_mega.runtime.parcels import seal  # noqa: E402
from treepo_mega.tree.credit import credit_by_depth  # noqa: E402
from treepo_mega.tree.deal import deal_forest  # noqa: E402
from treepo_mega.tree.descent import policy_mean  # noqa: E402
from treepo_mega.tree.merge import merge_equal, told_alike  # noqa: E402
from treepo_mega.tree.pack import Batch, lay_out  # noqa: E402
from treepo_mega.tree.segments import Segments  # noqa: E402
from treepo_mega.tree.stretches import Deliveries, Stretches, wanted  # noqa: E402

BAR_S = 2.0
BYTES_PER_TOKEN = 8
"""int32 and fp32."""
Result = TypeVar("Result")


class Clock:
    """CPU seconds of this thread by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, part: str, work: Callable[[], Result]) -> Result:
        """Do `work` and add its time to `part`."""
        gc.collect()
        begun = time.thread_time()
        result = work()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.thread_time() - begun
        return result


def metrics(trees: list[Any]) -> dict[str, float]:
    """The parts of a step's metrics that look at every tree."""
    counts = summarize(trees)
    counts["reward_policy"] = policy_mean(trees, lambda tree, index: tree.rewards[index])
    counts["accuracy_policy"] = policy_mean(trees, lambda tree, index: tree.verdicts[index])
    counts["length_policy"] = policy_mean(trees, lambda tree, index: tree.response_length(tree.leaves[index]))
    lengths = [tree.response_length(leaf) for tree in trees for leaf in tree.leaves]
    depths = [tree.nodes[leaf].depth for tree in trees for leaf in tree.leaves]
    return counts | {"length_mean": sum(lengths) / len(lengths), "depth_mean": sum(depths) / len(depths)}


def measure(prompts: int, ranks: int, shape: Shape) -> dict[str, Any]:
    """One rank's step."""
    cfg = load_config(
        None,
        [
            *("model.hf_checkpoint=unused", "data.train=[{path: unused}]", "train.prefix_sharing=content"),
            *(f"train.max_tokens_per_gpu={1 << 17}", f"rollout.n_samples_per_prompt={shape.leaves}"),
        ],
    )
    clock = Clock()
    rank = ranks // 2
    engine_of = [prompt * ranks // prompts for prompt in range(prompts)]
    jobs = [SimpleNamespace(prompt=SimpleNamespace(id=f"prompt-{prompt}")) for prompt in range(prompts)]
    own_rows = {p: {"tree": synthetic_tree(p, shape), "lost": 0} for p in range(prompts) if engine_of[p] == rank}

    def tell() -> bytes:
        for row in own_rows.values():
            complete(row["tree"], cfg, home=rank)
        return pack(told(own_rows))

    reports = {rank: clock("tell", tell)}
    for other in set(engine_of) - {rank}:
        rows = {p: {"tree": synthetic_tree(p, shape), "lost": 0} for p in range(prompts) if engine_of[p] == other}
        for row in rows.values():
            complete(row["tree"], cfg, home=other)
        reports[other] = pack(told(rows))

    def hear() -> dict[int, dict[str, Any]]:
        rows: dict[int, dict[str, Any]] = {}
        with collection_put_off():
            for home, report in reports.items():
                rows |= heard(unpack(report), jobs, home=home)
        return rows | own_rows

    rows = clock("hear", hear)
    trees = [rows[prompt]["tree"] for prompt in range(prompts)]
    clock("metrics", lambda: metrics(trees))
    values = clock("advantages", lambda: advantages(trees, cfg))
    segments = clock("segments", lambda: Segments.from_trees(trees, range(prompts), sampled_sharing(cfg)))
    lesson = clock("credit", lambda: lesson_of(segments, values, trees, cfg))
    credit = clock("credit", lesson.credit)
    clock("credit", lambda: credit_by_depth(segments, credit))
    batch = clock("merge", lambda: Batch(*merge_equal(segments, credit, told_alike(trees))))
    dealt = clock(
        "deal",
        lambda: deal_forest(batch.segments, dp_size=ranks, max_tokens=cfg.train.max_tokens_per_gpu, pair_cost=1e-4),
    )
    homes = np.array(engine_of)
    deliveries = clock("deal", lambda: Deliveries([wanted(batch.segments, dealt, homes)]))
    sizes = clock("deal", lambda: deliveries.tokens_between(ranks, ranks))
    own = clock("send", lambda: [Stretches.of(trees)])

    def send() -> None:
        for replica in np.flatnonzero(sizes[:, rank]).tolist():
            tokens, logprobs = deliveries.contents(own, replica, rank)
            seal(tokens.astype(np.int32), logprobs.astype(np.float32))

    clock("send", send)
    # What the others send: made from their trees, which this rank does not have.
    parcels = {}
    for home in np.flatnonzero(sizes[rank]).tolist():
        theirs = [synthetic_tree(p, shape) if engine_of[p] == home else trees[p] for p in range(prompts)]
        parcels[home] = deliveries.contents([Stretches.of(theirs)], rank, home)
    arrived = clock("receive", lambda: deliveries.assemble(rank, parcels))
    furnished = Batch(arrived[0].furnish(batch.segments), batch.credit)
    plan = clock("lay out", lambda: lay_out(furnished, dealt, dp_rank=rank))
    total = sum(clock.seconds.values())
    trained = int(sum(len(pack.target) for pack in plan.packs))
    return {
        "prompts": prompts,
        "leaves": sum(len(tree.leaves) for tree in trees),
        "tokens": sum(tree.unique_tokens() for tree in trees),
        "segments": sum(len(tree.nodes) for tree in trees),
        "ranks": ranks,
        "seconds": {part: round(seconds, 4) for part, seconds in clock.seconds.items()},
        "total_s": round(total, 3),
        "bar_s": BAR_S,
        "met": total <= BAR_S,
        "bytes_per_segment": round(sum(map(len, reports.values())) / sum(len(tree.nodes) for tree in trees), 1),
        "bytes_per_trained_token": round(int(sizes[rank].sum()) * BYTES_PER_TOKEN / max(1, trained), 2),
    }


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="128 prompts on 32 ranks")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=128)
    args = parser.parse_args()
    prompts, ranks = (128, 32) if args.quick else (args.prompts, args.ranks)
    if prompts % ranks:
        parser.error(f"--prompts {prompts} must be a multiple of --ranks {ranks}")
    result = measure(prompts, ranks, Shape())
    for part, seconds in result["seconds"].items():
        print(f"{part:<12} {seconds:8.3f} s")
    print(
        f"{'total':<12} {result['total_s']:8.3f} s (bar {BAR_S} s): {prompts} prompts, {result['segments']} segments, "
        f"{result['tokens']} tokens on {ranks} ranks; {result['bytes_per_segment']} bytes a segment to all, "
        f"{result['bytes_per_trained_token']} bytes a trained token to its rank"
    )
    print(json.dumps(result))
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
