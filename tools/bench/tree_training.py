"""What training on trees saves: old logprobs, reference logprobs and update, packed (tree) against flat.

    python tools/bench/tree_training.py [--quick] [--model 4x256] [--repeats 3] [--trees 1] [--segment 32]

One process, one rank, fp32, the real actor, reference and optimizer. Per model and forest the same trajectories are
trained on as trees (`train.prefix_sharing: tree`) and one by one (`none`), in alternation, at equal
max_tokens_per_gpu. Forests are of prompts with 16 leaves that double at each of 4 borders:

    published   14 segments, branching at the first four: the paper's tree at full length (token_ratio about 0.85)
    short       4 segments, branching at each (about 0.5)
    late        8 shared segments, then branching at the last four (about 0.2)

A forest has as many trees as fill the micro-batches of either way (`trees_that_fill`), times --trees. Counts that
explain the ratios are printed beside them: tokens computed (with padding), tokens of the fullest micro-batch, visible
attention pairs, and the pairs that kernels were asked for. Peak memory is that of live tensors during the update, from
the allocator's own events in an untimed pass, weights and optimizer left out. It grows with the tokens of the fullest
micro-batch, which max_tokens_per_gpu bounds and which trees and paths fill more or less well; hence both ratios.

Progress goes to stderr. Last line, JSON: {"forests": [{"name", "model", "token_ratio" (tokens computed, packed /
flat), "time_ratio" (medians of old + ref + update, wall), "cpu_ratio" (the same in CPU seconds: other jobs do not
count), "time_flat_s", "time_packed_s", "phases" ({phase: ratio}), "memory_ratio" (peak of the update),
"memory_per_token_ratio" (peak / tokens of the fullest micro-batch: the ratio of two full ones), "memory_met" (the
packed peak is not above the flat one, but for a fuller micro-batch, and then by no more than 2 % a token),
"pairs_ratio", "flops_ratio" (tokens, pairs and rows at their price: what a perfect implementation could reach),
"grad_rel_diff" (norm of the difference of all gradients / norm), "target" (1.1 token_ratio + 0.03), "met" (time),
"counts" (per way, "fullest" is of micro-batches)}], "met", "memory_met": of all of them}. --quick: the small model,
one repeat.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from treepo_mega.monitor.progress import quieten_libraries

quieten_libraries()  # before the imports below: most libraries warn while being imported

from treepo_mega.actor.attention_cpu import CpuLayout  # noqa: E402
from treepo_mega.actor.batch import pair_cost, plan_batch  # noqa: E402
from treepo_mega.actor.forward import run_schedule  # noqa: E402
from treepo_mega.actor.losses import PolicyLoss  # noqa: E402
from treepo_mega.actor.update import Actor, Policy  # noqa: E402
from treepo_mega.config import Config, load_config  # noqa: E402
from treepo_mega.runtime import dist  # noqa: E402
from treepo_mega.tree.credit import fold, leaf_weights  # noqa: E402
from treepo_mega.tree.node import Tree  # noqa: E402
from treepo_mega.tree.pack import Batch, StepPlan, plan_step  # noqa: E402
from treepo_mega.tree.segments import Segments, Sharing  # noqa: E402

MODELS = {
    "4x64": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 32, "vocab_size": 512},
    "4x256": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 4096},
    "2x512": {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 64, "vocab_size": 4096},
}
"""Llama shapes: layers x hidden size; half as many key-value heads, MLP 3 x hidden. 4x64 is the demo's, whose attention
is twice as wide as its hidden states: there visible pairs weigh as much as tokens, and they shrink less."""
FORESTS = {"published": (0, 4, 10), "short": (0, 4, 0), "late": (8, 4, 0)}
"""(shared segments, branching levels, segments behind the last branch) on a path."""
PROMPT, LEAVES, CAP = 16, 16, 4096
MOST_FLAT_TOKENS = 20_000
"""Of one forest, all trajectories one by one: bounds the seconds of a pass."""


def grow(shape: tuple[int, int, int], segment: int, rng: np.random.Generator, vocab: int, name: str) -> Tree:
    """One tree: `shape` as in FORESTS, segments of `segment` tokens."""
    stem, levels, tail = shape
    tree = Tree.start(name, rng.integers(vocab, size=PROMPT).tolist())

    def extend(parent: int, segments: int) -> int:
        for _ in range(segments):
            node = tree.add_child(parent)
            node.tokens = rng.integers(vocab, size=segment).tolist()
            node.logprobs = [-3.0] * segment
            parent = node.id
        return parent

    ends = [extend(0, stem)]
    for _ in range(levels):
        ends = [extend(e, 1) for e in ends for _ in range(2)]
    tree.leaves = [extend(e, tail) for e in ends]
    tree.rewards = rng.choice([0.0, 1.0], size=len(tree.leaves)).tolist()
    return tree


def batch_of(trees: list[Tree], sharing: Sharing) -> Batch:
    """The trajectories of `trees` with random advantages."""
    s = Segments.from_trees(trees, range(len(trees)), sharing)
    values = np.random.default_rng(1).normal(size=len(s.leaf_number))
    return Batch(s, fold(s, values, leaf_weights("token-mean", s.flat_lengths())))


def trees_that_fill(shape: tuple[int, int, int], segment: int) -> int:
    """The fewest trees that fill the micro-batches of packed and of flat training about as well as any number does."""
    fills = []
    for count in itertools.count(1):
        trees = [grow(shape, segment, np.random.default_rng(7), 2, f"p{i}") for i in range(count)]
        plans = [plan_step(batch_of(trees, how), dp_size=1, dp_rank=0, max_tokens=CAP) for how in ("tree", "none")]
        if fills and plans[1].real_tokens > MOST_FLAT_TOKENS:
            break
        fills.append(min(max(len(p.tokens) for p in plan.packs) for plan in plans))
    return next(i for i, fill in enumerate(fills, 1) if fill >= 0.98 * max(fills))


def write_model(directory: Path, shape: dict[str, int]) -> Path:
    """A random Llama of `shape`."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    more = {
        "intermediate_size": 3 * shape["hidden_size"],
        "num_key_value_heads": shape["num_attention_heads"] // 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
    }
    LlamaForCausalLM(LlamaConfig(**shape, **more)).save_pretrained(directory)
    return directory


