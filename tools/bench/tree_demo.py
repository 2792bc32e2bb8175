"""The demo's training run, packed and flat, from the same seed: same rewards, less time in training passes.

    python tools/bench/tree_demo.py [--quick] [--steps 5]

Runs the demo's recipe (examples/tiny_cpu.yaml: 16 prompts x 16 leaves, real vLLM, one rank) with
`train.prefix_sharing` tree and none, one after the other, and prints rewards and the seconds of the old-logprob and
update passes step by step. The first step of a run is left out of times (first calls are slow). Predicted: the share
of tokens, prompts included, that trees compute, from the trainer's perf/packed_tokens.

Progress goes to stderr. Last line, JSON: {"steps", "reward_packed" and "reward_flat" (per step), "reward_max_diff",
"trees_equal" (token by token, all steps), "loss_max_diff", "token_ratio", "train_time_ratio" (old + update, packed /
flat, sums over steps), "update_time_ratio", "seconds_packed", "seconds_flat"}. --quick: 3 steps of 8 prompts x 8
leaves.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from parity import forests
from runs import run

FULL = ["rollout.rollout_batch_size=16", "rollout.n_samples_per_prompt=16", "train.max_tokens_per_gpu=4096"]


def main() -> int:
    """Run both and compare; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="3 steps of 8 prompts x 8 leaves")
    p.add_argument("--steps", type=int, default=5)
    args = p.parse_args()
    steps = 3 if args.quick else args.steps
    rows: dict[str, list[dict[str, Any]]] = {}
    trees = {}
    with tempfile.TemporaryDirectory() as tmp:
        for sharing in ("tree", "none"):
            overrides = [*([] if args.quick else FULL), f"train.num_rollouts={steps}", "checkpoint.enabled=false"]
            overrides += ["logging.trees_interval=1", f"train.prefix_sharing={sharing}"]
            print(f"training {steps} steps with train.prefix_sharing={sharing}", file=sys.stderr, flush=True)
            rows[sharing] = run(1, Path(tmp) / sharing, overrides, sharing)
            trees[sharing] = forests(Path(tmp) / sharing)
    print(f"{'step':>5}{'reward tree':>13}{'flat':>9}{'loss tree':>13}{'flat':>13}{'old+update tree':>17}{'flat':>8}")
    for a, b in zip(rows["tree"], rows["none"], strict=True):
        print(
            f"{a['step']:>5}{a['rollout/reward_mean']:>13.6f}{b['rollout/reward_mean']:>9.6f}{a['train/loss']:>13.6f}"
            f"{b['train/loss']:>13.6f}{seconds([a]):>17.3f}{seconds([b]):>8.3f}"
        )
    print(json.dumps(summary(rows["tree"], rows["none"]) | {"trees_equal": trees["tree"] == trees["none"]}))
    return 0


def seconds(rows: list[dict[str, Any]], phases: tuple[str, ...] = ("old_logprobs", "update")) -> float:
    """Of training passes."""
    return sum(r[f"timing_s/{p}"] for r in rows for p in phases)


def summary(packed: list[dict[str, Any]], flat: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of the last line."""
    pairs = list(zip(packed, flat, strict=True))
    warm, warm_flat = packed[1:], flat[1:]
    tokens = [sum(r["perf/packed_tokens"] for r in rows) for rows in (warm, warm_flat)]
    return {
        "steps": len(packed),
        "reward_packed": [r["rollout/reward_mean"] for r in packed],
        "reward_flat": [r["rollout/reward_mean"] for r in flat],
        "reward_max_diff": max(abs(a["rollout/reward_mean"] - b["rollout/reward_mean"]) for a, b in pairs),
        "loss_max_diff": max(abs(a["train/loss"] - b["train/loss"]) for a, b in pairs),
        "token_ratio": tokens[0] / tokens[1],
        "train_time_ratio": seconds(warm) / seconds(warm_flat),
        "update_time_ratio": seconds(warm, ("update",)) / seconds(warm_flat, ("update",)),
        "seconds_packed": seconds(warm),
        "seconds_flat": seconds(warm_flat),
    }


if __name__ == "__main__":
    sys.exit(main())
