"""The loss head against the full-logits path: peak memory and CPU time, forward and backward.

    python tools/bench/loss_head.py [--quick]

Every variant runs in a process of its own (one thread) on the same seeded numbers, with the weight's gradient buffer
(Megatron's main_grad) allocated beforehand by all of them, so that peaks count only what the step itself needs:

    naive      logits [T, V], Megatron's vocab_parallel_cross_entropy, dense weight gradient added to main_grad
    torch      torch.nn.functional.linear_cross_entropy, dense weight gradient added to main_grad
    ours       loss/fused.py, what the policy update runs: logp and entropy, gradient while the tile is there
    recompute  loss/head.py's logprob_entropy, for arbitrary losses of logp and entropy: logits twice

naive and torch compute the loss only; ours and recompute also the entropy. What explains the numbers: naive holds
4 T V bytes of logits, ours 4 * tile * V; products of T x K x V: naive 3, ours 3, recompute 4. The loss is sum(g * logp)
with random g. FP8 and bf16 on a CPU are emulated (rounded operands, fp32 products): their time says nothing of a GPU.
--quick: one case, naive and ours, once.

Last line, JSON: {"cases": [{"T", "K", "V", "precision", "peak_ratio", "time_ratio", "logp_mean_abs_diff",
"grad_rel_diff", "peak_mib", "naive_peak_mib", "cpu_s", "naive_cpu_s", "torch_peak_ratio", "torch_time_ratio",
"recompute_peak_ratio", "recompute_time_ratio", "peak_over_logits"}]}. Ratios are ours / naive (torch_*: ours / torch;
recompute_*: recompute / naive); CPU seconds, smallest of the repeats; grad_rel_diff: relative L2 of both gradients
together; peak_over_logits: ours / (4 T V bytes), the only measure where the naive path does not fit into --memory-gib
and is not run (its ratios are null).
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

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    (4096, 576, 49152, "fp32"),
    (4096, 1024, 151936, "fp32"),
    (4096, 576, 49152, "bf16"),
    (4096, 576, 49152, "fp8"),
    (32768, 576, 49152, "fp32"),
]
QUICK = [(4096, 576, 49152, "fp32")]


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


def naive(hidden, weight, target, slope, precision):
    """Megatron: ColumnParallelLinear's product, then its cross entropy on the full logits."""
    import torch
    import torch.distributed as dist

    from treepo_mega.runtime import cpu_megatron

    cpu_megatron.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()

    def step(n):
        logits = torch.matmul(hidden[:n, None], weight.t())
        loss = vocab_parallel_cross_entropy(logits.float(), target[:n, None])[:, 0]
        del logits
        (-slope[:n] * loss).sum().backward()
        weight.main_grad.add_(weight.grad)
        weight.grad = None
        return -loss.detach()

    return step


def torch_fused(hidden, weight, target, slope, precision):
    """PyTorch's own chunked head."""
    import torch.nn.functional as F

    def step(n):
        loss = F.linear_cross_entropy(hidden[:n], weight, target[:n], reduction="none")
        (-slope[:n] * loss).sum().backward()
        weight.main_grad.add_(weight.grad)
        weight.grad = None
        return -loss.detach()

    return step


def ours(hidden, weight, target, slope, precision):
    """Gradient in the forward pass."""
    from treepo_mega.loss.fused import row_loss
    from treepo_mega.loss.head import Shard
    from treepo_mega.loss.operands import Numerics

    shard = Shard.of(weight, 0, weight.shape[0], numerics=Numerics(precision=precision))

    def step(n):
        def loss(logp, entropy, part):
            return (slope[:n][part] * logp).sum(), {"entropy": entropy.sum()}

        total, _, logp, _ = row_loss(hidden[:n], weight, target[:n], shard, loss)
        total.backward()
        return logp

    return step


def recompute(hidden, weight, target, slope, precision):
    """logp and entropy as differentiable tensors."""
    from treepo_mega.loss.head import Shard, logprob_entropy
    from treepo_mega.loss.operands import Numerics

    shard = Shard.of(weight, 0, weight.shape[0], numerics=Numerics(precision=precision))

    def step(n):
        logp, _ = logprob_entropy(hidden[:n], weight, target[:n], shard)
        (slope[:n] * logp).sum().backward()
        return logp.detach()

    return step


STEPS = {"naive": naive, "torch": torch_fused, "ours": ours, "recompute": recompute}


