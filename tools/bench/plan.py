"""How right a plan is: memory against ranks built with fake tensors, time against runs on this machine's CPU.

    python tools/bench/plan.py [--quick] [--no-runs]

Memory: each case is planned, and its first, a middle and its last stage are built and run (`treepo-mega plan --prove`).
Parameters, gradients and optimizer state must be equal to the byte, and peaks of activations within a tenth. Time: the
demo model is trained twice in different sizes; the second run is planned with what the first one measured. Both are in
CPU seconds of the rank's process, because other jobs share the cores. --quick: two cases, and no runs.

Last line, JSON: {"memory": [{"case", "rank", "phase", "planned", "proven", "ratio"}], "time": [{"case", "phase",
"planned", "measured", "ratio"}], "ranks_seconds": CPU seconds to plan 4,096 ranks, "ranks_mib": memory of that,
"exact": cases whose held bytes are equal, "met"}.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

from treepo_mega.config import load_config
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.plan.calibrate import calibrate
from treepo_mega.plan.hardware import GIB, Rates, gpu_of
from treepo_mega.plan.run import plan_run
from treepo_mega.plan.timing import Cluster

RECIPE = "examples/llama3_70b_16x8.yaml"
KEPT = [f"parallel.recompute_{name}=null" for name in ("granularity", "method", "num_layers")]
PP, VPP = "parallel.pipeline_model_parallel_size", "parallel.virtual_pipeline_model_parallel_size"
TP, CP = "parallel.tensor_model_parallel_size", "parallel.context_parallel_size"
SP = "parallel.sequence_parallel"
CASES: dict[str, tuple[str, int, list[str], dict[str, Any]]] = {
    "70B TP8 PP4": (RECIPE, 128, [], {}),
    "7B TP4": ("examples/qwen25_7b_2x8.yaml", 16, [], {}),
    "70B TP8 PP4 VPP2, 16 layers": (RECIPE, 128, [f"{VPP}=2"], {"num_hidden_layers": 16}),
    "70B TP8 PP2 CP2, 8 layers": (RECIPE, 64, [f"{PP}=2", f"{CP}=2"], {"num_hidden_layers": 8}),
    "70B TP8 PP4 all kept, 8 layers": (RECIPE, 64, KEPT, {"num_hidden_layers": 8}),
    "70B TP8 PP2 tied, 4 layers": (RECIPE, 32, [f"{PP}=2"], {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "70B TP4 PP2 no overlap, 4 layers": (
        RECIPE, 32, [f"{TP}=4", f"{PP}=2", "parallel.overlap_grad_reduce=false"], {"num_hidden_layers": 4}
    ),
    "70B TP8 fp32, 4 layers": (RECIPE, 16, [f"{PP}=1", "model.params_dtype=fp32"], {"num_hidden_layers": 4}),
    "70B TP8 PP2 no SP, 4 layers": (RECIPE, 32, [f"{PP}=2", f"{SP}=false"], {"num_hidden_layers": 4}),
    "70B TP8 block, 4 layers": (
        RECIPE, 16, [f"{PP}=1", "parallel.recompute_method=block"], {"num_hidden_layers": 4}
    ),
}  # fmt: skip
HELD = ("parameters", "gradients", "optimizer")
PEAKS = ("old_logprobs", "update")
RANKS = 4096
TIMED = ("rollout", "old_logprobs", "update")


def memory_of(name: str, directory: Path) -> list[dict[str, Any]]:
    """Rows of one case."""
    from treepo_mega.prove.command import prove  # torch and Megatron

    base, world, overrides, changes = CASES[name]
    cfg = load_config(base, [])
    if changes:
        config = json.loads((Path(cfg.model.hf_checkpoint) / "config.json").read_text())
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config | changes))
        overrides = [f"model.hf_checkpoint={directory}", *overrides]
    cfg = load_config(base, overrides)
    proof = prove(cfg, ModelSpec.from_hf(cfg.model.hf_checkpoint), world_size=world)
    rows = []
    for each in proof.compared:
        rows.append(
            {"case": name, "rank": each.rank, "phase": each.item, "planned": each.planned, "proven": each.proven,
             "ratio": round(each.ratio, 4)}
        )  # fmt: skip
        print(f"{name:<34} rank {each.rank:<5}{each.item:<14}{each.planned / GIB:>9.3f}{each.proven / GIB:>9.3f} GiB"
              f"{each.ratio:>8.3f}", flush=True)  # fmt: skip
    return rows


def plan_many() -> tuple[float, float]:
    """(CPU seconds, MiB of this process after) of a plan for RANKS ranks."""
    cfg = load_config(RECIPE, [f"{PP}=16"])
    started = time.process_time()
    plan_run(
        cfg, ModelSpec.from_hf(cfg.model.hf_checkpoint), world_size=RANKS, cluster=Cluster(gpu_of("H100"), 8, Rates())
    )
    return time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def time_of(directory: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of time, and that of memory, of the run that is planned by what another one measured."""
    import runs

    # Enough steps of the first run for a line through their seconds.
    short = ["train.num_rollouts=12", "eval.interval=0"]
    wide = ["rollout.rollout_batch_size=24", "train.max_tokens_per_gpu=2048"]
    cluster = Cluster(gpu_of("CPU"), 8, Rates())
    for name, overrides in (("first", []), ("second", wide)):
        runs.run(1, directory / name, [*short, *overrides], f"the {name} run")
    first, second = (calibrate(directory / name, cluster, clock="cpu_s") for name in ("first", "second"))
    cfg = load_config(directory / "second" / "config.yaml", [])
    # How long answers are is the model's affair, which the second run says; how fast they come is the first one's.
    plan = plan_run(
        cfg, ModelSpec.from_hf(cfg.model.hf_checkpoint), world_size=1, lengths=second.lengths,
        cluster=dataclasses.replace(cluster, rates=first.rates),
    )  # fmt: skip
    rows = []
    for phase in TIMED:
        planned, measured = plan.seconds[phase], second.measured[phase]
        # No pass of its own: with one optimizer step the update's forward pass gives the old logprobs.
        if planned <= 0:
            continue
        rows.append({"case": "tiny, 8 to 24 prompts", "phase": phase, "planned": planned, "measured": measured,
                     "ratio": round(planned / measured, 3)})  # fmt: skip
        print(f"tiny: {phase:<14}{planned:>9.3f}{measured:>9.3f} CPU s{planned / measured:>8.3f}", flush=True)
    planned, measured = plan.memory.peak / GIB, second.resident_gib
    ratio = round(planned / measured, 3) if measured else math.inf
    print(f"tiny: resident {planned:.3f} {measured:.3f} GiB {ratio:.3f}", flush=True)
    kept = {"case": "tiny, 8 to 24 prompts", "rank": 0, "phase": "resident"}
    return rows, {**kept, "planned": plan.memory.peak, "proven": measured * GIB, "ratio": ratio}


