"""Plans against runs on this machine's CPU, for `plan.py`: calibrated by one run, checked on another.

Runs are of one size and checked on other batches, lengths, and ranks. Seconds are CPU seconds of the first rank's
process, because other jobs share the cores: ranks that have a core each take as long in wall time. Of the run that is
checked, the plan is told mean lengths of prompts and responses and the share of prompts kept, as --response-mean,
--prompt-mean and --kept would; tokens, engine steps, requests and micro-batches it finds itself.

Models: the demo's, and random weights in two sizes, 22 M and SmolLM2-135M's, whose answers never end by themselves.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import runs  # noqa: E402
from tools.make_tiny_model import MODEL, TOKEN_ID, build_tokenizer, write_skeleton  # noqa: E402
from treepo_mega.config import load_config  # noqa: E402
from treepo_mega.modelspec.spec import ModelSpec  # noqa: E402
from treepo_mega.plan.calibrate import Calibration, calibrate  # noqa: E402
from treepo_mega.plan.hardware import GIB, Rates, gpu_of  # noqa: E402
from treepo_mega.plan.run import RunPlan, plan_run  # noqa: E402
from treepo_mega.plan.timing import Cluster  # noqa: E402

SIZES: dict[str, dict[str, Any]] = {
    "22M": {
        "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 11,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64,
    },
    "135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    },
}  # fmt: skip
"""Of tools/bench/rollout.py, and of SmolLM2-135M."""
RANDOM = [f"data.verifier={Path(__file__).parent / 'coin_reward.py'}:compute_score", "rollout.dynamic_sampling=false"]


@dataclass(frozen=True)
class Run:
    """A training run. `model` "": the demo's."""

    model: str
    ranks: int
    overrides: tuple[str, ...]


def _sized(steps: int, prompts: int, leaves: int, response: int, tokens: int) -> tuple[str, ...]:
    return (
        f"train.num_rollouts={steps}", "eval.interval=0", "checkpoint.enabled=false", "logging.trees_interval=2",
        f"rollout.rollout_batch_size={prompts}",
        f"rollout.n_samples_per_prompt={leaves}", f"rollout.max_response_len={response}",
        f"train.max_tokens_per_gpu={tokens}",
    )  # fmt: skip


RUNS = {
    # So many steps that they end together, and long enough that a machine's moods come to a mean.
    "tiny": Run("", 1, _sized(60, 8, 8, 64, 512)),
    "tiny, 24 prompts": Run("", 1, _sized(30, 24, 8, 64, 2048)),
    "tiny, 2 ranks": Run("", 2, _sized(40, 24, 8, 64, 1024)),
    "22M": Run("22M", 1, _sized(8, 4, 8, 64, 1024)),
    "22M, 96 tokens": Run("22M", 1, _sized(6, 6, 8, 96, 1536)),
    "135M": Run("135M", 1, _sized(6, 2, 4, 32, 256)),
    "135M, 48 tokens": Run("135M", 1, _sized(4, 3, 6, 48, 512)),
}
PAIRS = {
    "tiny, 8 to 24 prompts": ("tiny", "tiny, 24 prompts"),
    "tiny, 1 rank and 8 prompts to 2 ranks and 24": ("tiny", "tiny, 2 ranks"),
    "22M, 4 prompts of 64 tokens to 6 of 96": ("22M", "22M, 96 tokens"),
    "135M, 2 prompts of 32 tokens to 3 of 48": ("135M", "135M, 48 tokens"),
}
"""Case to (calibrated by, checked on)."""
LEAST_SHARE = 0.02
"""Of a step: phases that take less are not compared."""
TIMED = ("rollout", "old_logprobs", "update", "reshard")


def run_all(directory: Path) -> None:
    """Each of RUNS that is not in `directory` yet, those of a model at the same time.

    Together, because another job on the machine changes what a core does in a CPU second: it then does so for all.
    """
    for model in dict.fromkeys(run.model for run in RUNS.values()):
        started = {}
        for number, (name, run) in enumerate(RUNS.items()):
            target = directory / f"run{number}"
            if run.model != model or (target / "metrics.jsonl").is_file():
                continue
            overrides = list(run.overrides)
            if model:
                overrides += [f"model.hf_checkpoint={random_model(directory / model, SIZES[model])}", *RANDOM]
            target.mkdir(parents=True, exist_ok=True)
            print(f"running: {name}", flush=True)
            started[name] = (runs.start(run.ranks, target, overrides, target / "log.txt"), target / "log.txt")
        for name, (process, log) in started.items():
            runs.wait(process, log, name, timeout_s=3600)


def random_model(directory: Path, sizes: dict[str, Any]) -> Path:
    """A checkpoint with random weights, whose every id is a symbol of its own. Made once."""
    if not directory.exists():
        symbols = TOKEN_ID | {f"<{number}>": number for number in range(len(TOKEN_ID), sizes["vocab_size"])}
        write_skeleton(directory, 0, MODEL | sizes, build_tokenizer(symbols))
    return directory


def compare(directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of time, rows of memory) of PAIRS, of the runs in `directory`."""
    cluster = Cluster(gpu_of("CPU"), 8, Rates())
    found = {name: calibrate(directory / f"run{number}", cluster, clock="cpu_s") for number, name in enumerate(RUNS)}
    timed = []
    resident = []
    for case, (first, second) in PAIRS.items():
        plan = planned(directory / f"run{list(RUNS).index(second)}", found[first], found[second], cluster)
        step = sum(found[second].measured.values())
        for phase in TIMED:
            expected, measured = plan.seconds[phase], found[second].measured[phase]
            if measured < LEAST_SHARE * step:
                continue
            timed.append({"case": case, "phase": phase, "planned": expected, "measured": measured,
                          "ratio": round(expected / measured, 3)})  # fmt: skip
            print(f"{case}: {phase:<14}{expected:>9.3f}{measured:>9.3f} CPU s{expected / measured:>8.3f}", flush=True)
        peak, measured = plan.memory.peak / GIB, found[second].resident_gib
        ratio = round(peak / measured, 3) if measured else math.inf
        resident.append({"case": case, "rank": 0, "phase": "resident", "planned": plan.memory.peak,
                         "proven": measured * GIB, "ratio": ratio})  # fmt: skip
        print(f"{case}: resident {peak:.3f} {measured:.3f} GiB {ratio:.3f}", flush=True)
    return timed, resident


def planned(directory: Path, first: Calibration, second: Calibration, cluster: Cluster) -> RunPlan:
    """The plan of the run in `directory` by what `first` measured, and by the lengths that its model writes."""
    cfg = load_config(directory / "config.yaml", [])
    told = {name: getattr(second.lengths, name) for name in ("response", "prompt", "spread", "kept", "tail")}
    return plan_run(
        cfg, ModelSpec.from_hf(cfg.model.hf_checkpoint), world_size=second.world,
        lengths=dataclasses.replace(first.lengths, **told), cluster=dataclasses.replace(cluster, rates=first.rates),
    )  # fmt: skip


if __name__ == "__main__":
    kept = Path(sys.argv[1])
    run_all(kept)
    print(json.dumps(dict(zip(("time", "memory"), compare(kept), strict=True))))
