"""One rank of test_expert_parallel.py, of two: `expert_parallel_worker.py OLD NEW`, two checkpoints of one shape.

An actor whose two ranks share the experts out refits an engine whose two ranks do. It is compared with one that is
loaded from the same files, and with one whose ranks hold slices of all experts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.ranks import report_found
from tests.sync.engine_worker import score_with
from treepo_mega.actor.update import Policy
from treepo_mega.config import Config, parse_config
from treepo_mega.engine.engine import Engine
from treepo_mega.engine.stream import SegmentRequest
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.runtime import dist
from treepo_mega.sync.refit import Refit

PROMPTS = [[(7 * i + k) % 60 + 3 for i in range(12 + 5 * k)] for k in range(4)]


def configuration(hf_dir: Path, *, whole: bool) -> Config:
    """Experts shared out in the actor, and with `whole` in the engine too."""
    return parse_config(
        {
            "model": {"hf_checkpoint": str(hf_dir), "params_dtype": "fp32", "make_vocab_size_divisible_by": 16},
            "parallel": {"expert_model_parallel_size": 2},
            "data": {"train": [{"reasoning_gym": "chain_sum"}], "max_prompt_len": 32},
            "rollout": {
                "max_response_len": 32,
                "segment": {"length": 16},
                "stop": {"eos_token_ids": [2]},
                "routing_replay": "all",
                "engine": {
                    "max_num_batched_tokens": 1024, "tensor_parallel_size": 2, "enable_expert_parallel": whole,
                },
            },
            "reshard": {"bucket_mb": 1},
        }
    )  # fmt: skip


def sampled(engine: Engine) -> dict[str, list[object]]:
    """Tokens, logprobs and experts of seeded samples, all at once."""
    for number, prompt in enumerate(PROMPTS):
        engine.submit(SegmentRequest(name=f"p{number}", prefix=prompt, max_tokens=16, seed=11 + number))
    done: dict[str, Any] = {}
    while engine.busy:
        done |= {each.request_id: each for each in engine.step()}
    found = [done[f"p{number}"] for number in range(len(PROMPTS))]
    return {
        "tokens": [each.tokens for each in found],
        "logprobs": [each.logprobs for each in found],
        "experts": [each.experts.ids.tolist() for each in found],
    }


def main() -> None:
    """Sample from three engines, one of them refitted."""
    old, new = Path(sys.argv[1]), Path(sys.argv[2])
    cfg = configuration(new, whole=True)
    spec = ModelSpec.from_hf(new)
    dist.initialize(cfg, spec)
    policy = Policy(cfg, new)
    sliced = Engine(new, configuration(new, whole=False), seed=0)
    fresh, engine = Engine(new, cfg, seed=0), Engine(old, cfg, seed=0)
    before = sampled(engine)
    refit = Refit(cfg, spec, policy.models, engine, score_with(policy))
    metrics = refit()
    samples = {"refitted": sampled(engine), "fresh": sampled(fresh), "sliced": sampled(sliced)}
    # After the samples: a scored prompt is cached, and what is found in the cache is computed in another batch.
    scores = [np.array(each.score(PROMPTS[-1])) for each in (engine, sliced)]
    report_found(
        {
            "metrics": metrics,
            "before": before,
            **samples,
            "score_diff": float(np.abs(scores[0] - scores[1]).max()),
            "w13": [list(param.shape) for name, param in refit.wanted.of(0)[0].items() if name.endswith("w13_weight")],
        }
    )


if __name__ == "__main__":
    main()
