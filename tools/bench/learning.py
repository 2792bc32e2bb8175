"""Does it pay? Accuracy against tokens and CPU seconds, for every way to sample and to give credit, seed by seed.

    python tools/bench/learning.py run --arms flat-grpo tree-treepo --seeds 101 102 103
    python tools/bench/learning.py report [--task carry] [--baseline ARM]
    python tools/bench/learning.py --report                                # every task that has results
    python tools/bench/learning.py --quick

Arms and tasks stand in tools/bench/learning.yaml. A run is one process with one thread, so that wall and CPU seconds
agree on a quiet machine; on a busy one believe the CPU seconds. Each finished run is one small JSON file under
--results, with its accuracy curve, tokens and CPU seconds by step. It is never run twice: `run` goes on where an
interrupted one stopped. Settings are chosen on seeds 101 to 103 and reported on seeds 1 to 5.

One evaluator for all arms: the trained model's export, by transformers alone, 512 held-out problems x 4 at
temperature 1. The curve between comes from the run's own evaluation (256 x 4).

`report` compares each arm with the task's baseline: accuracy at equal steps (difference with a 95 % interval), accuracy
of the mean curves at equal tokens (all that the cheaper of the two spent), and the tokens and CPU seconds at which the
arm's mean curve first reaches the baseline's final accuracy, as ratios to what the baseline spent. Intervals are
percentiles of 2,000 bootstrap draws over seeds; a ratio that the arm never reaches is null. Tokens are those forwarded
while sampling plus three times those of the update (a backward pass costs two forward ones) plus those of the
old-logprob pass.

Last line, JSON: {"tasks": [{"name", "seeds", "claim" (the arm that the task's line `claim` names, which the next four
are of; null without a run of it), "tokens_ratio_at_equal_accuracy", "cpu_ratio_at_equal_accuracy", "ci95": {"tokens",
"cpu", "accuracy"}, "accuracy_difference_at_equal_steps", "baseline", "arms": [{"name", "seeds", "accuracy",
"accuracy_sd", "accuracy_difference_at_equal_steps", "ci95", "accuracy_difference_at_equal_tokens", "equal_tokens_ci95",
"tokens_ratio_at_equal_accuracy", "tokens_ci95", "cpu_ratio_at_equal_accuracy", "cpu_ci95", "tokens_ratio", "cpu_ratio"
(whole runs), "paired_difference", "paired_ci95", "fit_tokens", "fit_cpu" (ScaleRL's curve, or its `problem`)}],
"vs_trl": {arm: ...} where TRL's runs are there}], "vs_trl": {"task", "arm", "seeds", "step_ratio",
"cpu_ratio_at_equal_accuracy"} of the first task whose claim has runs beside TRL's, or null}.
--plot writes an SVG of the task's curves.
--quick: two arms, one seed, two steps, in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

# Loaded as a module of another name, this file's folder is not on the path.
sys.path.insert(0, str(Path(__file__).parent))

import learning_curves

if TYPE_CHECKING:
    from treepo_mega.config import Config

ROOT = Path(__file__).resolve().parent.parent.parent
ARMS = Path(__file__).with_suffix(".yaml")
RESULTS = ROOT / "docs" / "results" / "learning"
PROBLEMS = 512
SAMPLES = 4
BOOTSTRAPS = 2000
TRL = "trl-grpo"
"""The arm of tools/bench/against_trl/side_by_side.py."""
Result = dict[str, Any]


def train(config: str, overrides: list[str], run_dir: Path, timeout_s: float) -> float:
    """One run of one process; returns the CPU seconds of it and of its children. RuntimeError when it fails."""
    command = [sys.executable, "-m", "treepo_mega.cli", "train", config, f"logging.run_dir={run_dir}", *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    return timed(command, env, run_dir.with_suffix(".log"), timeout_s)


def timed(command: list[str], env: dict[str, str], log: Path, timeout_s: float) -> float:
    """Run a command, its output in `log`; returns its CPU seconds, children too. RuntimeError when it fails."""
    before = os.times()
    with log.open("wb") as out:
        status = subprocess.run(command, cwd=ROOT, env=env, stdout=out, stderr=out, timeout=timeout_s).returncode
    after = os.times()
    if status:
        end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
        raise RuntimeError(f"{' '.join(command)} ended with status {status}:\n" + "\n".join(end))
    return after.children_user + after.children_system - before.children_user - before.children_system


def export_accuracy(run_dir: Path, problems: int) -> float:
    """Share of right samples of the run's export at temperature 1, by transformers: the same for every arm."""
    from treepo_mega.config import load_config

    if not (run_dir / "hf").is_dir():
        raise RuntimeError("the run has no export to evaluate: give its task the override checkpoint.save_hf=true")
    return accuracy_of(run_dir / "hf", load_config(run_dir / "config.yaml"), problems)


