"""How long planning a step takes: trees to packs, in pure Python and NumPy, against the number of trees.

    python tools/bench/pack.py [--quick] [--trees 4096] [--tokens 2]

Trees have 16 leaves, each 18 segments below the prompt, branching by two at the first four borders (255 nodes a tree
with the prompt: 4,096 trees are about a million segments). Timed apart: reading the trees into arrays (Python objects,
proportional to segments and tokens), and planning (folding advantages, cutting, dealing, laying out one of 64
data-parallel ranks). Sizes double, so that linear cost shows as doubling
times. CPU seconds of the one thread, so that other jobs on shared cores do not count.

Last line, JSON: {"sizes": [{"trees", "segments", "tokens", "read_s", "plan_s", "total_s"}], "largest_total_s",
"growth" (total of the largest / total of the one before it; 2 is linear), "bar_s": 2.0, "met"}. --quick is the same:
it takes seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time

import numpy as np

from treepo_mega.tree.credit import fold, leaf_weights
from treepo_mega.tree.node import Tree
from treepo_mega.tree.pack import Batch, plan_step
from treepo_mega.tree.segments import Segments

LEVELS, DEPTH, PROMPT = 4, 18, 16
BAR_S = 2.0


def grow(tokens: int, name: str) -> Tree:
    """One tree; all segments share their lists of tokens, which nothing writes to."""
    tree = Tree.start(name, list(range(PROMPT)))
    ids, logprobs = list(range(tokens)), [-1.0] * tokens
    ends = [0]
    for depth in range(DEPTH):
        made = []
        for end in ends:
            for _ in range(2 if depth < LEVELS else 1):
                node = tree.add_child(end)
                node.tokens, node.logprobs = ids, logprobs
                made.append(node.id)
        ends = made
    tree.leaves, tree.rewards = ends, [float(i % 2) for i in range(len(ends))]
    return tree


def measure(trees: list[Tree], ranks: int) -> dict[str, float]:
    """Times of one size, best of three (the garbage collector is told to stay out of it)."""
    best: dict[str, float] = {}
    for _ in range(3):
        gc.collect()
        gc.disable()
        started = time.process_time()
        s = Segments.from_trees(trees, range(len(trees)))
        read = time.process_time() - started
        values = np.resize([1.0, -1.0], len(s.leaf_number))
        credit = fold(s, values, leaf_weights("token-mean", s.flat_lengths()))
        plan = plan_step(Batch(s, credit), dp_size=ranks, dp_rank=0, max_tokens=4096, pair_cost=1e-3)
        total = time.process_time() - started
        gc.enable()
        if not best or total < best["total_s"]:
            best = {"read_s": read, "plan_s": total - read, "total_s": total}
    if sum(p.pairs for p in plan.packs) == 0:
        raise RuntimeError("nothing was planned")
    counts = {"trees": len(trees), "segments": len(s), "tokens": int(s.length.sum())}
    return counts | best


def main() -> int:
    """Measure and print; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="the same: it takes seconds")
    p.add_argument("--trees", type=int, default=4096)
    p.add_argument("--tokens", type=int, default=2, help="tokens in a segment")
    args = p.parse_args()
    forest = [grow(args.tokens, f"p{i}") for i in range(args.trees)]
    rows = []
    print(f"{'trees':>7}{'segments':>10}{'tokens':>10}{'read s':>9}{'plan s':>9}{'total s':>9}{'us/segment':>12}")
    for size in (args.trees // 8, args.trees // 4, args.trees // 2, args.trees):
        rows.append(r := measure(forest[:size], ranks=64))
        print(
            f"{r['trees']:>7}{r['segments']:>10}{r['tokens']:>10}{r['read_s']:>9.3f}{r['plan_s']:>9.3f}"
            f"{r['total_s']:>9.3f}{1e6 * r['total_s'] / r['segments']:>12.3f}",
            flush=True,
        )
    last = rows[-1]["total_s"]
    out = {"sizes": rows, "largest_total_s": last, "growth": last / rows[-2]["total_s"], "bar_s": BAR_S}
    print(json.dumps(out | {"met": last < BAR_S}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