def configuration(hf_dir: Path, sharing: str) -> Config:
    """One rank; a learning rate at which weights stay what they are."""
    return load_config(
        None,
        [
            f"model.hf_checkpoint={hf_dir}", "data.train=[{path: unused.jsonl}]", "rollout.max_response_len=1024",
            "rollout.segment.length=128", f"train.prefix_sharing={sharing}", "train.lr=1e-12", "algo.kl_loss_coef=0.01",
            f"train.max_tokens_per_gpu={CAP}",
        ],
    )  # fmt: skip


class Side:
    """One way to train on the forest."""

    def __init__(self, actor: Actor, reference: Policy, cfg: Config, trees: list[Tree]) -> None:
        self.actor, self.reference, self.cfg = actor, reference, cfg
        self.plan: StepPlan = plan_batch(batch_of(trees, cfg.train.prefix_sharing), cfg, pair_cost(actor.spec))
        self.loss = PolicyLoss(cfg.algo)

    def old(self) -> None:
        """Actor logprobs before the update."""
        for pack, x in zip(self.plan.packs, self.actor.logprobs(self.plan.packs) or (), strict=True):
            pack.old_logprobs = x

    def ref(self) -> None:
        """Reference logprobs."""
        for pack, x in zip(self.plan.packs, self.reference.logprobs(self.plan.packs) or (), strict=True):
            pack.ref_logprobs = x

    def update(self) -> None:
        """One optimizer step."""
        self.actor.update(self.plan.packs, self.loss)

    def gradient(self) -> torch.Tensor:
        """All gradients as one vector."""
        for chunk in self.actor.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        run_schedule(self.actor.chunks, self.plan.packs, self.actor.head, loss=self.loss)
        return torch.cat([p.main_grad.flatten().clone() for m in self.actor.models for p in m.parameters()])

    def counts(self) -> dict[str, int]:
        """Tokens with padding, of all micro-batches and of the fullest; pairs visible and asked for; rows."""
        layouts = [CpuLayout.build(p.subtree_end, p.blocks, p.local) for p in self.plan.packs]
        return {
            "tokens": self.plan.padded_tokens,
            "fullest": max(len(p.tokens) for p in self.plan.packs),
            "pairs": sum(p.attention_pairs for p in self.plan.packs),
            "kernel_pairs": sum(x.pairs for x in layouts),
            "rows": sum(len(p.target) for p in self.plan.packs),
        }

    def flops(self, counts: dict[str, int]) -> float:
        """Multiply-adds of one forward pass: layers per token and per visible pair, head per row."""
        spec = self.actor.spec
        layer = spec.hidden_size * spec.head_dim * (2 * spec.num_attention_heads + 2 * spec.num_key_value_heads)
        layer += 3 * spec.hidden_size * spec.intermediate_size
        per_pair = 2 * spec.num_attention_heads * spec.head_dim
        return (
            spec.num_layers * (layer * counts["tokens"] + per_pair * counts["pairs"])
            + spec.hidden_size * spec.vocab_size * counts["rows"]
        )


