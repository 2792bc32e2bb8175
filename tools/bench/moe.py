"""Mixtures of experts: are gradients of packed trees those of transformers, and does a refit move what it must?

    python tools/bench/moe.py [--quick]

- cells: forests of cut trees, packed, through one layout after another (EP, ETP, TP, SP, PP, VPP, CP, DP on 1, 2 and 4
  ranks over gloo), both token dispatchers, with recomputation and without, three families. Each is compared with
  transformers and plain autograd on the flat trajectories, as in tests/actor/test_trees.py: the worst logprob of a
  token, and the worst relative gradient of a parameter.
- replay: what tools/bench/moe_replay.py measures of recorded routing; null where that bench is not there.
- refit: models of random weights go from expert-parallel layouts into vLLM workers' parameters, on four ranks; `whole`
  where the engine's ranks hold whole experts (rollout.engine.enable_expert_parallel), not slices of all. Bytes
  are counted as they arrive and divided by the least that must arrive: what a rank's engine wants and its actor lacks.
  Every element is compared with a slice of the whole tensor, bit by bit.

Last line, JSON: {"cells", "worst_grad_rel", "worst_logprob", "families", "replay", "refit": [{"case", "bytes",
"bytes_over_bound"}], "seconds"}. Exit status 1 where a gradient is further away than 1e-5. All of it takes some
minutes, --quick less than one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# The fork server of the ranks reads it when it starts.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

FAMILIES = ("qwen3_moe", "mixtral", "qwen2_moe")
"""Softmax over the chosen ones with many experts and with few; softmax over all beside a shared expert."""
DISPATCHERS = ("alltoall", "allgather")
LAYOUTS: dict[int, tuple[dict[str, Any], ...]] = {
    1: ({},),
    2: (
        {},  # two data-parallel ranks, each with all experts
        {"ep": 2},
        {"tp": 2, "sp": True},
        {"tp": 2, "sp": True, "ep": 2, "etp": 1},
        {"pp": 2},
        {"cp": 2, "ep": 2},
    ),
    4: (
        {"ep": 2},  # and two data-parallel ranks, between which experts are reduced
        {"ep": 4},
        {"ep": 2, "etp": 2},  # an expert's matrices are split, attention's are not
        {"tp": 2, "sp": True, "ep": 2},
        {"tp": 2, "sp": True, "ep": 2, "etp": 1},
        {"tp": 2, "sp": True, "ep": 4, "etp": 1},
        {"pp": 2, "ep": 2},
        {"pp": 2, "vpp": 2, "ep": 2},
        {"tp": 2, "sp": True, "pp": 2, "ep": 2, "etp": 1},
        {"tp": 2, "sp": True, "pp": 2, "vpp": 2, "ep": 2, "etp": 1},
        {"cp": 2, "ep": 2},  # and two data-parallel ranks
        {"cp": 2, "ep": 4},
        {"cp": 2, "pp": 2, "ep": 2},
        {"tp": 2, "sp": True, "cp": 2, "ep": 2},
    ),
}
"""World size -> layouts. What is left of a world is data parallel."""
QUICK: dict[int, tuple[dict[str, Any], ...]] = {2: ({"ep": 2}, {"tp": 2, "sp": True, "ep": 2, "etp": 1})}
LIMIT = 1e-5
"""Of a gradient's relative distance, in fp32."""
SIZES: dict[str, Any] = {
    "hidden_size": 256, "num_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "intermediate_size": 512, "vocab_size": 4096, "num_experts": 16, "experts_per_token": 4,
    "expert_intermediate_size": 256,
}  # fmt: skip
REFITS: tuple[tuple[str, str, dict[str, int], int, bool], ...] = (
    ("EP4 -> TP_v 1", "Qwen3MoeForCausalLM", {"ep": 4}, 1, False),
    ("EP4 -> TP_v 4", "Qwen3MoeForCausalLM", {"ep": 4}, 4, False),
    ("EP2 DP2 -> TP_v 2, whole", "Qwen3MoeForCausalLM", {"ep": 2}, 2, True),
    ("EP2 DP2 -> TP_v 2", "MixtralForCausalLM", {"ep": 2}, 2, False),
    ("TP2 EP2 -> TP_v 2", "Qwen2MoeForCausalLM", {"tp": 2, "ep": 2}, 2, False),
    ("TP2 EP2 -> TP_v 2, whole", "Qwen2MoeForCausalLM", {"tp": 2, "ep": 2}, 2, True),
    ("TP2 EP4 ETP1 -> TP_v 2", "Qwen3MoeForCausalLM", {"tp": 2, "ep": 4, "etp": 1}, 2, False),
    ("TP2 EP4 ETP1 -> TP_v 2, whole", "Qwen3MoeForCausalLM", {"tp": 2, "ep": 4, "etp": 1}, 2, True),
    ("PP2 EP2 -> TP_v 2", "Qwen2MoeForCausalLM", {"pp": 2, "ep": 2}, 2, False),
    ("TP2 PP2 EP2 ETP1 -> TP_v 4", "MixtralForCausalLM", {"tp": 2, "pp": 2, "ep": 2, "etp": 1}, 4, False),
    ("TP2 PP2 EP2 ETP1 -> TP_v 4, whole", "MixtralForCausalLM", {"tp": 2, "pp": 2, "ep": 2, "etp": 1}, 4, True),
)
"""(name, architecture, Megatron's sizes, the engine's tensor-parallel size, whether its ranks hold whole experts) on
four ranks."""
QUICK_REFITS = 3
RANKS = 4


