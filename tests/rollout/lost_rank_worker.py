"""One of two ranks with an engine each, of which rank 1 is killed or gets stuck in the middle of a rollout.

`torchrun ... lost_rank_worker.py HF_DIR killed|stuck`. Rank 0 says what it was told, and leaves with status 2.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from transformers import AutoTokenizer

from treepo_mega.config import parse_config
from treepo_mega.data.prompts import Prompt
from treepo_mega.data.rewards import RewardPool
from treepo_mega.engine.engine import Engine
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.timers import Timers
from treepo_mega.rollout.collect import Collector
from treepo_mega.rollout.generator import Generator
from treepo_mega.rollout.jobs import Job
from treepo_mega.runtime import dist
from treepo_mega.runtime.signals import StopRequest


def main(hf: Path, how: str) -> None:
    """See the module docstring."""
    cfg = parse_config(
        {
            "model": {"hf_checkpoint": str(hf)},
            "data": {"train": [{"reasoning_gym": "chain_sum"}], "max_prompt_len": 64},
            "rollout": {
                "n_samples_per_prompt": 4,
                "max_response_len": 48,
                "segment": {"length": 16},
                "timeout_s": 12,
                "engine": {"max_num_batched_tokens": 1024},
            },
            "distributed": {"timeout_s": 60},
        }
    )
    StopRequest().install()  # as a run does: the launcher's SIGTERM, 0.1 s after a death, must not come first
    dist.initialize(cfg, ModelSpec.from_hf(hf))
    engine = Engine(hf, cfg)
    generator = Generator(engine, cfg, AutoTokenizer.from_pretrained(hf))
    jobs = [Job(Prompt(f"p{k}", "", [3 + k] * 33, "", "exact", "test")) for k in range(4)]
    collector = Collector(cfg, generator, RewardPool(cfg.reward), None, Timers())  # type: ignore[arg-type]
    real, steps = engine.step, 0

    def step() -> list:
        nonlocal steps
        steps += 1
        if dist.rank() == 1 and steps == 5:
            print("rank 1 goes", flush=True)
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return real()

    engine.step = step  # type: ignore[method-assign]
    # Both begin together: a rank that is late by more than a rollout finds its trees stolen and never gets to step 5.
    dist.barrier("both engines", 120)
    started = time.monotonic()
    try:
        collector.sample(jobs, 0)
    except dist.RankLost as e:
        print(f"MESSAGE after {time.monotonic() - started:.0f} s: {' '.join(str(e).split())}", flush=True)
        collector.pool.close()
        dist.leave(2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
