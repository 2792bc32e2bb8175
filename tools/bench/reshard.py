"""How fast do new weights reach the engines, against gathering everything, and against a plain copy?

    python tools/bench/reshard.py [--quick] [--repeats 5]

Starts four ranks (gloo, one thread each) on this machine. Every case moves a model of about 135M parameters, random
weights, from a Megatron layout into tensors that have the names and shapes of a vLLM worker's parameters:

- ours: the plan of `treepo_mega/reshard/plan.py`, carried out by `execute.py`: within a node ranks read each other's
  buffers in shared memory
- links: the same plan over gloo alone, as between nodes, so that the gain of the plan shows apart from that of memory
- gather: every rank collects every Hugging Face tensor, then copies its slices out of them, as most systems do before
  the engine's `load_weights`. The faster of two ways: tensor by tensor (all_gather over TP, broadcast from the pipeline
  stage that holds it), and in buckets (one all_gather of what every rank contributes to a round)
- memcpy: each rank copies as many bytes as its engine holds from one buffer into another

They alternate in the same processes; a time is the median over repeats of the slowest rank. Packing of weights is
the engine's own and the same for all of them, and not part of this: the metric reshard/pack_s of a run has it.

Peak memory is what the process's resident set grew by during one reshard, sampled every millisecond, besides the
destination, plus this rank's shared buffers; the bucket is `--bucket-mb`.

Last line, JSON: {"cases": [{"name", "bytes_moved", "bytes_over_bound", "seconds", "gather_seconds", "memcpy_seconds",
"gather_way", "gather_each_seconds", "gather_bucketed_seconds", "time_vs_gather", "time_vs_memcpy", "links_seconds",
"links_time_vs_gather", "peak_bytes", "links_peak_bytes", "gather_peak_bytes", "peak_over_bucket",
"links_peak_over_bucket"}], "bucket_bytes"}.
time_vs_gather = gather_seconds / seconds (more is better), links_time_vs_gather = gather_seconds / links_seconds: both
over gloo; time_vs_memcpy = seconds / memcpy_seconds (1 is as fast as a copy), peak_over_bucket = peak_bytes /
bucket_bytes. Progress goes to stderr; the five cases take some minutes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = {
    "hidden_size": 576, "num_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
# SmolLM2 has three key/value heads, so Megatron cannot split it in two: the same size with heads that can be split.
EVEN = SMOLLM2 | {"hidden_size": 512, "num_layers": 32, "num_attention_heads": 8, "num_key_value_heads": 4,
                  "intermediate_size": 1664}  # fmt: skip
CASES = [
    # name, model, TP, PP, engine TP
    ("135M TP2 PP2 -> TP_v 2", EVEN, 2, 2, 2),
    ("135M TP2 PP2 -> TP_v 1", EVEN, 2, 2, 1),
    ("135M TP4 -> TP_v 4", EVEN, 4, 1, 4),
    ("135M PP4 -> TP_v 2", EVEN, 1, 4, 2),
    ("SmolLM2-135M PP2 DP2 -> TP_v 1", SMOLLM2, 1, 2, 1),
]


def arguments() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="two cases, three repeats")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--bucket-mb", type=int, default=16)
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return p.parse_args()


def main() -> int:
    """Start the ranks, or be one."""
    args = arguments()
    if args.worker:
        worker(args)
        return 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [*launcher, __file__, "--worker", *sys.argv[1:]]
    return subprocess.run(command, env=env, timeout=900, check=False).returncode


def worker(args: argparse.Namespace) -> None:
    """One rank."""
    import torch.distributed as torch_dist

    from treepo_mega.runtime import dist

    torch_dist.init_process_group("gloo")
    connect()
    cases, repeats = (CASES[:2], 3) if args.quick else (CASES, args.repeats)
    rows, started = [], time.perf_counter()
    for number, case in enumerate(cases, 1):
        if dist.is_main():
            spent = time.perf_counter() - started
            print(f"case {number} of {len(cases)}: {case[0]} ({spent:.0f} s so far)", file=sys.stderr, flush=True)
        rows.append(Case(*case, bucket_bytes=args.bucket_mb << 20).measure(repeats))
    if dist.is_main():
        show(rows)
        print(json.dumps({"cases": rows, "bucket_bytes": args.bucket_mb << 20}), flush=True)
    dist.barrier("the end", 60)
    dist.leave()


def connect() -> None:
    """Let every pair of ranks meet once: what gloo allocates for a connection belongs to no case."""
    import torch
    import torch.distributed as torch_dist

    me, others = torch_dist.get_rank(), range(torch_dist.get_world_size())
    sent, received = torch.zeros(1 << 20), torch.zeros(len(others), 1 << 20)
    ops = [torch_dist.P2POp(torch_dist.isend, sent, r) for r in others if r != me]
    ops += [torch_dist.P2POp(torch_dist.irecv, received[r], r) for r in others if r != me]
    for work in torch_dist.batch_isend_irecv(ops):
        work.wait()


def show(rows: list[dict]) -> None:
    """The table for people."""
    columns = (
        ("MB moved", 9, lambda r: f"{r['bytes_moved'] / 1e6:.1f}"),
        ("/bound", 8, lambda r: f"{r['bytes_over_bound']:.2f}"),
        ("ours ms", 9, lambda r: f"{r['seconds'] * 1e3:.0f}"),
        ("links", 7, lambda r: f"{r['links_seconds'] * 1e3:.0f}"),
        ("gather", 8, lambda r: f"{r['gather_seconds'] * 1e3:.0f}"),
        ("memcpy", 8, lambda r: f"{r['memcpy_seconds'] * 1e3:.0f}"),
        ("x gather", 10, lambda r: f"{r['time_vs_gather']:.1f}"),
        ("(links)", 8, lambda r: f"{r['links_time_vs_gather']:.1f}"),
        ("x memcpy", 10, lambda r: f"{r['time_vs_memcpy']:.2f}"),
        ("peak/bucket", 13, lambda r: f"{r['peak_over_bucket']:.2f}"),
        ("(links)", 8, lambda r: f"{r['links_peak_over_bucket']:.2f}"),
        ("gather peak MB", 16, lambda r: f"{r['gather_peak_bytes'] / 1e6:.0f}"),
    )
    print(f"{'case':<34}" + "".join(f"{name:>{width}}" for name, width, _ in columns))
    for r in rows:
        print(f"{r['name']:<34}" + "".join(f"{text(r):>{width}}" for _, width, text in columns))


class Case:
    """One model and pair of layouts, with everything built; see `measure`."""

    def __init__(self, name: str, sizes: dict, tp: int, pp: int, tp_v: int, *, bucket_bytes: int) -> None:
        import torch

        from treepo_mega.modelspec.mcore_layout import ModelSpec, chunk_layouts, hf_shapes
        from treepo_mega.reshard.execute import Resharder, TensorTarget
        from treepo_mega.reshard.sides import Grid, mcore_side, vllm_side
        from treepo_mega.runtime import dist

        self.name, self.bucket_bytes = name, bucket_bytes
        self.world, self.rank = dist.world_size(), dist.rank()
        spec, grid = ModelSpec("LlamaForCausalLM", **sizes), Grid(tp, pp)
        self.source, self.wanted = mcore_side(spec, grid, self.world), vllm_side(spec, tp_v, self.world)
        self.shapes, dtype = hf_shapes(spec), torch.bfloat16
        connect = functools.partial(
            Resharder.between,
            self.source,
            self.wanted,
            source_dtype=dtype,
            target_dtype=dtype,
            bucket_bytes=bucket_bytes,
            timeout_s=60,
            device=torch.device("cpu"),
        )
        self.resharder, self.by_links = connect(), connect(shared_memory=False)
        self.plan = self.resharder.plan
        # The same values on every replica, so that results can be compared by bits.
        generator = torch.Generator().manual_seed(0)
        full = {n: torch.randn(s, generator=generator).to(dtype) for n, s in self.shapes.items()}
        self.held = self._filled(full, self.source.of(self.rank))
        self.expected = self._filled(full, self.wanted.of(self.rank))
        del full
        self.got = [{n: torch.zeros_like(t) for n, t in params.items()} for params in self.expected]
        self.target = TensorTarget(self.got)
        self.replica, self.tp_group, self.pp_group, coords = groups(self.world, tp, pp, self.rank)
        layouts = [chunk_layouts(spec, tp=tp, pp=pp, tp_rank=t, pp_rank=p) for t, p in coords]
        self.gather = BucketedGather(layouts, self.shapes, self.replica, dtype, bucket_bytes)
        size = sum(t.nbytes for params in self.expected for t in params.values())
        self.copy_from, self.copy_to = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)

    def _filled(self, full: dict, chunks) -> list[dict]:
        import torch

        out = []
        for params in chunks:
            out.append({n: torch.zeros(p.shape, dtype=torch.bfloat16) for n, p in params.items()})
            for name, p in params.items():
                for b in p.blocks:
                    out[-1][name][b.local_index] = full[b.hf_name][b.hf_index]
        return out

    def measure(self, repeats: int) -> dict:
        """Alternate the ways `repeats` times after one warm-up each; checks every result by bits."""
        from treepo_mega.runtime import dist

        ways = {
            "ours": self.ours,
            "links": self.links,
            "each": self.gather_each,
            "bucketed": self.gather_bucketed,
            "memcpy": self.memcpy,
        }
        times: dict[str, list[float]] = {w: [] for w in ways}
        peaks: dict[str, int] = {}
        for turn in range(repeats + 1):
            for way, work in ways.items():
                self._clear()
                dist.barrier(way, 60)
                if turn == 0:
                    peaks[way] = peak_growth(work)
                    if way != "memcpy":
                        self._check(way)
                    continue
                started = time.perf_counter()
                work()
                times[way].append(time.perf_counter() - started)
        slowest = {w: [dist.max_over_ranks({"t": t})["t"] for t in ts] for w, ts in times.items()}
        middle = {w: statistics.median(ts) for w, ts in slowest.items()}
        peak = {w: int(dist.max_over_ranks({"b": float(b)})["b"]) for w, b in peaks.items()}
        gather = min(("each", "bucketed"), key=middle.__getitem__)
        moved = dist.sum_over_ranks({"b": float(self.moved)})["b"]
        bound = self.plan.traffic().bound
        # Shared buffers are not anonymous memory, hence added. Those of the links are, and are first touched here.
        own = peak["ours"] + self.resharder.transport.buffer_bytes
        links = max(peak["links"], self.by_links.transport.buffer_bytes)
        return {
            "name": self.name,
            "bytes_moved": int(moved),
            "bytes_over_bound": moved / bound if bound else float(moved == 0),
            "seconds": middle["ours"],
            "gather_seconds": middle[gather],
            "gather_way": gather,
            "gather_each_seconds": middle["each"],
            "gather_bucketed_seconds": middle["bucketed"],
            "memcpy_seconds": middle["memcpy"],
            "time_vs_gather": middle[gather] / middle["ours"],
            "time_vs_memcpy": middle["ours"] / middle["memcpy"],
            "links_seconds": middle["links"],
            "links_time_vs_gather": middle[gather] / middle["links"],
            "peak_bytes": own,
            "links_peak_bytes": links,
            "gather_peak_bytes": peak[gather],
            "peak_over_bucket": own / self.bucket_bytes,
            "links_peak_over_bucket": links / self.bucket_bytes,
        }

    def ours(self) -> None:
        """Shard to shard."""
        self.moved = self.resharder(self.held, self.target).bytes_received

    def links(self) -> None:
        """Shard to shard, every parcel a message."""
        received = self.by_links(self.held, self.target).bytes_received
        if received != self.moved:
            raise SystemExit(f"over links {received} bytes arrived, through memory {self.moved}: one plan, one number")

    def memcpy(self) -> None:
        """As many bytes as this rank's engine holds."""
        self.copy_to.copy_(self.copy_from)

    def gather_bucketed(self) -> None:
        """All HF tensors bucket by bucket, then slices of them."""
        self._load(self.gather(self.held))

    def gather_each(self) -> None:
        """All HF tensors one by one, then slices of them."""
        import torch
        import torch.distributed as torch_dist

        full = {n: torch.empty(s, dtype=torch.bfloat16) for n, s in self.shapes.items()}
        tp_ranks = torch_dist.get_process_group_ranks(self.tp_group)
        for chunk, params in enumerate(self.held):
            for name, value in params.items():
                parts = [torch.empty_like(value) for _ in tp_ranks]
                torch_dist.all_gather(parts, value, group=self.tp_group)
                for peer, part in zip(tp_ranks, parts, strict=True):
                    for b in self.source.of(peer)[chunk][name].blocks:
                        full[b.hf_name][b.hf_index] = part[b.local_index]
        owner = {}
        for rank in torch_dist.get_process_group_ranks(self.pp_group):
            for params in self.source.of(rank):
                for p in params.values():
                    for b in p.blocks:
                        owner.setdefault(b.hf_name, rank)
        if len(set(owner.values())) > 1:
            for name, tensor in full.items():
                torch_dist.broadcast(tensor, owner[name], group=self.pp_group)
        self._load(full)

    def _load(self, full: dict) -> None:
        for params, got in zip(self.wanted.of(self.rank), self.got, strict=True):
            for name, p in params.items():
                for b in p.blocks:
                    got[name][b.local_index] = full[b.hf_name][b.hf_index]

    def _clear(self) -> None:
        for params in self.got:
            for t in params.values():
                t.zero_()

    def _check(self, way: str) -> None:
        import torch

        for want, got in zip(self.expected, self.got, strict=True):
            for name, value in want.items():
                if not torch.equal(value, got[name]):
                    raise SystemExit(f"{way}: {name} is wrong")