def arguments() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="few layouts and three refits, less than a minute")
    p.add_argument("--refit-worker", help=argparse.SUPPRESS)
    return p.parse_args()


def main() -> int:
    """Run the parts, or be a rank of one."""
    args = arguments()
    if args.refit_worker:
        refit_worker(Path(args.refit_worker), args.quick)
        return 0
    started = time.perf_counter()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="moe") as directory:
        rows = [
            row for ranks in (QUICK if args.quick else LAYOUTS) for row in trained(ranks, args.quick, Path(directory))
        ]
        refit = refitted(args.quick, Path(directory))
    show(rows, refit)
    out = {
        "cells": len(rows),
        "worst_grad_rel": max(row["gradient_diff"] for row in rows),
        "worst_logprob": max(row["logprob_diff"] for row in rows),
        "families": {family: sum(row["kind"] == family for row in rows) for family in FAMILIES},
        "replay": replayed(args.quick),
        "refit": refit,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(out))
    return int(out["worst_grad_rel"] > LIMIT)


def cells(ranks: int, quick: bool) -> list[dict[str, Any]]:
    """Each layout with both dispatchers; families and recomputation take turns, so that all pairs are met."""
    out = []
    for number, layout in enumerate((QUICK if quick else LAYOUTS)[ranks]):
        for which, dispatcher in enumerate(DISPATCHERS):
            family = FAMILIES[(number + 2 * which + ranks) % len(FAMILIES)]
            out.append(
                {
                    "layout": layout,
                    "kind": family,
                    "tied": False,
                    "recompute": (number + which) % 2 == 0,
                    "depth": 3,
                    "split": True,
                    "overrides": [f"model.moe_token_dispatcher_type={dispatcher}"],
                }
            )
    return out


AT_ONCE = 7
"""Cells that one launch goes through: groups of experts leave threads behind, which slow those that follow."""


def trained(ranks: int, quick: bool, directory: Path) -> Iterator[dict[str, Any]]:
    """What the ranks measured of each cell of a world size, beside the cell itself."""
    from tests.world import run_world

    asked = cells(ranks, quick)
    print(f"{len(asked)} cells on {ranks} ranks", file=sys.stderr, flush=True)
    worker = ROOT / "tests" / "actor" / "trees_worker.py"
    for first in range(0, len(asked), AT_ONCE):
        part = asked[first : first + AT_ONCE]
        (directory / "cells.json").write_text(json.dumps(part))
        command = [str(worker), str(directory), str(directory / "cells.json")]
        status, output, failure = run_world(ranks, command, timeout=900)
        if status:
            raise SystemExit(f"{ranks} ranks ended with {status}:\n{failure or output[-4000:]}")
        measured = json.loads((directory / "results.json").read_text())
        for cell, found in zip(part, measured, strict=True):
            yield cell | found | {"ranks": ranks}


