"""What a step costs: trees against independent samples, and this tree against an earlier commit.

    python tools/bench/step.py [--quick] [--before COMMIT] [--repeats 2] [--steps 40]

Short runs of the demo's recipe (examples/tiny_cpu.yaml), each a process of one rank with one thread, on seed after
seed. The modes alternate, so that what else the machine does meets them alike:

    tree          the recipe as it is: half more prompts in flight than a step trains, what is left over trains later
    flat          rollout.mode sequential, the same number of trajectories
    tree exact    rollout.oversample 1 and rollout.surplus drop: a step begins exactly its batch
    flat exact    the same of independent samples
    tree before   the recipe and the code of --before, in a git worktree of its own that is removed afterwards

The default of --before is the last commit whose step sampled, waited, graded and sampled replacements in rounds, and
which trained equal tokens of siblings as often as they were sampled. The first step of a run is left out (it fills
caches); figures are means over the other steps, and over repeats.

CPU seconds are those of the trainer's process, engine included, graders not. On a quiet machine they are its wall
seconds but for waits, which is why both are given. On a busy one believe the CPU seconds.

Last line, JSON: {"modes": [{"name", "rollout_s" (CPU seconds of sampling, grading and exchange), "train_s" (the rest of
the step), "step_s", "rollout_wall_s", "step_wall_s", "tokens_forwarded" (by the engine), "refill_rounds" (generation
rounds after the first), "prompts_replaced" (null before: it counted rounds), "prompts_trained", "engine_steps",
"running_mean", "idle_share" (of sampling and grading, wall: the engine had nothing to sample)}], "ratio_tree_over_flat"
(rollout_s), "ratio_now_over_before" (step_s of tree), "ratio_exact_over_flat_exact" and "ratio_exact_over_before" (the
same of tree exact), all of them with "_wall", "token_ratio" (tokens_forwarded, tree over flat), "planned" (engine steps
with rounds and with refill, by count: see `planned`), "before" (the commit), "targets", "met"}. --quick: one repeat of
three steps. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runs import ROOT, metrics, wait
from treepo_mega.rollout.refill import RefillRule

BEFORE = "8931bede2c518124c4e176a0778b6a651c9d1e20"
SHARED = [
    "eval.at_start=false",
    "eval.at_end=false",
    "checkpoint.enabled=false",
    "checkpoint.save_hf=false",
    "logging.tensorboard=false",
    "logging.progress=false",
]
"""What is no part of a step is off. Both commits have these keys."""
EXACT = ["rollout.oversample=1", "rollout.surplus=drop"]
MODES = {
    "tree": [],
    "flat": ["rollout.mode=sequential"],
    "tree before": [],
    "tree exact": EXACT,
    "flat exact": ["rollout.mode=sequential", *EXACT],
}
TARGETS = {"ratio_tree_over_flat": 0.75, "ratio_now_over_before": 0.60, "idle_share": 0.10}
Row = dict[str, Any]


@contextlib.contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """A git worktree of `commit`, removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(path), commit], check=True, capture_output=True, text=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True, capture_output=True, text=True)


def run(code: Path, run_dir: Path, overrides: list[str], what: str) -> list[Row]:
    """The metrics of one run of the code under `code`, one row a step. RuntimeError when it fails."""
    log = run_dir.with_suffix(".log")
    command = [sys.executable, "-m", "treepo_mega.cli", "train", "examples/tiny_cpu.yaml", *SHARED]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    # Before the installed package: the worktree's own.
    env["PYTHONPATH"] = str(code)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, f"logging.run_dir={run_dir}", *overrides],
            cwd=code,
            env=env,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    wait(process, log, what, timeout_s=1200)
    return metrics(run_dir)


def of_step(row: Row, rounds: bool) -> Row:
    """What counts of one step; `rounds`: it counts its refills in rounds."""
    rollout = {clock: row[f"{clock}/rollout"] + row[f"{clock}/reward"] for clock in ("cpu_s", "timing_s")}
    waited = row.get("rollout/engine_grader_wait_share", 0.0) * row["timing_s/rollout"] + row["timing_s/reward"]
    return {
        "rollout_s": rollout["cpu_s"],
        "train_s": row["cpu_s/step"] - rollout["cpu_s"],
        "step_s": row["cpu_s/step"],
        "rollout_wall_s": rollout["timing_s"],
        "step_wall_s": row["timing_s/step"],
        "tokens_forwarded": row["rollout/forwarded_tokens"],
        "refill_rounds": row["rollout/refills"] if rounds else 0.0,
        "prompts_replaced": None if rounds else row["rollout/refills"],
        "prompts_trained": row["rollout/prompts_trained"],
        "engine_steps": row["rollout/engine_steps"],
        "running_mean": row["rollout/running_mean"],
        "idle_share": waited / rollout["timing_s"],
    }


