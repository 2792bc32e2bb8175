"""The loss head against the full-logits path: peak memory and CPU time, forward and backward.

    python tools/bench/loss_head.py [--quick]

Every variant runs in a process of its own (one thread) on the same seeded numbers, with the weight's gradient buffer
(Megatron's main_grad) allocated beforehand by all of them, so that peaks count only what the step itself needs:

    naive      logits [T, V], Megatron's vocab_parallel_cross_entropy, dense weight gradient added to main_grad
    torch      torch.nn.functional.linear_cross_entropy, dense weight gradient added to main_grad
    ours       loss/fused.py, what the policy update runs: logp and entropy, gradient while the tile is there
    recompute  loss/logprobs.py's logprob_entropy, for arbitrary losses of logp and entropy: logits twice

naive and torch compute the loss only; ours and recompute also the entropy. What explains the numbers: naive holds
4 T V bytes of logits, ours 4 * tile * V; products of T x K x V: naive 3, ours 3, recompute 4. The loss is sum(g * logp)
with random g. naive and torch are fp32 in every row. bf16 and fp8 are emulated on a CPU (operands rounded as on a GPU,
products in fp32): their memory and their error are those of the numerics, their time says nothing of a GPU.

The default run has a row a precision and one of 32,768 tokens, about 11 minutes of one idle core; bars are printed for
fp32: peak at most 0.1 x naive, time at most 1.2 x. --quick: one fp32 case, naive and ours, once, under a minute.
Progress goes to stderr.

Last line, JSON: {"cases": [{"T", "K", "V", "precision", "emulated", "repeats", "peak_ratio", "time_ratio",
"logp_mean_abs_diff", "grad_rel_diff", "peak_mib", "naive_peak_mib", "cpu_s", "naive_cpu_s", "torch_peak_ratio",
"torch_time_ratio", "recompute_peak_ratio", "recompute_time_ratio", "peak_over_logits"}], "bars": {"peak_ratio_at_most",
"worst_peak_ratio", "time_ratio_at_most", "worst_time_ratio", "met"}}. Ratios are ours / naive (torch_*: ours / torch;
recompute_*: recompute / naive; absent where that variant is not run); CPU seconds, smallest of the repeats;
grad_rel_diff: relative L2 of both gradients together; peak_over_logits: ours / (4 T V bytes), the only measure where
the naive path does not fit into --memory-gib and is not run (its ratios are null). bars: over
the fp32 rows of 4,096 tokens and more (fewer leave less to save); met: null without such a row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
EVERY = ("naive", "torch", "ours", "recompute")
PEAK_BAR, TIME_BAR = 0.1, 1.2


class Case(NamedTuple):
    """One row: T tokens of width K over V columns, which variants run, and how often."""

    T: int
    K: int
    V: int
    precision: str
    repeats: int
    variants: tuple[str, ...]


CASES = [
    Case(4096, 576, 49152, "fp32", 2, EVERY),
    Case(4096, 1024, 151936, "fp32", 1, ("naive", "torch", "ours")),
    Case(4096, 576, 49152, "bf16", 1, ("naive", "ours")),
    Case(4096, 576, 49152, "fp8", 1, ("naive", "ours")),
    Case(32768, 576, 49152, "fp32", 1, ("naive", "ours")),
]
QUICK = [CASES[0]._replace(repeats=1, variants=("naive", "ours"))]


def peak_bytes() -> int:
    """Largest resident set since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: this bench needs Linux")