def replayed(quick: bool) -> dict[str, Any] | None:
    """What the bench of routing replay measures; None, with a line that says so, where it is not there."""
    file = Path(__file__).with_name("moe_replay.py")
    if not file.exists():
        print(f"replay: not measured, {file.relative_to(ROOT)} is not there", file=sys.stderr)
        return None
    spec = importlib.util.spec_from_file_location("moe_replay", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["moe_replay"] = module
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.measure_replay(quick)
    return found


def refitted(quick: bool, directory: Path) -> list[dict[str, Any]]:
    """One row a case of REFITS."""
    from tests.world import run_world

    command = [str(Path(__file__).resolve()), "--refit-worker", str(directory), *(["--quick"] if quick else [])]
    status, output, failure = run_world(RANKS, command, timeout=300)
    if status:
        raise SystemExit(f"the refits ended with {status}:\n{failure or output[-4000:]}")
    found: list[dict[str, Any]] = json.loads((directory / "refit.json").read_text())
    return found


def refit_worker(directory: Path, quick: bool) -> None:
    """One rank of all cases."""
    import torch.distributed as torch_dist

    from treepo_mega.runtime import dist

    torch_dist.init_process_group("gloo")
    rows = [refit_case(*case) for case in (REFITS[:QUICK_REFITS] if quick else REFITS)]
    if dist.is_main():
        (directory / "refit.json").write_text(json.dumps(rows))
    dist.barrier("the end", 60)
    dist.leave()


def refit_case(name: str, architecture: str, sizes: dict[str, int], tp_v: int, whole: bool) -> dict[str, Any]:
    """Move a model once, check every element of this rank, and count the bytes of all ranks."""
    import torch

    from treepo_mega.modelspec.mcore_layout import hf_shapes
    from treepo_mega.modelspec.spec import ModelSpec
    from treepo_mega.reshard.execute import Resharder, TensorTarget
    from treepo_mega.reshard.sides import Grid, mcore_side, vllm_side
    from treepo_mega.runtime import dist

    shared = {"shared_expert_intermediate_size": 512} if architecture == "Qwen2MoeForCausalLM" else {}
    spec = ModelSpec(
        architecture,
        **SIZES,
        **shared,
        qk_norm=architecture.startswith("Qwen3"),
        qkv_bias=architecture.startswith("Qwen2"),
    )
    dtype = torch.bfloat16
    source = mcore_side(spec, Grid(**sizes), dist.world_size())
    wanted = vllm_side(spec, tp_v, dist.world_size(), expert_parallel=whole)
    generator = torch.Generator().manual_seed(0)
    full = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in hf_shapes(spec).items()}

    def sliced(side: Any) -> list[dict[str, torch.Tensor]]:
        """This rank's parameters, cut out of the whole tensors."""
        out = []
        for params in side.of(dist.rank()):
            local = {key: torch.zeros(param.shape, dtype=dtype) for key, param in params.items()}
            for key, param in params.items():
                for block in param.blocks:
                    local[key][block.local_index] = full[block.hf_name][block.hf_index]
            out.append(local)
        return out

    expected = sliced(wanted)
    got = [{key: torch.zeros_like(value) for key, value in params.items()} for params in expected]
    resharder = Resharder.between(
        source, wanted, source_dtype=dtype, target_dtype=dtype, bucket_bytes=4 << 20, timeout_s=60,
        device=torch.device("cpu"),
    )  # fmt: skip
    received = resharder(sliced(source), TensorTarget(got)).bytes_received
    for want, have in zip(expected, got, strict=True):
        wrong = [key for key, value in want.items() if not torch.equal(value, have[key])]
        if wrong:
            raise SystemExit(f"{name}, rank {dist.rank()}: {wrong[0]} is wrong, and {len(wrong) - 1} others")
    moved = dist.sum_over_ranks({"bytes": float(received)})["bytes"]
    bound = dist.sum_over_ranks({"bytes": float(lacked(source, wanted, dist.rank()) * dtype.itemsize)})["bytes"]
    return {
        "case": f"{architecture.removesuffix('ForCausalLM')} {name}",
        "bytes": int(moved),
        "bytes_over_bound": moved / bound if bound else float(moved == 0),
    }


def lacked(source: Any, wanted: Any, rank: int) -> int:
    """Elements of the model that the engine of `rank` wants and its actor does not hold: counted on masks."""
    import numpy as np

    def boxes_of(side: Any) -> dict[str, list[Any]]:
        """Boxes by tensor."""
        out: dict[str, list[Any]] = {}
        for params in side.of(rank):
            for param in params.values():
                for block in param.blocks:
                    out.setdefault(block.hf_name, []).append(block.hf_index)
        return out

    held, asked = boxes_of(source), boxes_of(wanted)
    total = 0
    for name, boxes in asked.items():
        both = [*boxes, *held.get(name, ())]
        shape = tuple(max(box[axis].stop for box in both) for axis in range(len(boxes[0])))
        missing = np.zeros(shape, bool)
        for box in boxes:
            missing[box] = True
        for box in held.get(name, ()):
            missing[box] = False
        total += int(missing.sum())
    return total


def show(rows: list[dict[str, Any]], refit: list[dict[str, Any]]) -> None:
    """The tables for people."""
    print(f"{'ranks':<6}{'layout':<28}{'family':<11}{'dispatcher':<11}{'recompute':<10}{'logprob':>10}{'gradient':>10}")
    for row in rows:
        layout = " ".join(f"{key.upper()}{int(size)}" for key, size in row["layout"].items() if key != "sp")
        layout += " SP" if row["layout"].get("sp") else ""
        dispatcher = row["overrides"][0].rpartition("=")[2]
        print(
            f"{row['ranks']:<6}{layout or 'DP':<28}{row['kind']:<11}{dispatcher:<11}"
            f"{'yes' if row['recompute'] else 'no':<10}{row['logprob_diff']:>10.1e}{row['gradient_diff']:>10.1e}"
        )
    print(f"\n{'refit':<46}{'MB moved':>10}{'/bound':>8}")
    for case in refit:
        print(f"{case['case']:<46}{case['bytes'] / 1e6:>10.1f}{case['bytes_over_bound']:>8.2f}")


if __name__ == "__main__":
    sys.exit(main())
