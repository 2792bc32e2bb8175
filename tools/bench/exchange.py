"""What travels between ranks in a step, by rank and byte: the data plane of the 70B recipe, scaled down and by count.

    python tools/bench/exchange.py [--quick]

Measured: 8 and 16 gloo ranks on this machine, without models, in the layout of examples/llama3_70b_16x8.yaml scaled
down (TP 2 x PP 2, engines of two ranks), with trees of the recipe's shape (16 leaves, segments of 512 tokens, packs of
8,192 tokens; synthetic.py). Every buffer that a rank receives is counted. Each rank checks that the contents which
arrived are those that were sampled.

By count: 128 ranks (TP 8 x PP 4 x DP 4, 512 prompts, 16 optimizer steps) and 4,096 (DP 128, 16,384 prompts). A rank's
plan is made from structure as in training, and says who sends what to whom; nothing is sent.

Waiting: every third tree trains in the next step (rollout.oversample 1.5, rollout.surplus carry). It stays where it was
sampled, and goes to the ranks that train it. Compared with telling it to every rank whole, as it was done before, and
with what a checkpoint brings to rank 0, measured and by count.

The last line is JSON: {"cases": [{"ranks", "measured", "tokens" (unique, of the step), "segments", "bytes_per_token"
(received, a token that the rank trains), "bytes_per_segment" (to every rank), "max_bytes_per_rank" (received), "bound"
(8 bytes a token that it needs and has not sampled, and the other engines' columns), "max_sent_per_rank" (columns by a
binomial broadcast left out), "us_per_token" (CPU of encoding and decoding a token that the rank trains), "seconds"
(measured: the exchange; by count: the plan)}], "waiting": [{"ranks", "measured", "trees", "tokens",
"whole_bytes_per_rank" (received, if all ranks got them whole), "bytes_per_rank" (the most that a rank receives now),
"bound" (8 bytes a token that it needs and has not sampled), "saved_bytes_of_main" (at a checkpoint, rank 0),
"saved_bytes_of_others"}], "met"}. Bars: 12 bytes a token, 64 a segment, 1.05 of the bound, 0.1 us.
--quick leaves out 16 ranks and counts 4,096 with an eighth of the prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from exchange_job import BYTES_PER_TOKEN, Layout, Meter, configuration, join, on_ranks, plan  # noqa: E402
from exchange_waiting import measured_waiting, waiting_by_count  # noqa: E402
from synthetic import synthetic_tree  # noqa: E402
from treepo_mega.actor.fetch import Layout as Parcel  # noqa: E402
from treepo_mega.actor.fetch import deliver, hop  # noqa: E402
from treepo_mega.rollout.report import complete, heard, told  # noqa: E402
from treepo_mega.runtime import dist, parcels  # noqa: E402
from treepo_mega.runtime.packed import pack, unpack  # noqa: E402
from treepo_mega.tree.deal import Dealt  # noqa: E402
from treepo_mega.tree.node import Tree  # noqa: E402
from treepo_mega.tree.routing import no_experts  # noqa: E402
from treepo_mega.tree.segments import Segments  # noqa: E402
from treepo_mega.tree.stretches import Stretches  # noqa: E402

BARS = {"bytes_per_token": 12.0, "bytes_per_segment": 64.0, "over_bound": 1.05, "us_per_token": 0.1}


def trained_tokens(dealt: Sequence[Dealt], segments: Sequence[Segments], replica: int) -> int:
    """Tokens whose loss the replica counts."""
    total = 0
    for of_step, s in zip(dealt, segments, strict=True):
        entries = of_step.pieces.entries(of_step.per_rank[replica])
        counted = of_step.pieces.counted_of_entry[entries]
        total += int(s.length[of_step.pieces.segment_of_entry[entries]][counted].sum())
    return total


def sent_tokens(sizes: np.ndarray, layout: Layout) -> np.ndarray:
    """[ranks] tokens that each rank sends: as a home, and as one that passes parcels on."""
    replica_of_rank = layout.replica_of_rank()
    ranks_of = [
        [rank for rank, to in enumerate(replica_of_rank) if to == replica] for replica in range(layout.replicas)
    ]
    sent = np.zeros(layout.ranks, np.int64)
    for replica, home in zip(*np.nonzero(sizes), strict=True):
        for rank in ranks_of[replica]:
            if rank != home:
                sent[hop(int(home), rank, ranks_of[replica], 0).via] += sizes[replica, home]
    return sent


def by_count(layout: Layout, pool: Sequence[Tree], report_bytes: float) -> dict[str, Any]:
    """The plan of a large job, whose trees repeat those of `pool`."""
    trees = [pool[prompt % len(pool)] for prompt in range(layout.prompts)]
    begun = time.thread_time()
    _, segments, dealt, deliveries = plan(trees, layout, range(layout.prompts))
    sizes = deliveries.tokens_between(layout.replicas, layout.ranks)
    seconds = time.thread_time() - begun
    replica_of_rank = np.array(layout.replica_of_rank())
    of_rank = sizes[replica_of_rank].sum(1) - sizes[replica_of_rank, np.arange(layout.ranks)]
    nodes = sum(len(tree.nodes) for tree in trees)
    columns = report_bytes * nodes
    worst = int(of_rank.argmax())
    headers = parcels.HEADER.size * int((sizes[replica_of_rank[worst]] > 0).sum()) + 8 * layout.ranks
    bound = BYTES_PER_TOKEN * int(of_rank[worst]) + columns
    ratio = max(
        BYTES_PER_TOKEN * int(sizes[replica].sum()) / trained_tokens(dealt, segments, replica)
        for replica in {0, layout.replicas // 2, int(replica_of_rank[worst])}
    )
    return {
        "ranks": layout.ranks,
        "measured": False,
        "tokens": sum(tree.unique_tokens() for tree in pool) * layout.prompts // len(pool),
        "segments": nodes,
        "bytes_per_token": round(ratio, 2),
        "bytes_per_segment": round(report_bytes, 1),
        "max_bytes_per_rank": int(bound + headers),
        "bound": int(bound),
        "max_sent_per_rank": int(sent_tokens(sizes, layout).max()) * BYTES_PER_TOKEN,
        "seconds": round(seconds, 3),
    }


def best_of(act: Callable[[], None], repeats: int = 3) -> float:
    """The least CPU seconds of this thread that it takes."""
    best = float("inf")
    for _ in range(repeats):
        begun = time.thread_time()
        act()
        best = min(best, time.thread_time() - begun)
    return best


def work(rank: int, layout: Layout, port: int, answers: Any) -> None:
    """One gloo rank: its trees out, all structure in, its tokens in; what it measured."""
    join(rank, layout, port)
    cfg = configuration()
    jobs = [SimpleNamespace(prompt=SimpleNamespace(id=f"prompt-{prompt}")) for prompt in range(layout.prompts)]
    own_rows = {
        prompt: {"tree": complete(synthetic_tree(prompt), cfg, rank)}
        for prompt in range(layout.prompts)
        if layout.home(prompt) == rank
    }
    torch.distributed.barrier()
    meter = Meter()
    begun = time.monotonic()
    reports = dist.tell_all(told(own_rows) if own_rows else None)
    columns = {home: len(pack(of_home)) for home, of_home in reports.items()}
    rows: dict[int, Any] = {}
    for home, of_home in reports.items():
        rows |= heard(of_home, jobs, home=home)
    rows |= own_rows
    told_s = time.monotonic() - begun
    trees = [rows[prompt]["tree"] for prompt in range(layout.prompts)]
    steps, segments, dealt, deliveries = plan(trees, layout, range(layout.prompts))
    replica_of_rank = layout.replica_of_rank()
    begun = time.monotonic()
    own = [Stretches.of([trees[prompt] for prompt in chosen]) for chosen in steps]
    held = deliver(deliveries, own, replica_of_rank, timeout_s=120)
    seconds = told_s + time.monotonic() - begun
    received = meter.received
    replica = replica_of_rank[rank]
    for chosen, stretches, of_step in zip(steps, held, deliveries.wants, strict=True):
        sampled = Stretches.of([synthetic_tree(prompt) for prompt in chosen])
        for got, want in zip(
            stretches.take(of_step.of(replica=replica)), sampled.take(of_step.of(replica=replica)), strict=True
        ):
            if not np.array_equal(got, want):
                raise RuntimeError(f"rank {rank}: what arrived is not what was sampled")
    sizes = deliveries.tokens_between(layout.replicas, layout.ranks)
    needed = int(sizes[replica].sum() - sizes[replica, rank])
    trained = trained_tokens(dealt, segments, replica)

    # As an engine's trees without experts travel.
    parcel = Parcel(np.dtype("<f4"), no_experts(0))

    def encode() -> None:
        """Columns and parcels of this rank's trees."""
        if own_rows:
            pack(told(own_rows))
            again = [Stretches.of([trees[prompt] for prompt in chosen]) for chosen in steps]
            for to in np.flatnonzero(sizes[:, rank]).tolist():
                parcels.seal(*parcel.arrays(deliveries.contents(again, to, rank)))

    packed = {home: pack(of_home) for home, of_home in reports.items() if home != rank}
    homes = [home for home in np.flatnonzero(sizes[replica]).tolist() if home != rank]
    bodies = {home: memoryview(bytes(BYTES_PER_TOKEN * int(sizes[replica, home]))) for home in homes}
    at_home = {rank: deliveries.contents(own, replica, rank)} if sizes[replica, rank] else {}

    def decode() -> None:
        """All others' columns, and the parcels for this rank."""
        for home, data in packed.items():
            heard(unpack(data), jobs, home=home)
        for body in bodies.values():
            zlib.crc32(body)
        contents = {home: parcel.contents(body) for home, body in bodies.items()}
        deliveries.assemble(replica, contents | at_home)

    spent = best_of(encode) + best_of(decode)
    answers.put(
        {
            "rank": rank,
            "received": received,
            "bound": BYTES_PER_TOKEN * needed + sum(size for home, size in columns.items() if home != rank),
            "per_token": BYTES_PER_TOKEN * int(sizes[replica].sum()) / trained,
            "us": spent / trained * 1e6,
            "seconds": seconds,
            "columns": sum(columns.values()),
            "nodes": sum(len(tree.nodes) for tree in trees),
            "tokens": sum(tree.unique_tokens() for tree in trees),
            "sent": int(sent_tokens(sizes, layout)[rank]) * BYTES_PER_TOKEN,
        }
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measured(layout: Layout) -> dict[str, Any]:
    """`work` on all ranks."""
    said = on_ranks(work, layout)
    worst = max(said, key=lambda answer: answer["received"])
    first = said[0]
    return {
        "ranks": layout.ranks,
        "measured": True,
        "tokens": first["tokens"],
        "segments": first["nodes"],
        "bytes_per_token": round(max(answer["per_token"] for answer in said), 2),
        "bytes_per_segment": round(first["columns"] / first["nodes"], 1),
        "max_bytes_per_rank": worst["received"],
        "bound": worst["bound"],
        "max_sent_per_rank": max(answer["sent"] for answer in said),
        "us_per_token": round(max(answer["us"] for answer in said), 4),
        "seconds": round(max(answer["seconds"] for answer in said), 3),
    }


def met(case: dict[str, Any]) -> bool:
    """Whether a case is within all bars."""
    return (
        case["bytes_per_token"] <= BARS["bytes_per_token"]
        and case["bytes_per_segment"] <= BARS["bytes_per_segment"]
        and case["max_bytes_per_rank"] <= BARS["over_bound"] * case["bound"]
        and case.get("us_per_token", 0.0) <= BARS["us_per_token"]
    )


def main() -> int:
    """Measure, count and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without 16 ranks, and fewer prompts by count")
    args = parser.parse_args()
    cases = [
        measured(Layout(ranks, model=4, engine=2, prompts=4 * ranks // 2, steps=2))
        for ranks in ([8] if args.quick else [8, 16])
    ]
    cfg = configuration()
    numbers = range(8 if args.quick else 32)
    near = {number: {"tree": complete(synthetic_tree(number), cfg, 0)} for number in numbers}
    report = told(near)
    jobs = [SimpleNamespace(prompt=SimpleNamespace(id=f"prompt-{number}")) for number in near]
    pool = [row["tree"] for row in heard(report, jobs, home=0).values()]
    report_bytes = len(pack(report)) / sum(len(tree.nodes) for tree in pool)
    large = 16384 // (8 if args.quick else 1)
    for layout in (Layout(128, 32, 8, 512, 16), Layout(4096, 32, 8, large, 16)):
        cases.append(by_count(layout, pool, report_bytes))
    small = Layout(8, model=4, engine=2, prompts=16, steps=2)
    waiting = [measured_waiting(small)]
    waiting += [
        waiting_by_count(layout, pool) for layout in (Layout(128, 32, 8, 512, 16), Layout(4096, 32, 8, large, 16))
    ]
    for case in cases:
        print(
            f"{case['ranks']:5} ranks {'measured' if case['measured'] else 'by count'}: {case['tokens']:11} tokens, "
            f"{case['bytes_per_token']:5.2f} bytes a trained token, {case['bytes_per_segment']:5.1f} a segment to all, "
            f"{case['max_bytes_per_rank'] / 2**20:8.1f} MiB received "
            f"({case['max_bytes_per_rank'] / case['bound']:.3f} of the bound), "
            f"{case['max_sent_per_rank'] / 2**20:8.1f} MiB sent, {case['seconds']:.2f} s"
            + (f", {case['us_per_token']:.3f} us a token" if "us_per_token" in case else "")
        )
    for case in waiting:
        print(
            f"{case['ranks']:5} ranks {'measured' if case['measured'] else 'by count'}: {case['trees']:6} trees wait, "
            f"{case['tokens']:11} tokens: {case['bytes_per_rank'] / 2**20:8.2f} MiB to a rank that trains some, "
            f"{case['whole_bytes_per_rank'] / 2**20:8.1f} MiB if all got them whole; a checkpoint brings "
            f"{case['saved_bytes_of_main'] / 2**20:8.1f} MiB to rank 0, {case['saved_bytes_of_others']} bytes to others"
        )
    within = [case["bytes_per_rank"] <= BARS["over_bound"] * case["bound"] for case in waiting]
    passed = all(map(met, cases)) and all(within)
    print(json.dumps({"cases": cases, "waiting": waiting, "met": passed}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