STARTED = time.monotonic()


def say(what: str) -> None:
    """Progress, on stderr."""
    print(f"{time.monotonic() - STARTED:7.1f} s  {what}", file=sys.stderr, flush=True)


def seconds(f: Callable[[], None]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    f()
    return time.perf_counter() - started


@contextlib.contextmanager
def native_stderr_off() -> Iterator[None]:
    """The profiler's library reports its own starts and stops on the process's stderr, whatever its log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_bytes(f: Callable[[], object]) -> int:
    """Most bytes of tensors alive at once during `f` beyond those alive before, from the allocator's events."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with native_stderr_off():
        profile.start()
    f()
    with native_stderr_off():
        profile.stop()
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    if not events:
        raise RuntimeError("the profiler recorded no allocations: peak memory cannot be told")
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def compare(name: str, model: str, sides: dict[str, Side], repeats: int) -> dict[str, Any]:
    """One row of the table."""
    times: dict[str, dict[str, list[float]]] = {s: {"old": [], "ref": [], "update": []} for s in sides}
    cpu: dict[str, list[float]] = {s: [] for s in sides}
    grads = {}
    for key, side in sides.items():  # warms up, too
        say(f"{model} {name}: gradients, {'flat' if key == 'none' else 'packed'}")
        side.old()
        side.ref()
        grads[key] = side.gradient()
    for i in range(repeats):
        say(f"{model} {name}: timing, round {i + 1} of {repeats}")
        for key, side in sides.items():
            began = time.process_time()
            for phase in times[key]:
                times[key][phase].append(seconds(getattr(side, phase)))
            cpu[key].append(time.process_time() - began)
    say(f"{model} {name}: memory")
    memory = {k: peak_bytes(s.update) for k, s in sides.items()}
    return (
        row(name, model, sides, times, cpu)
        | memory_figures(memory, sides)
        | {"grad_rel_diff": float((grads["tree"] - grads["none"]).norm() / grads["none"].norm())}
    )


def memory_figures(peak: dict[str, int], sides: dict[str, Side]) -> dict[str, Any]:
    """Peaks of the update, in all and per token of the fullest micro-batch."""
    fullest = {k: s.counts()["fullest"] for k, s in sides.items()}
    ratio = peak["tree"] / peak["none"]
    per_token = ratio * fullest["none"] / fullest["tree"]
    return {
        "memory_ratio": ratio,
        "memory_per_token_ratio": per_token,
        "memory_met": ratio <= 1 or (fullest["tree"] > fullest["none"] and per_token <= 1.02),
        "memory_flat_mib": peak["none"] / 2**20,
    }


def row(
    name: str,
    model: str,
    sides: dict[str, Side],
    times: dict[str, dict[str, list[float]]],
    cpu: dict[str, list[float]],
) -> dict[str, Any]:
    """Times and counts of one forest."""
    phases = {k: {p: statistics.median(v) for p, v in t.items()} for k, t in times.items()}
    totals = {k: statistics.median(map(sum, zip(*t.values(), strict=True))) for k, t in times.items()}
    counts = {k: s.counts() for k, s in sides.items()}
    ratio = counts["tree"]["tokens"] / counts["none"]["tokens"]
    flops = {k: sides[k].flops(c) for k, c in counts.items()}
    target = 1.1 * ratio + 0.03
    return {
        "name": name,
        "model": model,
        "token_ratio": ratio,
        "time_ratio": totals["tree"] / totals["none"],
        "cpu_ratio": statistics.median(cpu["tree"]) / statistics.median(cpu["none"]),
        "flops_ratio": flops["tree"] / flops["none"],
        "target": target,
        "met": totals["tree"] / totals["none"] <= target,
        "time_flat_s": totals["none"],
        "time_packed_s": totals["tree"],
        "phases": {p: phases["tree"][p] / phases["none"][p] for p in phases["tree"]},
        "pairs_ratio": counts["tree"]["pairs"] / counts["none"]["pairs"],
        "counts": counts,
    }


def main() -> int:
    """Measure and print; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="the small model, one repeat")
    p.add_argument("--model", choices=MODELS, help="only this one")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--trees", type=int, default=1, help="forests this many times larger")
    p.add_argument("--segment", type=int, default=32, help="tokens in a segment")
    args = p.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        wanted = [args.model] if args.model else list(MODELS)[: 1 if args.quick else None]
        for model, shape in ((name, MODELS[name]) for name in wanted):
            hf_dir = write_model(Path(tmp) / model, shape)
            cfg = {s: configuration(hf_dir, s) for s in ("tree", "none")}
            dist.initialize(cfg["tree"])
            actor, reference = Actor(cfg["tree"], hf_dir), Policy(cfg["tree"], hf_dir)
            for name, form in FORESTS.items():
                rng = np.random.default_rng(7)
                count = args.trees * trees_that_fill(form, args.segment)
                trees = [grow(form, args.segment, rng, shape["vocab_size"], f"p{i}") for i in range(count)]
                sides = {s: Side(actor, reference, c, trees) for s, c in cfg.items()}
                rows.append(compare(name, model, sides, 1 if args.quick else args.repeats))
                print_row(rows[-1], header=len(rows) == 1)
    say("done")
    print(json.dumps({"forests": rows} | {key: all(r[key] for r in rows) for key in ("met", "memory_met")}))
    dist.leave(0)
    return 0


def print_row(r: dict[str, Any], header: bool) -> None:
    """A line for people."""
    if header:
        print(
            f"{'model':<8}{'forest':<11}{'tokens flat':>12}{'packed':>9}{'ratio':>7}{'pairs':>7}{'flops':>7}"
            f"{'asked/seen':>12}{'flat s':>9}{'packed s':>10}{'time':>7}{'cpu':>7}{'target':>8}{'fullest':>12}"
            f"{'memory':>8}{'a token':>9}{'gradient':>10}  old ref update"
        )
    flat, packed = r["counts"]["none"], r["counts"]["tree"]
    asked = f"{packed['kernel_pairs'] / packed['pairs']:.2f}/{flat['kernel_pairs'] / flat['pairs']:.2f}"
    fullest = f"{packed['fullest']}/{flat['fullest']}"
    print(
        f"{r['model']:<8}{r['name']:<11}{flat['tokens']:>12}{packed['tokens']:>9}{r['token_ratio']:>7.3f}"
        f"{r['pairs_ratio']:>7.3f}{r['flops_ratio']:>7.3f}{asked:>12}{r['time_flat_s']:>9.2f}"
        f"{r['time_packed_s']:>10.2f}{r['time_ratio']:>7.3f}"
        f"{r['cpu_ratio']:>7.3f}{r['target']:>8.3f}{fullest:>12}{r['memory_ratio']:>8.3f}"
        f"{r['memory_per_token_ratio']:>9.3f}{r['grad_rel_diff']:>10.1e}  "
        + " ".join(f"{x:.3f}" for x in r["phases"].values()),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
