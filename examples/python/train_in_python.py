"""Train from Python: build a configuration, run a few steps in this process, read the metrics back.

    python examples/python/train_in_python.py [RUN_DIR]

One rank on a CPU. For several ranks, start this file with `torchrun --nproc-per-node N`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from treepo_mega.config import Config, load_config
from treepo_mega.monitor.progress import quieten_libraries

STEPS = 3


def configuration(run_dir: str) -> Config:
    """The demo's recipe, shorter and with the reward of `custom_reward.py`.

    The overrides are those of the command line. `parse_config` takes a dict instead.
    """
    return load_config(
        "examples/tiny_cpu.yaml",
        [
            "data.verifier=examples/python/custom_reward.py:compute_score",
            f"logging.run_dir={run_dir}",
            f"train.num_rollouts={STEPS}",
            "rollout.rollout_batch_size=8",
            "eval.max_prompts=32",
            "checkpoint.load=null",
        ],
    )


def main() -> None:
    """Train, then print a line per step."""
    quieten_libraries()  # before the import: most libraries warn while they are imported
    from treepo_mega.train import train

    run_dir = sys.argv[1] if len(sys.argv) > 1 else "runs/train_in_python"
    code = train(configuration(run_dir))
    lines = (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for metrics in map(json.loads, lines):
        if "rollout/reward_mean" in metrics:
            step = metrics["step"]
            print(f"step {step}: reward {metrics['rollout/reward_mean']:.3f}, loss {metrics['train/loss']:+.4f}")
    print(f"exit code {code}; everything else is in {run_dir}")


if __name__ == "__main__":
    main()