class BucketedGather:
    """The rival: every rank of a replica gets every HF tensor, by one all_gather a round.

    A rank contributes the blocks that no earlier rank of the group holds, in the order of its own parameters, so that
    pipeline stages progress side by side. Contributions of a round are padded to the longest.
    """

    def __init__(self, layouts: list, shapes: dict, group, dtype, bucket_bytes: int) -> None:
        import torch
        import torch.distributed as torch_dist

        self.shapes, self.group, self.dtype = shapes, group, dtype
        self.rank, world = torch_dist.get_rank(group), len(layouts)
        streams = [self._rounds(pieces, bucket_bytes // dtype.itemsize) for pieces in self._owned(layouts)]
        longest = max(map(len, streams))
        self.rounds = [[s[i] if i < len(s) else [] for s in streams] for i in range(longest)]
        self.lengths = [max(sum(b.numel for _, _, b in run) for run in runs) for runs in self.rounds]
        self.send = torch.zeros(max(self.lengths), dtype=dtype)
        self.received = torch.zeros(world * max(self.lengths), dtype=dtype)

    @staticmethod
    def _owned(layouts: list) -> list[list]:
        """Per rank, (chunk, parameter, block) of the blocks that it is the first to hold."""
        seen, out = set(), []
        for chunks in layouts:
            out.append([])
            for chunk, params in enumerate(chunks):
                for name, param in params.items():
                    for block in param.blocks:
                        if (block.hf_name, block.hf_slice) not in seen:
                            seen.add((block.hf_name, block.hf_slice))
                            out[-1].append((chunk, name, block))
        return out

    @staticmethod
    def _rounds(pieces: list, most: int) -> list[list]:
        """A rank's pieces, cut between rows where a round is full, in runs of at most `most` elements."""
        from dataclasses import replace

        rounds, used = [], most
        for chunk, name, block in pieces:
            (start, stop), (local, _) = block.hf_slice[0], block.local_slice[0]
            rows = max(1, most * (stop - start) // block.numel)
            for first in range(start, stop, rows):
                last, shift = min(first + rows, stop), local - start
                part = replace(
                    block,
                    hf_slice=((first, last), *block.hf_slice[1:]),
                    local_slice=((first + shift, last + shift), *block.local_slice[1:]),
                )
                if used + part.numel > most:
                    rounds.append([])
                    used = 0
                rounds[-1].append((chunk, name, part))
                used += part.numel
        return rounds

    def __call__(self, chunks: list) -> dict:
        """Every HF tensor. Collective over the group."""
        import torch
        import torch.distributed as torch_dist

        full = {}
        for runs, length in zip(self.rounds, self.lengths, strict=True):
            at = 0
            for chunk, name, block in runs[self.rank]:
                self.send[at : at + block.numel].view(block.shape).copy_(chunks[chunk][name][block.local_index])
                at += block.numel
            rows = self.received[: len(runs) * length]
            # As bytes: not every backend knows every dtype.
            sent = self.send[:length].view(torch.uint8)
            torch_dist.all_gather_single(rows.view(torch.uint8), sent, group=self.group)
            for run, row in zip(runs, rows.view(len(runs), length), strict=True):
                at = 0
                for _, _, block in run:
                    if block.hf_name not in full:
                        full[block.hf_name] = row.new_empty(self.shapes[block.hf_name])
                    full[block.hf_name][block.hf_index].copy_(row[at : at + block.numel].view(block.shape))
                    at += block.numel
        return full


def groups(world: int, tp: int, pp: int, rank: int):
    """(model-parallel group, TP group, pipeline group, its coordinates) of `rank`, in Megatron's order of ranks."""
    import torch.distributed as torch_dist

    dp, mine = world // (tp * pp), {}
    for d in range(dp):
        ranks = [t + tp * d + tp * dp * p for p in range(pp) for t in range(tp)]
        for kind, members in [
            ("replica", [ranks]),
            ("tp", [ranks[i * tp : (i + 1) * tp] for i in range(pp)]),
            ("pp", [ranks[i::tp] for i in range(tp)]),
        ]:
            for m in members:
                group = torch_dist.new_group(m)
                if rank in m:
                    mine[kind] = group
    return mine["replica"], mine["tp"], mine["pp"], [(t, p) for p in range(pp) for t in range(tp)]


def peak_growth(work: Callable[[], None]) -> int:
    """Bytes by which anonymous resident memory grew at most during `work`."""
    from treepo_mega.runtime.host_memory import HostPeak

    with HostPeak() as peak:
        work()
    return peak.bytes


if __name__ == "__main__":
    sys.exit(main())
