"""`make demo-agent`: trees over turns on this machine, without a GPU: a policy learns what to ask a tool, and when.

    python tools/demo_agent.py [--seeds 1 2 3] [--run-dir runs/demo_agent] [a.b=c ...]

Trains examples/agent_cpu.yaml with each seed, one rank each, one after the other: real Megatron-Core, a real vLLM
engine, real tools in their processes. Prints held-out success at temperature 1 before and after, calls a trajectory,
and minutes; writes summary.json of the same. Exit status 0 only if every run worked.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "examples/agent_cpu.yaml"
SURROUNDINGS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Command line: seeds, and any configuration overrides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="train.seed of each run")
    parser.add_argument("--run-dir", default="runs/demo_agent", help="where the runs write, a folder a seed")
    parser.add_argument("--timeout", type=float, default=1800, help="deadline of a run, seconds")
    return parser.parse_known_args(argv)


def train(run_dir: Path, seed: int, timeout: float, overrides: list[str]) -> dict[str, float]:
    """One run: success before and after, turns a trajectory in the first and the last steps, seconds."""
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, "-m", "treepo_mega.cli", "train", CONFIG, f"logging.run_dir={run_dir}"]
    command += [f"train.seed={seed}", *overrides]
    began = time.monotonic()
    subprocess.run(command, cwd=ROOT, env={**os.environ, **SURROUNDINGS}, check=True, timeout=timeout)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    success = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    turns = [row["env/turns"] for row in rows if "env/turns" in row]
    ratios = [row["tree/token_ratio"] for row in rows if "tree/token_ratio" in row]
    few = max(1, len(turns) // 6)
    return {
        "seed": seed,
        "before": success[0],
        "after": success[-1],
        "turns_first": statistics.fmean(turns[:few]),
        "turns_last": statistics.fmean(turns[-few:]),
        "token_ratio": statistics.fmean(ratios),
        "seconds": time.monotonic() - began,
    }


def main(argv: list[str] | None = None) -> int:
    """Run all seeds; returns the exit status."""
    args, overrides = parse(argv)
    root = (ROOT / args.run_dir).resolve()
    runs = [train(root / f"seed_{seed}", seed, args.timeout, overrides) for seed in args.seeds]
    (root / "summary.json").write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(f"\n{'seed':>4} {'before':>7} {'after':>7} {'gain':>7}   calls a trajectory   tokens   minutes")
    for run in runs:
        print(
            f"{run['seed']:>4} {run['before']:>7.3f} {run['after']:>7.3f} {run['after'] - run['before']:>+7.3f}   "
            f"{run['turns_first']:>6.2f} -> {run['turns_last']:<6.2f}     {run['token_ratio']:>6.3f}   "
            f"{run['seconds'] / 60:>7.1f}"
        )
    print(json.dumps({"runs": runs}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