def main() -> int:
    """Prints the table and the JSON line; 1 when a bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two cases, and no runs")
    parser.add_argument("--no-runs", action="store_true", help="memory alone")
    args = parser.parse_args()
    # First: what it needs must not hide behind torch.
    seconds, mib = plan_many()
    print(f"{RANKS} ranks planned in {seconds:.2f} CPU s, {mib:.0f} MiB", flush=True)
    names = ["7B TP4", "70B TP8 PP2 tied, 4 layers"] if args.quick else list(CASES)
    memory = []
    timed: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for index, name in enumerate(names):
            memory += memory_of(name, Path(scratch) / f"model{index}")
        if not (args.quick or args.no_runs):
            timed, resident = time_of(Path(scratch) / "runs")
            memory.append(resident)
    exact = [
        name for name in names
        if all(row["planned"] == row["proven"] for row in memory if row["case"] == name and row["phase"] in HELD)
    ]  # fmt: skip
    met = (
        len(exact) == len(names)
        and all(abs(row["ratio"] - 1) <= 0.1 for row in memory if row["phase"] in PEAKS)
        and all(abs(row["ratio"] - 1) <= 0.15 for row in memory if row["phase"] == "resident")
        and all(abs(row["ratio"] - 1) <= 0.25 for row in timed)
        and seconds < 30
        and mib < 2048
    )
    print(json.dumps({"memory": memory, "time": timed, "ranks_seconds": round(seconds, 3), "ranks_mib": round(mib),
                      "exact": exact, "met": met}))  # fmt: skip
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