def measure(variant: str, case: tuple[int, int, int, str], out: Path) -> dict[str, float]:
    """Run one variant in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--worker", variant, *map(str, case), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1200)
    if done.returncode:
        raise RuntimeError(f"{variant} at {case} failed with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def naive_bytes(T: int, K: int, V: int) -> int:
    """What the naive path needs: logits, weight, main_grad, dense gradient, hidden states."""
    return 4 * (T * V + 3 * V * K + 3 * T * K)


def run_case(case: tuple[int, int, int, str], variants: list[str], repeats: int, limit: float) -> dict[str, object]:
    """All variants of one case, alternating; returns its row of the JSON line."""
    import numpy as np

    T, K, V, precision = case
    if naive_bytes(T, K, V) > limit * 2**30:
        variants = ["ours"]
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as tmp:
        for _ in range(repeats):
            for v in variants:
                got = measure(v, case if v in ("ours", "recompute") else (T, K, V, "fp32"), Path(tmp) / f"{v}.npz")
                old = best.setdefault(v, got)
                best[v] = {k: min(got[k], old[k]) for k in got}
        saved = {v: np.load(Path(tmp) / f"{v}.npz") for v in variants}
    o, n = best["ours"], best.get("naive")
    row: dict[str, object] = {"T": T, "K": K, "V": V, "precision": precision}
    for name, top, bottom in (("", o, n), ("torch_", o, best.get("torch")), ("recompute_", best.get("recompute"), n)):
        if name and not (top and bottom):
            continue
        row[f"{name}peak_ratio"] = round(top["peak"] / bottom["peak"], 4) if top and bottom else None
        row[f"{name}time_ratio"] = round(top["seconds"] / bottom["seconds"], 3) if top and bottom else None
    row |= {"peak_mib": round(o["peak"] / 2**20, 1), "cpu_s": round(o["seconds"], 2)}
    row["peak_over_logits"] = round(o["peak"] / (4 * T * V), 4)
    if n:
        row |= {"naive_peak_mib": round(n["peak"] / 2**20, 1), "naive_cpu_s": round(n["seconds"], 2)}
        a, b = saved["ours"], saved["naive"]
        row["logp_mean_abs_diff"] = float(np.abs(a["logp"] - b["logp"]).mean())
        error = sum(float(((a[k] - b[k]).astype(float) ** 2).sum()) for k in ("dh", "dw"))
        size = sum(float((b[k].astype(float) ** 2).sum()) for k in ("dh", "dw"))
        row["grad_rel_diff"] = (error / size) ** 0.5
    else:
        row["logp_mean_abs_diff"] = None
    return row


def main() -> int:
    """Run the cases; returns the exit status."""
    if sys.argv[1:2] == ["--worker"]:
        variant, T, K, V, precision, out = sys.argv[2:]
        worker(variant, int(T), int(K), int(V), precision, out)
        return 0
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="one case, naive and ours, once")
    p.add_argument("--repeats", type=int, default=2, help="times each variant runs; the smallest numbers count")
    p.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), help=f"which of {CASES}, by index")
    p.add_argument("--variants", nargs="+", default=list(STEPS), choices=list(STEPS), help="what to run beside ours")
    p.add_argument("--memory-gib", type=float, default=7.0, help="do not run the naive path where it needs more")
    args = p.parse_args()
    rows = []
    for case in QUICK if args.quick else [CASES[i] for i in args.cases]:
        few = args.quick or case[3] != "fp32"
        variants = [v for v in STEPS if v == "ours" or v in (("naive",) if few else args.variants)]
        rows.append(run_case(case, variants, 1 if args.quick else args.repeats, args.memory_gib))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    heads = ("peak MiB", "naive", "ratio", "CPU s", "naive", "ratio", "|dlogp|")
    widths = (10, 9, 8, 8, 8, 7, 10)
    print(f"{'T':>6}{'K':>6}{'V':>8} {'prec':<5}" + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True)))
    for r in rows:
        cells = [r.get("naive_peak_mib"), r["peak_ratio"], r["cpu_s"], r.get("naive_cpu_s"), r["time_ratio"]]
        text = "".join(f"{'-' if c is None else c:>{w}}" for c, w in zip(cells, (9, 8, 8, 8, 7), strict=True))
        diff = r["logp_mean_abs_diff"]
        print(f"{r['T']:>6}{r['K']:>6}{r['V']:>8} {r['precision']:<5}{r['peak_mib']:>10}{text}"
              f"{'-' if diff is None else format(diff, '.1e'):>10}")  # fmt: skip
    print(json.dumps({"cases": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