def mean_of(rows: list[Row]) -> Row:
    """Means by key, None where a key has no numbers."""
    return {
        name: None if rows[0][name] is None else round(statistics.fmean(row[name] for row in rows), 4)
        for name in rows[0]
    }


def verdict(modes: dict[str, Row], before: str) -> Row:
    """The last line."""
    tree, flat, old = modes["tree"], modes["flat"], modes["tree before"]
    out: Row = {"modes": [{"name": name} | found for name, found in modes.items()]}
    for end in ("_s", "_wall_s"):
        name = end.removesuffix("_s")
        out[f"ratio_tree_over_flat{name}"] = round(tree[f"rollout{end}"] / flat[f"rollout{end}"], 4)
        out[f"ratio_now_over_before{name}"] = round(tree[f"step{end}"] / old[f"step{end}"], 4)
        exact, flat_exact = modes["tree exact"], modes["flat exact"]
        out[f"ratio_exact_over_flat_exact{name}"] = round(exact[f"rollout{end}"] / flat_exact[f"rollout{end}"], 4)
        out[f"ratio_exact_over_before{name}"] = round(exact[f"step{end}"] / old[f"step{end}"], 4)
    out["token_ratio"] = round(tree["tokens_forwarded"] / flat["tokens_forwarded"], 4)
    found = out | {"idle_share": tree["idle_share"]}
    met = {name: found[name] <= target for name, target in TARGETS.items()}
    by_count = [planned(sigma, share) for share in (0.8, 0.5) for sigma in (0.0, 0.35, 0.9)]
    return out | {"planned": by_count, "before": before, "targets": TARGETS, "met": met}


def planned(sigma: float, share: float, draws: int = 2000) -> Row:
    """Mean engine steps until 16 trees with signal are there, with an engine that has room for all, by count alone.

    A tree takes as many steps as its longest path: log-normal, median 1, `sigma` of its logarithm. `share`: of trees
    that have signal.
    """
    rng = random.Random(f"{sigma} {share}")
    rounds = refilled = 0.0
    for _ in range(draws):
        trees = [(rng.lognormvariate(0.0, sigma), rng.random() < share) for _ in range(400)]
        rule = RefillRule(begin=16, wanted=16, most=len(trees))
        begun, found = 0, 0
        while found < 16:
            batch = trees[begun : begun + 16 - found]
            begun += len(batch)
            rounds += max(steps for steps, _ in batch)
            found += sum(signal for _, signal in batch)
        running = [(steps, signal) for steps, signal in trees[:16]]
        heapq.heapify(running)
        empty = 0
        while running:
            now, signal = heapq.heappop(running)
            empty += not signal
            position = None if signal else rule.replaces(empty)
            if position is not None:
                steps, later = trees[position]
                heapq.heappush(running, (now + steps, later))
        refilled += now
    return {
        "sigma": sigma,
        "share_with_signal": share,
        "rounds": round(rounds / draws, 3),
        "refilled": round(refilled / draws, 3),
        "ratio": round(refilled / rounds, 4),
    }


def main() -> None:
    """Run the modes in alternation, then print a line for each and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat of three steps")
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT", help="the commit to compare with")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each mode, on seeds of their own")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run, the first of which is left out")
    args = parser.parse_args()
    repeats, steps = (1, 3) if args.quick else (args.repeats, args.steps)
    if steps < 2:
        parser.error("--steps: the first is left out, so at least 2")
    found: dict[str, list[Row]] = {name: [] for name in MODES}
    with tree_of(args.before) as old, tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for name, overrides in MODES.items():
                what = f"{name}, repeat {repeat + 1} of {repeats}"
                print(what, file=sys.stderr, flush=True)
                code = old if name == "tree before" else ROOT
                run_dir = Path(folder) / f"{repeat} {name}".replace(" ", "-")
                keys = [*overrides, f"train.seed={repeat + 1}", f"train.num_rollouts={steps}"]
                rows = run(code, run_dir, keys, what)[1:]
                found[name] += [of_step(row, rounds=code == old) for row in rows]
    modes = {name: mean_of(rows) for name, rows in found.items()}
    for name, figures in modes.items():
        print(f"{name:12} rollout {figures['rollout_s']:.2f} s, step {figures['step_s']:.2f} s (CPU)", file=sys.stderr)
    print(json.dumps(verdict(modes, args.before)))


if __name__ == "__main__":
    main()
