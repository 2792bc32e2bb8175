"""Our arms and TRL's GRPOTrainer on the same model, problems, rewards and number of trajectories, taking turns.

    python tools/bench/against_trl/side_by_side.py --seeds 101 [--task carry] [--arms flat-grpo] [--trl-python PY]
    python tools/bench/learning.py report --task carry

For each seed TRL runs first, then each arm that has no result yet; every run is one process with one thread, so that
wall and CPU seconds agree on a quiet machine. TRL lives in a virtual environment of its own: requirements.txt beside
this file has the commands. Results are the JSON files of tools/bench/learning.py, under the arm's name `trl-grpo`, with
the versions; that bench's report compares them with all others. A finished run is not run again.

What differs. TRL samples with `transformers.generate`, drops no prompt without signal (its own default), and its curve
is measured on checkpoints by transformers, 256 held-out problems x 4; ours by our engine during the run. The last
accuracy of both is that of the trained model by transformers, 512 x 4. Last line, JSON: {"results": [{"arm", "seed",
"accuracy", "process_cpu_s", "step_cpu_s"}]}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tools" / "bench"))

import learning  # noqa: E402
from treepo_mega.config import Config, load_config  # noqa: E402
from treepo_mega.data.prompts import load_prompts  # noqa: E402
from treepo_mega.data.tokenizer import load_tokenizer  # noqa: E402

ARM = learning.TRL
DEFAULT_PYTHON = ROOT / "build" / "trl" / "bin" / "python"


def settings_of(cfg: Config, seed: int, micro_batch: int | None) -> dict[str, Any]:
    """What grpo.py needs of a recipe, with its prompts. `micro_batch`: trajectories of a pass; None: a whole batch."""
    tokenizer = load_tokenizer(cfg.model.hf_checkpoint, cfg.data)
    prompts = load_prompts(cfg.data.train, cfg.data, tokenizer).prompts
    rows = [
        {
            "prompt": prompt.text,
            "answer": prompt.answer,
            "verifier": prompt.verifier,
            "data_source": prompt.data_source,
            "extra": json.dumps(prompt.extra),
            "prompt_tokens": len(prompt.tokens),
        }
        for prompt in prompts
    ]
    return {
        "model": str(ROOT / cfg.model.hf_checkpoint),
        "rows": rows,
        "seed": seed,
        "prompts": cfg.rollout.rollout_batch_size,
        "samples": cfg.rollout.n_samples_per_prompt,
        "micro_batch": micro_batch,
        "response_tokens": cfg.rollout.max_response_len,
        "updates": cfg.train.num_steps_per_rollout,
        "rollouts": cfg.train.num_rollouts,
        "interval": cfg.eval.interval,
        "lr": cfg.train.lr,
        "warmup": cfg.train.lr_warmup_iters,
        "betas": [cfg.train.adam_beta1, cfg.train.adam_beta2],
        "weight_decay": cfg.train.weight_decay,
        "clip_grad": cfg.train.clip_grad,
        "clip": [cfg.algo.eps_clip, cfg.algo.eps_clip_high],
    }


def run_trl(task: dict[str, Any], seed: int, python: str, problems: int, extra: list[str]) -> dict[str, Any]:
    """Train TRL's arm with one seed, measure its checkpoints, and return the result in the bench's form."""
    cfg = load_config(ROOT / task["config"], [*task["overrides"], *extra, f"train.seed={seed}"])
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        (folder / "settings.json").write_text(
            json.dumps(settings_of(cfg, seed, task.get("trl_micro_batch"))), encoding="utf-8"
        )
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
        log = folder / "log.txt"
        command = [python, str(Path(__file__).with_name("grpo.py")), str(folder / "settings.json"), str(folder / "run")]
        cpu_s = learning.timed(command, env, log, task.get("timeout_s", 3600))
        lines = (folder / "run" / "steps.jsonl").read_text(encoding="utf-8").splitlines()
        rows = {row["step"]: row for row in map(json.loads, lines)}
        start = {"step": 0, "tokens": 0.0, "cpu_s": 0.0, "wall_s": 0.0}
        # As many problems and samples as our own runs evaluate between steps.
        held_out = min(problems, cfg.eval.max_prompts or problems)
        samples = cfg.eval.n_samples_per_prompt
        points = [start | {"accuracy": learning.accuracy_of(ROOT / cfg.model.hf_checkpoint, cfg, held_out, samples)}]
        for step in range(cfg.eval.interval, cfg.train.num_rollouts + 1, cfg.eval.interval):
            accuracy = learning.accuracy_of(folder / "run" / f"step_{step}", cfg, held_out, samples)
            points.append(rows[step] | {"accuracy": accuracy})
        accuracy = learning.accuracy_of(folder / "run" / "hf", cfg, problems)
        versions = json.loads((folder / "run" / "versions.json").read_text(encoding="utf-8"))
    return {
        "seed": seed,
        "overrides": [],
        "versions": versions,
        "accuracy": accuracy,
        "process_cpu_s": round(cpu_s, 1),
        "curve": [{name: round(value, 4) for name, value in point.items()} for point in points],
        "means": {},
    }


def main() -> int:
    """Run what is missing, taking turns; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", default="carry")
    p.add_argument("--arms", nargs="*", default=["flat-grpo", "content-grpo"])
    p.add_argument("--seeds", nargs="+", type=int, default=[101])
    p.add_argument("--results", type=Path, default=learning.RESULTS)
    p.add_argument("--trl-python", type=Path, default=DEFAULT_PYTHON, help="the Python that has TRL")
    args, extra = p.parse_known_args()
    plan = yaml.safe_load(learning.ARMS.read_text(encoding="utf-8"))
    learning.known([args.task], plan["tasks"], "task")
    learning.known(args.arms, plan["arms"], "arm")
    if not args.trl_python.exists():
        print(f"no {args.trl_python}: tools/bench/against_trl/requirements.txt says how to make it", file=sys.stderr)
        return 2
    task = plan["tasks"][args.task]
    folder = args.results / args.task
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in args.seeds:
        for arm in (ARM, *args.arms):
            target = folder / f"{arm}.seed{seed}.json"
            if not target.exists():
                print(f"{args.task}: {arm}, seed {seed}", file=sys.stderr, flush=True)
                problems = min(learning.PROBLEMS, task.get("problems", learning.PROBLEMS))
                if arm == ARM:
                    result = run_trl(task, seed, str(args.trl_python), problems, extra)
                else:
                    result = learning.one_run(task, plan["arms"][arm], seed, extra, problems)
                learning.keep(target, result)
            result = json.loads(target.read_text(encoding="utf-8"))
            last = result["curve"][-1]
            found.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "accuracy": round(result["accuracy"], 4),
                    "process_cpu_s": result["process_cpu_s"],
                    "step_cpu_s": round(last["cpu_s"] / last["step"], 3),
                }
            )
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"results": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