def accuracy_of(hf: Path, cfg: Config, problems: int, samples: int = SAMPLES) -> float:
    """Share of right samples of a checkpoint on the recipe's held-out prompts, graded by their own verifier."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from treepo_mega.data.prompts import load_prompts
    from treepo_mega.data.rewards.verifiers import load_verifier

    tokenizer = AutoTokenizer.from_pretrained(hf, local_files_only=True, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, local_files_only=True).eval()
    prompts = list(load_prompts(cfg.data.eval, cfg.data, tokenizer).prompts)[:problems]
    # The matrices are tiny: more threads would only wait for each other.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    right = 0.0
    for at in range(0, len(prompts), 128):
        batch = prompts[at : at + 128]
        width = max(len(prompt.tokens) for prompt in batch)
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p.tokens)) + p.tokens for p in batch])
        mask = torch.tensor([[0] * (width - len(p.tokens)) + [1] * len(p.tokens) for p in batch])
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=cfg.rollout.max_response_len,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=samples,
            )
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        asked = [prompt for prompt in batch for _ in range(samples)]
        for prompt, text in zip(asked, texts, strict=True):
            found = load_verifier(prompt.verifier)(prompt.data_source, text, prompt.answer, prompt.extra)
            right += found["score"] if isinstance(found, dict) else found
    return right / (len(prompts) * samples)


def curve(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Cumulated tokens and CPU seconds after each step that was evaluated, with its accuracy."""
    points = []
    tokens = 0.0
    cpu_s = 0.0
    wall_s = 0.0
    for row in rows:
        # The update runs forward and backward, which costs three forward passes; the old-logprob pass one.
        tokens += row.get("rollout/forwarded_tokens", 0.0) + 4 * row.get("perf/packed_tokens", 0.0)
        cpu_s += row.get("cpu_s/step", 0.0)
        wall_s += row.get("timing_s/step", 0.0)
        if "eval/accuracy" in row:
            point = {"step": row["step"], "tokens": tokens, "cpu_s": cpu_s, "wall_s": wall_s}
            points.append(point | {"accuracy": row["eval/accuracy"]})
    return points


def mean_of(rows: list[dict[str, Any]], name: str) -> float | None:
    """The mean of a metric over the steps that have it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None


WATCHED = (
    *("rollout/accuracy", "rollout/accuracy_policy", "rollout/prompts_trained", "rollout/refills", "train/entropy"),
    *("tree/token_ratio", "tree/duplicates", "tree/leaves", "rollout/generated_tokens", "timing_s/rollout"),
    *("cpu_s/rollout", "cpu_s/old_logprobs", "cpu_s/update", "cpu_s/reshard"),
)


def one_run(task: dict[str, Any], arm: list[str], seed: int, extra: list[str], problems: int) -> Result:
    """Train one arm with one seed and evaluate its export."""
    with tempfile.TemporaryDirectory() as tmp:
        run_dir = Path(tmp) / "run"
        overrides = [*task["overrides"], *arm, f"train.seed={seed}", *extra]
        cpu_s = train(task["config"], overrides, run_dir, task.get("timeout_s", 3600))
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        accuracy = export_accuracy(run_dir, problems)
    trained = [row for row in rows if "tree/token_ratio" in row]
    return {
        "seed": seed,
        "overrides": overrides,
        "accuracy": accuracy,
        "process_cpu_s": round(cpu_s, 1),
        "curve": [{name: round(value, 4) for name, value in point.items()} for point in curve(rows)],
        "means": {name: mean_of(trained, name) for name in WATCHED},
    }


def run(args: argparse.Namespace, plan: dict[str, Any], results: Path, extra: list[str], problems: int) -> None:
    """Every asked (seed, arm) that has no result yet; seeds outside, so that an early stop leaves whole sets."""
    task = plan["tasks"][args.task]
    folder = results / args.task
    folder.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for arm in args.arms:
            target = folder / f"{arm}.seed{seed}.json"
            if target.exists():
                continue
            print(f"{args.task}: {arm}, seed {seed}", file=sys.stderr, flush=True)
            result = one_run(task, plan["arms"][arm], seed, extra, min(problems, task.get("problems", problems)))
            keep(target, result)
            print(f"  accuracy {result['accuracy']:.3f}, {result['process_cpu_s']:.0f} CPU s", file=sys.stderr)


def keep(target: Path, result: Result) -> None:
    """Write a finished run's file at once or not at all: a half-written one would never be run again."""
    part = target.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(target)


