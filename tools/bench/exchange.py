"""What travels between ranks in a step, by rank and byte: the data plane of the 70B recipe, scaled down and by count.

    python tools/bench/exchange.py [--quick]

Measured: 8 and 16 gloo ranks on this machine, without models, in the layout of examples/llama3_70b_16x8.yaml scaled
down (TP 2 x PP 2, engines of two ranks), with trees of the recipe's shape (16 leaves, segments of 512 tokens, packs of
8,192 tokens; synthetic.py). Every buffer that a rank receives is counted. Each rank checks that the contents which
arrived are those that were sampled.

By count: 128 ranks (TP 8 x PP 4 x DP 4, 512 prompts, 16 optimizer steps) and 4,096 (DP 128, 16,384 prompts). A rank's
plan is made from structure as in training, and says who sends what to whom; nothing is sent.

The last line is JSON: {"cases": [{"ranks", "measured", "tokens" (unique, of the step), "segments", "bytes_per_token"
(received, a token that the rank trains), "bytes_per_segment" (to every rank), "max_bytes_per_rank" (received), "bound"
(8 bytes a token that it needs and has not sampled, and the other engines' columns), "max_sent_per_rank" (columns by a
binomial broadcast left out), "us_per_token" (CPU of encoding and decoding a token that the rank trains), "seconds"
(measured: the exchange; by count: the plan)}], "met"}. Bars: 12 bytes a token, 64 a segment, 1.05 of the bound, 0.1 us.
--quick leaves out 16 ranks and counts 4,096 with an eighth of the prompts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from synthetic import synthetic_tree  # noqa: E402
from treepo_mega.actor.fetch import contents_of, deliver, hop  # noqa: E402
from treepo_mega.config import load_config  # noqa: E402
from treepo_mega.rollout.report import complete, heard, told  # noqa: E402
from treepo_mega.runtime import dist, parcels  # noqa: E402
from treepo_mega.runtime.packed import pack, unpack  # noqa: E402
from treepo_mega.tree.credit import Credit  # noqa: E402
from treepo_mega.tree.deal import Dealt, deal_forest  # noqa: E402
from treepo_mega.tree.merge import merge_equal, told_alike  # noqa: E402
from treepo_mega.tree.node import Tree  # noqa: E402
from treepo_mega.tree.pack import split_steps  # noqa: E402
from treepo_mega.tree.segments import Segments  # noqa: E402
from treepo_mega.tree.stretches import Deliveries, Stretches, wanted  # noqa: E402

MAX_TOKENS = 8192
BARS = {"bytes_per_token": 12.0, "bytes_per_segment": 64.0, "over_bound": 1.05, "us_per_token": 0.1}
BYTES_PER_TOKEN = 8


@dataclass(frozen=True)
class Layout:
    """A job: `model` ranks hold a replica together, `engine` ranks an engine."""

    ranks: int
    model: int
    engine: int
    prompts: int
    steps: int

    @property
    def replicas(self) -> int:
        """Data-parallel ranks."""
        return self.ranks // self.model

    def home(self, prompt: int) -> int:
        """The rank that speaks for the engine which samples the prompt."""
        engines = self.ranks // self.engine
        return prompt * engines // self.prompts * self.engine

    def replica_of_rank(self) -> list[int]:
        """As Megatron has them with TP innermost, DP next and PP outermost; TP is that of the engine."""
        width = self.engine * self.replicas
        return [rank % width // self.engine for rank in range(self.ranks)]


def plan(trees: Sequence[Tree], layout: Layout) -> tuple[list[list[int]], list[Segments], list[Dealt], Deliveries]:
    """The optimizer steps of a rollout from structure: prompts, segments, who trains what, who needs what."""
    homes = np.array([layout.home(prompt) for prompt in range(len(trees))])
    steps = split_steps(range(len(trees)), layout.steps)
    segments = []
    dealt = []
    for chosen in steps:
        of_step = [trees[prompt] for prompt in chosen]
        sampled = Segments.from_trees(of_step, chosen)
        nothing = np.zeros(len(sampled))
        merged, _ = merge_equal(
            sampled, Credit(nothing, nothing, nothing, np.zeros(len(sampled), np.int64)), told_alike(of_step)
        )
        segments.append(merged)
        dealt.append(deal_forest(merged, dp_size=layout.replicas, max_tokens=MAX_TOKENS, pair_cost=1e-4))
    return steps, segments, dealt, Deliveries([wanted(s, d, homes) for s, d in zip(segments, dealt, strict=True)])


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
    _, segments, dealt, deliveries = plan(trees, layout)
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


class Meter:
    """Bytes that this rank receives, counted where torch.distributed is called."""

    def __init__(self) -> None:
        self.received = 0
        real = {name: getattr(torch.distributed, name) for name in ("irecv", "broadcast", "all_gather")}

        def irecv(buffer: torch.Tensor, *args: Any, **named: Any) -> Any:
            """As torch's."""
            self.received += buffer.nbytes
            return real["irecv"](buffer, *args, **named)

        def broadcast(buffer: torch.Tensor, src: int, **named: Any) -> Any:
            """As torch's."""
            self.received += buffer.nbytes if src != torch.distributed.get_rank() else 0
            return real["broadcast"](buffer, src=src, **named)

        def all_gather(parts: list[torch.Tensor], own: torch.Tensor, **named: Any) -> Any:
            """As torch's."""
            self.received += sum(part.nbytes for part in parts) - own.nbytes
            return real["all_gather"](parts, own, **named)

        for name, counted in (("irecv", irecv), ("broadcast", broadcast), ("all_gather", all_gather)):
            setattr(torch.distributed, name, counted)


def configuration() -> Any:
    """What reports need to know."""
    settings = ("model.hf_checkpoint=unused", "data.train=[{path: unused}]", "train.prefix_sharing=content")
    return load_config(None, list(settings))


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
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(layout.ranks)
    torch.distributed.init_process_group("gloo")
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
    steps, segments, dealt, deliveries = plan(trees, layout)
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

    def encode() -> None:
        """Columns and parcels of this rank's trees."""
        if own_rows:
            pack(told(own_rows))
            again = [Stretches.of([trees[prompt] for prompt in chosen]) for chosen in steps]
            for to in np.flatnonzero(sizes[:, rank]).tolist():
                tokens, logprobs = deliveries.contents(again, to, rank)
                parcels.seal(tokens.astype(np.int32), logprobs.astype(np.float32))

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
        contents = {home: contents_of(body, np.dtype("<f4")) for home, body in bodies.items()}
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
    """The layout on that many processes, forked: nothing is imported twice."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    ranks = [
        context.Process(target=work, args=(rank, layout, port, answers), daemon=True) for rank in range(layout.ranks)
    ]
    for process in ranks:
        process.start()
    said = [answers.get(timeout=300) for _ in ranks]
    for process in ranks:
        process.join(60)
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
    for case in cases:
        print(
            f"{case['ranks']:5} ranks {'measured' if case['measured'] else 'by count'}: {case['tokens']:11} tokens, "
            f"{case['bytes_per_token']:5.2f} bytes a trained token, {case['bytes_per_segment']:5.1f} a segment to all, "
            f"{case['max_bytes_per_rank'] / 2**20:8.1f} MiB received "
            f"({case['max_bytes_per_rank'] / case['bound']:.3f} of the bound), "
            f"{case['max_sent_per_rank'] / 2**20:8.1f} MiB sent, {case['seconds']:.2f} s"
            + (f", {case['us_per_token']:.3f} us a token" if "us_per_token" in case else "")
        )
    passed = all(map(met, cases))
    print(json.dumps({"cases": cases, "met": passed}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
