"""Does the layout change the training? The same recipe under several Megatron layouts, step by step.

    python tools/bench/parity.py [--quick] [--steps 3]

Runs the demo's model and tasks (fp32, real Megatron-Core over gloo, real vLLM, an engine a rank) as TP1 PP1 DP1
and as each layout, and compares loss, gradient norm and rewards of every step with those of the first. Two
optimizer steps a rollout and a KL term, because at ratio 1 the loss is the same constant for any layout.
`trees_equal`: the forests of all steps are the same token by token. --quick: one layout, two steps.

Last line, JSON: {"layouts": [{"name", "loss_max_diff", "grad_norm_rel_diff", "reward_max_diff", "trees_equal"}],
"tolerance": {...}, "within_tolerance": bool}. loss_max_diff is absolute (the loss is near 0 by construction),
grad_norm_rel_diff relative, both maxima over steps. Exit status 1 when a layout is out of tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from runs import run

LAYOUTS = {
    "TP2-PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "TP2-DP2": (4, {"tensor_model_parallel_size": 2}),
    "PP2-DP2": (4, {"pipeline_model_parallel_size": 2}),
    "TP2-SP-DP2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}
TOLERANCE = {"loss_max_diff": 1e-6, "grad_norm_rel_diff": 1e-4, "reward_max_diff": 0.0}
"""fp32: other summation orders move logprobs by about 1e-6 and, after updates, weights by as much."""


def forests(run_dir: Path) -> list[list[list[list[int]]]]:
    """Tokens of every node of every tree of every step."""
    return [
        [[node["tokens"] for node in json.loads(line)["nodes"]] for line in path.read_text().splitlines()]
        for path in sorted((run_dir / "trees").glob("*.jsonl"))
    ]


def train(base: Path, name: str, ranks: int, layout: dict[str, object], steps: int) -> tuple[list[dict], list]:
    """Metrics and forests of one run."""
    overrides = [
        f"train.num_rollouts={steps}",
        "train.num_steps_per_rollout=2",
        "algo.kl_loss_coef=0.01",
        "checkpoint.enabled=false",
        "logging.trees_interval=1",
        *(f"parallel.{k}={str(v).lower()}" for k, v in layout.items()),
    ]
    print(f"{name}: {ranks} ranks ...", flush=True)
    return run(ranks, base / name, overrides, name), forests(base / name)


def main() -> int:
    """Run and compare; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="one layout, two steps")
    p.add_argument("--steps", type=int, default=3)
    args = p.parse_args()
    steps = 2 if args.quick else args.steps
    layouts = dict(list(LAYOUTS.items())[:1]) if args.quick else LAYOUTS
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        reference, trees = train(Path(tmp), "TP1-PP1-DP1", 1, {}, steps)
        for name, (ranks, layout) in layouts.items():
            got, theirs = train(Path(tmp), name, ranks, layout, steps)
            pairs = list(zip(reference, got, strict=True))
            rows.append(
                {
                    "name": name,
                    "loss_max_diff": max(abs(a["train/loss"] - b["train/loss"]) for a, b in pairs),
                    "grad_norm_rel_diff": max(abs(a["grad-norm"] - b["grad-norm"]) / a["grad-norm"] for a, b in pairs),
                    "reward_max_diff": max(abs(a["rollout/reward_mean"] - b["rollout/reward_mean"]) for a, b in pairs),
                    "trees_equal": trees == theirs,
                }
            )
    print(f"\n{steps} steps against TP1-PP1-DP1, fp32")
    print(f"{'layout':<12}{'loss diff':>12}{'grad norm rel':>15}{'reward diff':>13}  trees")
    for r in rows:
        same = "equal" if r["trees_equal"] else "DIFFER"
        columns = f"{r['loss_max_diff']:>12.1e}{r['grad_norm_rel_diff']:>15.1e}{r['reward_max_diff']:>13.1e}"
        print(f"{r['name']:<12}{columns}  {same}")
    good = all(r["trees_equal"] and all(r[k] <= v for k, v in TOLERANCE.items()) for r in rows)
    print(json.dumps({"layouts": rows, "tolerance": TOLERANCE, "within_tolerance": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