def runs_of(folder: Path, arm: str) -> list[Path]:
    """The files of an arm's finished runs."""
    return sorted(folder.glob(f"{arm}.seed*.json"))


def reach(results: list[Result], accuracy: float, axis: str) -> float:
    """Where the mean curve of some runs first reaches `accuracy`, on `axis`, interpolated; inf when it never does."""
    ys = np.maximum.accumulate(np.mean([[point["accuracy"] for point in r["curve"]] for r in results], axis=0))
    xs = np.mean([[point[axis] for point in r["curve"]] for r in results], axis=0)
    if ys[-1] < accuracy:
        return float("inf")
    index = int(np.searchsorted(ys, accuracy))
    if index == 0:
        return float(xs[0])
    share = (accuracy - ys[index - 1]) / (ys[index] - ys[index - 1])
    return float(xs[index - 1] + share * (xs[index] - xs[index - 1]))


def ahead(ours: list[Result], theirs: list[Result]) -> float:
    """How much more accurate our mean curve is than theirs at the tokens that the cheaper of the two spent in all."""
    curves = [
        [np.mean([[point[name] for point in r["curve"]] for r in results], axis=0) for name in ("tokens", "accuracy")]
        for results in (ours, theirs)
    ]
    spent = min(tokens[-1] for tokens, _ in curves)
    our_accuracy, their_accuracy = (float(np.interp(spent, tokens, accuracy)) for tokens, accuracy in curves)
    return our_accuracy - their_accuracy


def interval(values: np.ndarray) -> list[float | None]:
    """The middle 95 % of `values`; None for an end that is infinite."""
    ends = np.percentile(values, [2.5, 97.5], method="nearest")
    return [round(float(end), 3) if np.isfinite(end) else None for end in ends]


def finite(value: float) -> float | None:
    """`value` for JSON, which has no infinity."""
    return round(value, 3) if np.isfinite(value) else None


def compare(baseline: list[Result], arm: list[Result], rng: np.random.Generator) -> dict[str, Any]:
    """An arm against the baseline, with bootstrap intervals over seeds."""

    def ratios(ours: list[Result], theirs: list[Result]) -> tuple[float, float, float, float]:
        # The final point of the same curve: evaluators must not be mixed within a ratio.
        goal = float(np.mean([r["curve"][-1]["accuracy"] for r in theirs]))
        spent = {axis: np.mean([r["curve"][-1][axis] for r in theirs]) for axis in ("tokens", "cpu_s")}
        difference = float(np.mean([r["accuracy"] for r in ours]) - np.mean([r["accuracy"] for r in theirs]))
        tokens, cpu = (reach(ours, goal, axis) / spent[axis] for axis in ("tokens", "cpu_s"))
        return difference, tokens, cpu, ahead(ours, theirs)

    def draw(results: list[Result]) -> list[Result]:
        return [results[index] for index in rng.integers(len(results), size=len(results))]

    difference, tokens_ratio, cpu_ratio, at_equal_tokens = ratios(arm, baseline)
    drawn = np.array([ratios(draw(arm), draw(baseline)) for _ in range(BOOTSTRAPS)])

    def whole(axis: str) -> float:
        ours = np.mean([r["curve"][-1][axis] for r in arm])
        return float(ours / np.mean([r["curve"][-1][axis] for r in baseline]))

    return {
        "seeds": sorted(r["seed"] for r in arm),
        "accuracy": round(float(np.mean([r["accuracy"] for r in arm])), 4),
        "accuracy_sd": round(float(np.std([r["accuracy"] for r in arm], ddof=1)), 4) if len(arm) > 1 else None,
        "accuracy_difference_at_equal_steps": round(difference, 4),
        "ci95": interval(drawn[:, 0]),
        "accuracy_difference_at_equal_tokens": round(at_equal_tokens, 4),
        "equal_tokens_ci95": interval(drawn[:, 3]),
        "tokens_ratio_at_equal_accuracy": finite(tokens_ratio),
        "tokens_ci95": interval(drawn[:, 1]),
        "cpu_ratio_at_equal_accuracy": finite(cpu_ratio),
        "cpu_ci95": interval(drawn[:, 2]),
        "tokens_ratio": round(whole("tokens"), 3),
        "cpu_ratio": round(whole("cpu_s"), 3),
    }