def reset_peak() -> int:
    """Forget earlier peaks; returns the resident set now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def worker(variant: str, T: int, K: int, V: int, precision: str, out: str) -> None:
    """One variant in this process; prints one JSON line and saves logp and samples of the gradients."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(T, K, generator=g).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(V, K, generator=g).mul_(2.4 / K**0.5))  # logit std 2.4
    target = torch.randint(0, V, (T,), generator=g)
    slope = torch.randn(T, generator=g)
    weight.main_grad = torch.full((V, K), 0.0)
    step = STEPS[variant](hidden, weight, target, slope, precision)
    step(64)  # warm up: thread pools, code paths
    hidden.grad = weight.grad = None
    weight.main_grad.zero_()
    base = reset_peak()
    started = time.process_time()
    logp = step(T)
    seconds = time.process_time() - started
    peak = peak_bytes() - base
    np.savez(out, logp=logp.numpy(), dh=hidden.grad.numpy(), dw=weight.main_grad[:: max(1, V // 4096)].numpy())
    print(json.dumps({"peak": peak, "seconds": seconds}))


def backward_of_loss(loss, slope, weight):
    """Dense backward of sum(slope * logp) with logp = -loss, the weight's gradient added to main_grad; returns logp."""
    (-slope * loss).sum().backward()
    weight.main_grad.add_(weight.grad)
    weight.grad = None
    return -loss.detach()


def shard_of(weight, precision):
    """The whole vocabulary as one shard."""
    from treepo_mega.loss.operands import Numerics
    from treepo_mega.loss.shard import Shard

    return Shard.of(weight, 0, weight.shape[0], numerics=Numerics(precision=precision))


def naive(hidden, weight, target, slope, precision):
    """Megatron: ColumnParallelLinear's product, then its cross entropy on the full logits."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()

    def step(n):
        logits = torch.matmul(hidden[:n, None], weight.t())
        loss = vocab_parallel_cross_entropy(logits.float(), target[:n, None])[:, 0]
        del logits
        return backward_of_loss(loss, slope[:n], weight)

    return step


def torch_fused(hidden, weight, target, slope, precision):
    """PyTorch's own chunked head."""
    import torch.nn.functional as F

    def step(n):
        loss = F.linear_cross_entropy(hidden[:n], weight, target[:n], reduction="none")
        return backward_of_loss(loss, slope[:n], weight)

    return step


def ours(hidden, weight, target, slope, precision):
    """Gradient in the forward pass."""
    from treepo_mega.loss.fused import row_loss
    from treepo_mega.loss.stats import Stats

    shard = shard_of(weight, precision)

    def step(n):
        def loss(logp, entropy, part):
            return (slope[:n][part] * logp).sum(), Stats({"entropy": entropy.sum()})

        total, _, logp, _ = row_loss(hidden[:n], weight, target[:n], shard, loss)
        total.backward()
        return logp

    return step


def recompute(hidden, weight, target, slope, precision):
    """logp and entropy as differentiable tensors."""
    from treepo_mega.loss.logprobs import logprob_entropy

    shard = shard_of(weight, precision)

    def step(n):
        logp, _ = logprob_entropy(hidden[:n], weight, target[:n], shard)
        (slope[:n] * logp).sum().backward()
        return logp.detach()

    return step


STEPS = {"naive": naive, "torch": torch_fused, "ours": ours, "recompute": recompute}


def measure(variant: str, case: Case, out: Path) -> dict[str, float]:
    """Run one variant in a process of its own; naive and torch know fp32 only."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    precision = case.precision if variant in ("ours", "recompute") else "fp32"
    command = [sys.executable, __file__, "--worker", variant, *map(str, case[:3]), precision, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1200)
    if done.returncode:
        raise RuntimeError(f"{variant} at {case} failed with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def naive_bytes(case: Case) -> int:
    """What the naive path needs: logits, weight, main_grad, dense gradient, hidden states."""
    return 4 * (case.T * case.V + 3 * case.V * case.K + 3 * case.T * case.K)


def run_case(case: Case, limit: float) -> dict[str, object]:
    """All variants of one case, alternating; returns its row of the JSON line. Says on stderr what it does."""
    import numpy as np

    variants = case.variants
    if naive_bytes(case) > limit * 2**30:
        print(f"  naive needs {naive_bytes(case) / 2**30:.1f} GiB: over --memory-gib, left out", file=sys.stderr)
        variants = ("ours",)
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as tmp:
        for repeat in range(case.repeats):
            for v in variants:
                got = measure(v, case, Path(tmp) / f"{v}.npz")
                numbers = f"{got['seconds']:7.1f} CPU s  {got['peak'] / 2**20:8.1f} MiB"
                print(f"  {v:<10} {repeat + 1}/{case.repeats}  {numbers}", file=sys.stderr, flush=True)
                old = best.setdefault(v, got)
                best[v] = {k: min(got[k], old[k]) for k in got}
        saved = {v: dict(np.load(Path(tmp) / f"{v}.npz")) for v in variants}
    return row_of(case, best, saved)


def row_of(case: Case, best: dict[str, dict[str, float]], saved: dict[str, dict[str, object]]) -> dict[str, object]:
    """The row of the JSON line from each variant's smallest numbers and its logp and gradients."""
    import numpy as np

    o, n = best["ours"], best.get("naive")
    row: dict[str, object] = {**dict(zip(("T", "K", "V", "precision"), case, strict=False))}
    row |= {"emulated": case.precision != "fp32", "repeats": case.repeats}
    for name, top, bottom in (("", o, n), ("torch_", o, best.get("torch")), ("recompute_", best.get("recompute"), n)):
        if name and not (top and bottom):
            continue
        row[f"{name}peak_ratio"] = round(top["peak"] / bottom["peak"], 4) if top and bottom else None
        row[f"{name}time_ratio"] = round(top["seconds"] / bottom["seconds"], 3) if top and bottom else None
    row |= {"peak_mib": round(o["peak"] / 2**20, 1), "cpu_s": round(o["seconds"], 2)}
    row["peak_over_logits"] = round(o["peak"] / (4 * case.T * case.V), 4)
    row["logp_mean_abs_diff"] = None
    if n:
        row |= {"naive_peak_mib": round(n["peak"] / 2**20, 1), "naive_cpu_s": round(n["seconds"], 2)}
        a, b = saved["ours"], saved["naive"]
        row["logp_mean_abs_diff"] = float(np.abs(a["logp"] - b["logp"]).mean())
        error = sum(float(((a[k] - b[k]).astype(float) ** 2).sum()) for k in ("dh", "dw"))
        size = sum(float((b[k].astype(float) ** 2).sum()) for k in ("dh", "dw"))
        row["grad_rel_diff"] = (error / size) ** 0.5
    return row


def bars(rows: list[dict[str, object]]) -> dict[str, object]:
    """The worst ratios of the fp32 rows with enough tokens against what they may be at most."""
    known = [r for r in rows if r["precision"] == "fp32" and r["T"] >= 4096 and r["peak_ratio"] is not None]
    peak, seconds = (max((r[k] for r in known), default=None) for k in ("peak_ratio", "time_ratio"))
    met = None if peak is None else peak <= PEAK_BAR and seconds <= TIME_BAR
    return {
        **{"peak_ratio_at_most": PEAK_BAR, "worst_peak_ratio": peak},
        **{"time_ratio_at_most": TIME_BAR, "worst_time_ratio": seconds, "met": met},
    }


COLUMNS = {
    "peak MiB": "peak_mib", "naive": "naive_peak_mib", "ratio": "peak_ratio", "/torch": "torch_peak_ratio",
    "CPU s": "cpu_s", "naive ": "naive_cpu_s", "ratio ": "time_ratio", "/torch ": "torch_time_ratio",
    "|dlogp|": "logp_mean_abs_diff", "dgrad": "grad_rel_diff",
}  # fmt: skip
"""Heading -> key of the row."""


def cell(value: float | None) -> str:
    """A number for the table."""
    if value is None:
        return "-"
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.4g}"


def show(rows: list[dict[str, object]], bar: dict[str, object]) -> None:
    """The table for people."""
    print(f"{'T':>6}{'K':>6}{'V':>8} {'prec':<5}" + "".join(f"{h.strip():>10}" for h in COLUMNS))
    for r in rows:
        cells = [r.get(key) for key in COLUMNS.values()]
        text = "".join(f"{cell(c):>10}" for c in cells)
        print(f"{r['T']:>6}{r['K']:>6}{r['V']:>8} {r['precision']:<5}{text}" + ("  emulated" if r["emulated"] else ""))
    if bar["met"] is not None:
        print(
            f"fp32: peak at most {bar['worst_peak_ratio']} x naive (bar {PEAK_BAR}), time at most "
            f"{bar['worst_time_ratio']} x (bar {TIME_BAR}): {'met' if bar['met'] else 'NOT met'}"
        )


def main() -> int:
    """Run the cases; returns the exit status."""
    if sys.argv[1:2] == ["--worker"]:
        variant, T, K, V, precision, out = sys.argv[2:]
        worker(variant, int(T), int(K), int(V), precision, out)
        return 0
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="one case, naive and ours, once")
    p.add_argument("--repeats", type=int, help="times each variant runs, instead of each case's own number")
    listed = ", ".join(f"{i}: T {c.T} K {c.K} V {c.V} {c.precision}" for i, c in enumerate(CASES))
    p.add_argument("--cases", type=int, nargs="+", choices=range(len(CASES)), help=f"which of {listed}")
    p.add_argument("--tokens", type=int, help="T of every case, to see that it works in less time")
    p.add_argument("--memory-gib", type=float, default=7.0, help="do not run the naive path where it needs more")
    args = p.parse_args()
    chosen = QUICK if args.quick else CASES if args.cases is None else [CASES[i] for i in args.cases]
    rows = []
    for i, case in enumerate(chosen, 1):
        case = case._replace(T=args.tokens or case.T, repeats=args.repeats or case.repeats)
        where = f"T {case.T}, K {case.K}, V {case.V}, {case.precision}"
        print(f"case {i} of {len(chosen)}: {where}, {' '.join(case.variants)}", file=sys.stderr, flush=True)
        rows.append(run_case(case, args.memory_gib))
    bar = bars(rows)
    show(rows, bar)
    print(json.dumps({"cases": rows, "bars": bar}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
