"""What are a tree's leaves worth? Accuracy against the independent samples that an arm's steps stand for.

    python tools/bench/learning_variance.py [--task carry] [--steps 6] [--seed 101] [--arms ARM ...]
    python tools/bench/learning_variance.py --quick

For each arm of tools/bench/learning.yaml with stored runs on seeds 1 to 5 this trains a few steps, and counts how many
independent draws of the policy a token of its leaves is one of (`tree/independent_q1` to `q4`, by quarter of the path;
Kish's effective size over the leaves below a branch). Times the prompts that a step trains, that is the number of
independent samples behind a step's gradient, at the beginning of paths and at their end. Beside it stand accuracy and
tokens of the stored runs. Counts and tokens do not depend on the machine.

An arm that has been counted is not run again (--results/TASK/effective/ARM.json). Last line, JSON: {"task", "arms":
[{"name", "seeds", "accuracy", "prompts", "leaves", "draws_first", "draws_last" (per prompt), "samples_first",
"samples_last" (per step), "tokens_ratio"}], "rank_correlation": {"samples_first", "samples_last", "leaves",
"tokens_ratio"} of accuracy over arms (Spearman)}. --quick: two arms, two steps, in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

# Loaded as a module of another name, this file's folder is not on the path.
sys.path.insert(0, str(Path(__file__).parent))

import learning

REPORTED = range(1, 6)
"""Seeds of stored runs."""
FIRST, LAST = "tree/independent_q1", "tree/independent_q4"
COUNTED = (FIRST, LAST, "tree/leaves", "rollout/prompts_trained")


def count(task: dict[str, Any], arm: list[str], seed: int, steps: int) -> dict[str, float]:
    """Means of COUNTED over the first `steps` steps of an arm. RuntimeError when it fails."""
    with tempfile.TemporaryDirectory() as tmp:
        run_dir = Path(tmp) / "run"
        short = [f"train.num_rollouts={steps}", "train.lr_warmup_iters=0", "eval.at_start=false", "eval.at_end=false"]
        short += [f"eval.interval={steps + 1}", "checkpoint.save_hf=false", f"train.seed={seed}"]
        learning.train(task["config"], [*task["overrides"], *arm, *short], run_dir, task.get("timeout_s", 3600))
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {name: learning.mean_of(rows, name) for name in COUNTED}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise RuntimeError(f"the run has no metric {', '.join(missing)}")
    return {name: float(value) for name, value in found.items() if value is not None}


def stored(folder: Path, arm: str) -> list[learning.Result]:
    """The runs of an arm on reported seeds."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in learning.runs_of(folder, arm)]
    return [run for run in runs if run["seed"] in REPORTED]


def row_of(arm: str, runs: list[learning.Result], counts: dict[str, float], baseline_tokens: float) -> dict[str, Any]:
    """One arm's line."""
    prompts = counts["rollout/prompts_trained"]
    return {
        "name": arm,
        "seeds": sorted(run["seed"] for run in runs),
        "accuracy": round(float(np.mean([run["accuracy"] for run in runs])), 4),
        "prompts": round(prompts, 1),
        "leaves": round(counts["tree/leaves"], 1),
        "draws_first": round(counts[FIRST], 2),
        "draws_last": round(counts[LAST], 2),
        "samples_first": round(prompts * counts[FIRST], 1),
        "samples_last": round(prompts * counts[LAST], 1),
        "tokens_ratio": round(float(np.mean([run["curve"][-1]["tokens"] for run in runs])) / baseline_tokens, 3),
    }


def rank_correlation(rows: list[dict[str, Any]], name: str) -> float | None:
    """Spearman's, of accuracy and `name` over arms; None where one of them is alike everywhere, or arms are few."""
    accuracy, other = (np.array([row[key] for row in rows]) for key in ("accuracy", name))
    if len(rows) < 3 or np.ptp(accuracy) == 0 or np.ptp(other) == 0:
        return None
    return round(float(np.corrcoef(ranks(accuracy), ranks(other))[0, 1]), 3)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank.

    >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [1.5, 0.0, 1.5]
    """
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])


def show(rows: list[dict[str, Any]]) -> None:
    """The table for people, as Markdown, most accurate first."""
    columns = ("arm", "seeds", "accuracy", "prompts", "leaves", "draws, start", "draws, end", "samples, start", "end")
    print(f"| {' | '.join([*columns, 'tokens'])} |")
    print("|---" * (len(columns) + 1) + "|")
    for row in sorted(rows, key=lambda row: -row["accuracy"]):
        cells = [row["name"], len(row["seeds"]), f"{row['accuracy']:.3f}", row["prompts"], row["leaves"]]
        cells += [row[name] for name in ("draws_first", "draws_last", "samples_first", "samples_last", "tokens_ratio")]
        print(f"| {' | '.join(map(str, cells))} |")


def main() -> int:
    """Count what is missing and report; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", default="carry")
    p.add_argument("--arms", nargs="+", help="default: all with runs on two reported seeds or more")
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--seed", type=int, default=101, help="of the counted steps")
    p.add_argument("--results", type=Path, default=learning.RESULTS)
    p.add_argument("--quick", action="store_true", help="two arms, two steps, in a temporary folder")
    args = p.parse_args()
    plan = yaml.safe_load(learning.ARMS.read_text(encoding="utf-8"))
    learning.known([args.task], plan["tasks"], "task")
    task = plan["tasks"][args.task]
    folder = args.results / args.task
    arms = args.arms or [arm for arm in plan["arms"] if len(stored(folder, arm)) > 1]
    learning.known(arms, plan["arms"], "arm")
    kept = folder / "effective"
    if args.quick:
        arms, args.steps = arms[:2], 2
        kept = Path(tempfile.mkdtemp(prefix="variance-"))
    kept.mkdir(exist_ok=True)
    tokens = float(np.mean([run["curve"][-1]["tokens"] for run in stored(folder, task["baseline"])]))
    rows = []
    for arm in arms:
        target = kept / f"{arm}.json"
        if not target.exists():
            print(f"{args.task}: {arm}", file=sys.stderr, flush=True)
            learning.keep(target, count(task, plan["arms"][arm], args.seed, args.steps))
        rows.append(row_of(arm, stored(folder, arm), json.loads(target.read_text(encoding="utf-8")), tokens))
    show(rows)
    over = ("samples_first", "samples_last", "leaves", "tokens_ratio")
    print(
        json.dumps(
            {"task": args.task, "arms": rows} | {"rank_correlation": {n: rank_correlation(rows, n) for n in over}}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