def against_trl(theirs: list[Result], ours: list[Result]) -> dict[str, Any] | None:
    """CPU seconds of the steps that both took, and to TRL's final accuracy, as shares of TRL's, on common seeds.

    None without any.
    """
    seeds = {r["seed"] for r in theirs} & {r["seed"] for r in ours}
    if not seeds:
        return None
    trl = [r for r in theirs if r["seed"] in seeds]
    arm = [r for r in ours if r["seed"] in seeds]

    last = min(r["curve"][-1]["step"] for r in (*trl, *arm))

    def step_s(runs: list[Result]) -> float:
        # Steps get cheaper as answers get shorter: only equal numbers of them compare.
        points = [([point["step"] for point in r["curve"]], [point["cpu_s"] for point in r["curve"]]) for r in runs]
        return float(np.mean([np.interp(last, steps, cpu_s) / last for steps, cpu_s in points]))

    goal = float(np.mean([r["curve"][-1]["accuracy"] for r in trl]))
    spent = float(np.mean([r["curve"][-1]["cpu_s"] for r in trl]))
    return {
        "seeds": sorted(seeds),
        "step_ratio": round(step_s(arm) / step_s(trl), 3),
        "cpu_ratio_at_equal_accuracy": finite(reach(arm, goal, "cpu_s") / spent),
    }


