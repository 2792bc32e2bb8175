"""How right a plan is: memory against ranks built with fake tensors, time against runs on this machine's CPU.

    python tools/bench/plan.py [--quick] [--no-runs]

Memory: each case is planned, and its first, a middle and its last stage are built and run (`treepo-mega plan --prove`).
Parameters, gradients and optimizer state must be equal to the byte, and peaks of activations within a tenth. Time and
resident memory: models of three sizes are trained in two sizes each (`plan_runs.py`); the second run is planned with
what the first one measured, in CPU seconds. --quick: two cases, and no runs. --runs DIR keeps the runs, and takes those
that are there.

Last line, JSON: {"memory": [{"case", "rank", "phase", "planned", "proven", "ratio"}], "time": [{"case", "phase",
"planned", "measured", "ratio"}], "ranks_seconds": CPU seconds to plan 4,096 ranks, "ranks_mib": memory of that,
"exact": cases whose held bytes are equal, "met"}.
"""

from __future__ import annotations

import argparse
import json
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


def main() -> int:
    """Prints the table and the JSON line; 1 when a bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two cases, and no runs")
    parser.add_argument("--no-runs", action="store_true", help="memory alone")
    parser.add_argument("--runs", metavar="DIR", help="keep runs here, and take those that are there")
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
            import plan_runs  # torch, through the tiny model's script

            kept = Path(args.runs or scratch)
            plan_runs.run_all(kept)
            timed, resident = plan_runs.compare(kept)
            memory += resident
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
