"""Does an FP8 head train like an fp32 one? The demo's model, 20 steps, the same seed, emulated FP8 against fp32.

    python tools/bench/fp8_training.py [--quick] [--steps 20]

Real Megatron-Core and a real vLLM engine, two optimizer steps a rollout and a KL term; the FP8 runs take old, reference
and policy logprobs from an FP8 head. Trees part as soon as weights do: curves are compared, not tokens. The first step
has the same trees. `fp8` has the default settings, `plain` has neither the exact target nor loud channels. The guard
watches, and its limit is lifted so that nothing falls back. --quick: 4 steps, no `plain`.

Last line, JSON: {"steps", "runs": [{"name", "reward": [..], "kl": [..], "reward_first", "reward_last", "head_abs_diff",
"gate_flips", "gate_flips_max", "grad_norm_rel_diff"}]}. reward and kl per step (KL to the reference, nats a token);
reward_first and reward_last: means of the first and last quarter; head_abs_diff: mean |logp_fp8 - logp_bf16| of the
guard's samples; gate_flips: share of clip gates that differ from bf16's; grad_norm_rel_diff: step 1, against fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from runs import run

COMMON = [
    "train.num_steps_per_rollout=2",
    "algo.kl_loss_coef=0.01",
    "algo.use_tis=false",  # on by rule for an FP8 head: then the two runs would differ in the algorithm too
    "checkpoint.enabled=false",
]
FP8 = ["loss.precision=fp8", "loss.guard.max_abs_diff=1e9"]
RUNS = {"fp32": [], "fp8": FP8, "plain": [*FP8, "debug.exact_target=false", "loss.fp8_loud_channels=0"]}
BARS = "▁▂▃▄▅▆▇█"


def curve(values: list[float], low: float, high: float) -> str:
    """A line of bars."""
    span = max(high - low, 1e-12)
    return "".join(BARS[min(7, max(0, int(8 * (v - low) / span)))] for v in values)


def quarter(values: list[float]) -> tuple[float, float]:
    """Means of the first and of the last quarter."""
    n = max(1, len(values) // 4)
    return sum(values[:n]) / n, sum(values[-n:]) / n


def summarise(name: str, steps: list[dict[str, Any]], exact: list[dict[str, Any]]) -> dict[str, Any]:
    """One run's row."""
    reward, kl = [s["rollout/reward_mean"] for s in steps], [s["train/kl_loss"] for s in steps]
    row: dict[str, Any] = {"name": name, "reward": reward, "kl": kl}
    row["reward_first"], row["reward_last"] = quarter(reward)
    flips = [s["train/head_gate_flips"] for s in steps if "train/head_gate_flips" in s]
    drift = [s["train/head_logp_abs_diff"] for s in steps if "train/head_logp_abs_diff" in s]
    row["head_abs_diff"] = sum(drift) / len(drift) if drift else 0.0
    row["gate_flips"] = sum(flips) / len(flips) if flips else 0.0
    row["gate_flips_max"] = max(flips, default=0.0)
    row["grad_norm_rel_diff"] = abs(steps[0]["grad-norm"] - exact[0]["grad-norm"]) / exact[0]["grad-norm"]
    return row


def main() -> int:
    """Run and compare; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="4 steps, fp32 and fp8")
    p.add_argument("--steps", type=int, default=20)
    args = p.parse_args()
    steps = 4 if args.quick else args.steps
    names = ["fp32", "fp8"] if args.quick else list(RUNS)
    done: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as tmp:
        for name in names:
            print(f"{name} ...", flush=True)
            overrides = [f"train.num_rollouts={steps}", *COMMON, *RUNS[name]]
            done[name] = [s for s in run(1, Path(tmp) / name, overrides, name) if "train/kl_loss" in s]
    rows = [summarise(name, done[name], done["fp32"]) for name in names]
    top = max(max(r["kl"]) for r in rows)
    low, high = min(min(r["reward"]) for r in rows), max(max(r["reward"]) for r in rows)
    print(f"\n{steps} steps, mean reward per step ({low:.2f} to {high:.2f}) and KL to the reference (0 to {top:.4f})")
    for r in rows:
        print(
            f"{r['name']:<6} reward {curve(r['reward'], low, high)}  {r['reward_first']:.3f} -> {r['reward_last']:.3f}"
        )
    for r in rows:
        last = r["kl"][-1]
        print(f"{r['name']:<6} KL     {curve(r['kl'], 0, top)}  {last:.4f} at the end")
    for r in rows[1:]:
        flips = f"{r['gate_flips']:.3%} of the clip gates flipped (worst step {r['gate_flips_max']:.3%})"
        norm = f"first gradient norm off by {r['grad_norm_rel_diff']:.2%}"
        print(f"{r['name']:<6} |logp_fp8 - logp_bf16| {r['head_abs_diff']:.4f}; {flips}; {norm}")
    print(json.dumps({"steps": steps, "runs": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