def report(
    plan: dict[str, Any],
    results: Path,
    tasks: list[str],
    seeds: list[int] | None,
    plots: Path | None = None,
    baseline: str | None = None,
) -> dict[str, Any]:
    """The comparison of every finished arm of `tasks` on `seeds` (None: all), as the last line's object.

    `plots`: a folder that gets an SVG for each task. `baseline`: another arm than the task's own to compare with.
    """
    out = []
    for task in tasks:
        finished: dict[str, list[Result]] = {}
        for path in sorted((results / task).glob("*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            if seeds is None or result["seed"] in seeds:
                finished.setdefault(path.name.split(".seed")[0], []).append(result)
        name = baseline or plan["tasks"][task]["baseline"]
        if name not in finished:
            raise SystemExit(f"task {task}: no finished run of its baseline {name} under {results / task}")
        rng = np.random.default_rng(0)
        arms = []
        steps = finished[name][0]["curve"][-1]["step"]
        for arm, runs in finished.items():
            if any(run["curve"][-1]["step"] != steps for run in runs):
                print(f"{task}: {arm} ended before step {steps}, and is left out of the table", file=sys.stderr)
                continue
            row = {"name": arm} | compare(finished[name], runs, rng)
            row |= learning_curves.paired(finished[name], runs, rng, BOOTSTRAPS)
            row |= {
                "fit_tokens": learning_curves.fitted(finished[name], runs, "tokens"),
                "fit_cpu": learning_curves.fitted(finished[name], runs, "cpu_s"),
            }
            arms.append(row)
        found = {"name": task, "baseline": name, "seeds": sorted(r["seed"] for r in finished[name]), "arms": arms}
        found |= headline(plan["tasks"][task].get("claim"), arms)
        if TRL in finished:
            found["vs_trl"] = {arm: against_trl(finished[TRL], runs) for arm, runs in finished.items() if arm != TRL}
        out.append(found)
        if plots is not None:
            learning_curves.plot(task, finished, plots / f"learning_{task}.svg")
    beside_trl = [
        {"task": task["name"], "arm": task["claim"]} | task["vs_trl"][task["claim"]]
        for task in out
        if task.get("vs_trl", {}).get(task["claim"]) is not None
    ]
    return {"tasks": out, "vs_trl": beside_trl[0] if beside_trl else None}


def headline(claim: str | None, arms: list[dict[str, Any]]) -> dict[str, Any]:
    """What a task shows for the arm `claim`: its ratios to the baseline, with intervals; nulls without a run of it."""
    row = next((arm for arm in arms if arm["name"] == claim), None)
    ratios = ("tokens_ratio_at_equal_accuracy", "cpu_ratio_at_equal_accuracy", "accuracy_difference_at_equal_steps")
    if row is None:
        return {"claim": None, "ci95": None} | dict.fromkeys(ratios)
    ends = {"tokens": row["tokens_ci95"], "cpu": row["cpu_ci95"], "accuracy": row["ci95"]}
    return {"claim": claim, "ci95": ends} | {name: row[name] for name in ratios}


def show(found: dict[str, Any]) -> None:
    """The table for people, as Markdown."""
    for task in found["tasks"]:
        print(f"\n{task['name']}: against {task['baseline']}\n")
        columns = ("arm", "seeds", "accuracy", "difference", "at equal tokens", "tokens to equal accuracy", "CPU to it")
        print(f"| {' | '.join([*columns, 'tokens', 'CPU'])} |")
        print("|---" * (len(columns) + 2) + "|")
        for arm in task["arms"]:
            sd = "" if arm["accuracy_sd"] is None else f" ± {arm['accuracy_sd']:.3f}"
            ends, ends_at_equal_tokens = (
                " to ".join("-" if end is None else f"{end:+.3f}" for end in arm[name])
                for name in ("ci95", "equal_tokens_ci95")
            )
            print(
                f"| {arm['name']} | {len(arm['seeds'])} | {arm['accuracy']:.3f}{sd} "
                f"| {arm['accuracy_difference_at_equal_steps']:+.3f} ({ends}) "
                f"| {arm['accuracy_difference_at_equal_tokens']:+.3f} ({ends_at_equal_tokens}) "
                f"| {bounds(arm['tokens_ratio_at_equal_accuracy'], arm['tokens_ci95'])} "
                f"| {bounds(arm['cpu_ratio_at_equal_accuracy'], arm['cpu_ci95'])} "
                f"| {arm['tokens_ratio']:.2f} | {arm['cpu_ratio']:.2f} |"
            )


def bounds(value: float | None, ends: list[float | None]) -> str:
    """A ratio with its interval; "never" where the arm does not get there."""
    shown = ["never" if end is None else f"{end:.2f}" for end in (value, *ends)]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def known(names: list[str], have: dict[str, Any], what: str) -> None:
    """Raise SystemExit naming the nearest one for a name that the plan does not have."""
    from treepo_mega.errors import nearest

    for name in names:
        if name not in have:
            raise SystemExit(f"no {what} {name!r} in {ARMS.name}{nearest(name, have)}")


def main() -> int:
    """Run or report; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", nargs="?", choices=("run", "report"), default="report")
    p.add_argument("--report", action="store_true", help="report on every task that has results")
    p.add_argument("--task", default="carry")
    p.add_argument("--arms", nargs="+", default=["flat-grpo", "tree-treepo"])
    p.add_argument("--seeds", nargs="+", type=int, help="run: default 101 102 103; report: default all")
    p.add_argument("--baseline", metavar="ARM", help="report: compare with this arm instead of the task's baseline")
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--plot", type=Path, metavar="FOLDER", help="report: write learning_TASK.svg there (docs/assets)")
    p.add_argument("--quick", action="store_true", help="two arms, one seed, two steps, in a temporary folder")
    args = p.parse_args()
    plan = yaml.safe_load(ARMS.read_text(encoding="utf-8"))
    known([args.task], plan["tasks"], "task")
    known(args.arms, plan["arms"], "arm")
    if args.quick:
        args.seeds = [101]
        args.results = Path(tempfile.mkdtemp(prefix="learning-"))
        small = ["train.num_rollouts=2", "eval.interval=1", "eval.max_prompts=16", "train.lr_warmup_iters=0"]
        try:
            run(args, plan, args.results, small, 64)
            found = report(plan, args.results, [args.task], None)
        finally:
            shutil.rmtree(args.results)
    else:
        if args.command == "run" and not args.report:
            args.seeds = args.seeds or [101, 102, 103]
            run(args, plan, args.results, [], PROBLEMS)
        tasks = [args.task]
        if args.report:
            tasks = [
                name for name, task in plan["tasks"].items() if any(runs_of(args.results / name, task["baseline"]))
            ]
        found = report(plan, args.results, tasks, args.seeds, args.plot, args.baseline)
    show(found)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
