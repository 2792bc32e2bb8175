"""What a review of the CUDA paths found, and what proves each answer on a machine without a GPU.

    python tools/bench/gpu_static.py [--quick]

Every finding has a status and a proof. mended: a test fails without the change. answered: the code is right, or the
choice is refused with its reason, and a test or page says so. open: nothing proves it here. A proof is the node id of a
test. The bench refuses one that does not exist, and runs them all unless --quick.

Besides it counts: the graphs that tree attention is compiled into over 32 pack lengths (three passes each, a backend
that computes nothing); the bytes that kernels which `auto` can choose spill, from the golden tables of both compilers;
and the layouts of two models in which some rank has nothing to send or receive in a refit.

Last line, JSON: {"findings": [{"id", "status", "proof"}], "compilations": {"lengths", "graphs"}, "spills":
{"triton_3_7_1", "triton_3_8_0"}, "zero_op_layouts": n, "proofs_failed": [...] or null}. --quick takes half a minute.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# As a script, the first folder on the path is this one, and `tools` is above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.kernel_report import VERSIONS, stale_tables
from tools.bench.kernel_report import spilled_bytes as kernel_spills
from treepo_mega.actor import attention_flex
from treepo_mega.modelspec.mcore_layout import LayoutError
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.reshard.plan import Cluster, plan_reshard
from treepo_mega.reshard.sides import Grid, mcore_side, vllm_side

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = 32
TIMEOUT_S = 1800
PASSES = ((False, False), (False, True), (True, True))
"""(gradients on?, inputs require them?): old logprobs; the forward of a recomputed layer; its recomputation."""
SHAPES = ("qwen25_7b", "llama3_70b")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the review. `proof`: test node ids; empty only when the finding is open."""

    id: str
    title: str
    status: str
    proof: tuple[str, ...]


FINDINGS = (
    Finding(
        "A1",
        "prefix cache cannot be reset, nor the engine sleep, while steps are in flight",
        "mended",
        ("tests/engine/test_engine.py::test_steps_in_flight_end_before_the_cache_is_reset_and_before_sleep",),
    ),
    Finding(
        "A2",
        "tree attention falls back to dense scores after three pack lengths",
        "mended",
        (
            "tests/actor/test_attention_flex.py::test_32_pack_lengths_cost_no_more_than_8_graphs",
            "tests/actor/test_attention_flex.py::test_a_variant_beyond_the_limit_is_an_error_and_not_dense_scores",
        ),
    ),
    Finding(
        "A3",
        "a rank without messages hangs the first NCCL refit",
        "mended",
        (
            "tests/runtime/test_dist.py::test_the_default_group_is_whole_before_anyone_uses_it",
            "tests/reshard/test_plan.py::test_some_layouts_leave_ranks_without_a_message",
        ),
    ),
    Finding(
        "A4",
        "fp32 on CUDA cannot keep the canary's limits",
        "answered",
        ("tests/sync/test_refit.py::test_fp32_on_cuda_needs_limits_of_its_own",),
    ),
    Finding(
        "A5",
        "fp8_grads with an older Transformer Engine",
        "mended",
        ("tests/test_setup.py::test_transformer_engines_versions",),
    ),
    Finding(
        "A6",
        "one rank of an engine passes its deadline and the others hang",
        "mended",
        (
            "tests/rollout/test_dealing.py::test_the_first_rank_decides_about_the_deadline_and_all_leave_at_the_same_step",
        ),
    ),
    Finding(
        "B1",
        "the fp32 head in Triton spills",
        "answered",
        ("tests/loss/test_te.py::test_what_auto_runs_in_kernels_spills_nothing",),
    ),
    Finding(
        "B2",
        "kernels are compiled by one version of Triton only",
        "mended",
        (
            "tests/loss/test_triton.py::test_both_compilers_were_given_the_same_kernels",
            "tests/loss/test_triton.py::test_the_golden_tables_hold_all_that_the_settings_can_ask_for",
            "tests/loss/test_triton.py::test_the_installed_triton_has_a_golden_table",
        ),
    ),
    Finding(
        "B3",
        "reports of a forest travel padded, and as JSON",
        "mended",
        (
            "tests/runtime/test_dist.py::test_exchange_between_two_ranks",
            "tests/runtime/test_packed.py::test_values_come_back_as_json_gives_them",
            "tests/runtime/test_packed.py::test_a_forest_costs_nine_bytes_a_token_and_its_text_does_not_grow_with_them",
        ),
    ),
    Finding(
        "B4",
        "a sleep copies weights to the host that the next refit overwrites",
        "mended",
        (
            "tests/sync/test_handover.py::test_an_engine_that_drops_its_weights_must_be_refitted",
            "tests/engine/test_engine.py::test_weights_written_in_place_equal_a_freshly_loaded_engine",
        ),
    ),
    Finding(
        "B5",
        "the KV cache is sized while the trainer is on the device",
        "mended",
        ("tests/sync/test_handover.py::test_the_engine_is_built_while_the_trainers_state_is_away_and_then_sleeps",),
    ),
    Finding(
        "B6",
        "every rank reads the whole checkpoint to overwrite it",
        "mended",
        ("tests/engine/test_engine.py::test_an_engine_that_reads_no_checkpoint_is_the_loaded_one_after_an_update",),
    ),
    Finding(
        "B7",
        "decoding without CUDA graphs is bound by the host",
        "mended",
        (
            "tests/engine/test_engine_checks.py::test_cuda_gets_graphs_sleep_and_chunks",
            "tests/engine/test_engine_checks.py::test_vllm_knows_the_graph_modes_and_the_connector_allows_whole_graphs",
        ),
    ),
    Finding(
        "B8",
        "the host waits in every micro-batch: numbers are read, arrays copied from memory that is not pinned",
        "mended",
        (
            "tests/actor/test_host_reads.py::test_the_passes_of_a_micro_batch_read_nothing",
            "tests/actor/test_host_reads.py::"
            "test_the_arrays_of_a_micro_batch_go_through_the_same_buffers_and_nobody_waits",
            "tests/runtime/test_staging.py::test_arrays_arrive_whole_whenever_the_device_copies_them",
            "tests/runtime/test_staging.py::test_buffers_are_taken_by_the_first_copy_and_never_again",
        ),
    ),
    Finding(
        "C1",
        "the environment check sends people the wrong way",
        "mended",
        ("tests/test_setup.py::test_a_companion_that_the_engine_requires_is_to_be_reinstalled",),
    ),
    Finding(
        "C2",
        "bytes of the engine's sleep and wake count what torch keeps unused",
        "mended",
        ("tests/sync/test_handover.py::test_the_bytes_of_sleep_and_wake_are_the_engines_alone",),
    ),
    Finding(
        "C3",
        "a wait for NCCL has no deadline of its own and names no rank",
        "mended",
        (
            "tests/reshard/test_transport.py::"
            "test_a_round_that_is_not_through_is_named_before_the_watchdog_would_end_the_process",
        ),
    ),
    Finding(
        "C4",
        "nothing here asks NVML; vLLM brings it",
        "answered",
        (
            "tests/test_imports.py::test_only_the_runtime_asks_about_cuda",
            "tests/project/test_gpu_extras.py::test_the_gpu_extra_resolves_to_the_pins_and_to_what_the_guide_states",
        ),
    ),
    Finding(
        "C5",
        "a GPU's trees differ from a CPU's: other noise, and logits rounded to bf16",
        "answered",
        ("tests/engine/test_engine_checks.py::test_auto_is_cudas_engine_on_cuda_and_under_its_profile",),
    ),
    Finding(
        "C6",
        "chunked prefill is off on CUDA, which vLLM warns about",
        "mended",
        ("tests/engine/test_engine_checks.py::test_cuda_gets_graphs_sleep_and_chunks",),
    ),
    Finding(
        "D1",
        "what .[gpu] resolves to, and the driver it needs, are stated nowhere",
        "mended",
        (
            "tests/project/test_gpu_extras.py::test_the_gpu_extra_resolves_to_the_pins_and_to_what_the_guide_states",
            "tests/test_setup.py::test_requirements_are_pinned_where_the_design_says",
        ),
    ),
    Finding(
        "D2",
        "any Python from 3.11 on is said to do",
        "mended",
        ("tests/project/test_project_files.py::test_python_is_said_once",),
    ),
    Finding(
        "D3",
        "Transformer Engine and Apex have to be compiled, and nothing says how",
        "mended",
        ("tests/project/test_gpu_extras.py::test_the_guide_states_the_pins",),
    ),
)


def unknown_proofs() -> list[str]:
    """Proofs that name no test function of their file."""
    missing = []
    for proof in itertools.chain.from_iterable(finding.proof for finding in FINDINGS):
        path, _, name = proof.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        if not any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(tree)):
            missing.append(proof)
    return missing


def compiled_graphs() -> int:
    """Graphs that all passes over packs of LENGTHS lengths cost."""
    graphs = 0

    def count(module: torch.fx.GraphModule, inputs: Any) -> Callable[..., tuple[Tensor]]:
        nonlocal graphs
        graphs += 1
        return lambda *args: (next(arg for arg in args if isinstance(arg, Tensor) and arg.dim() == 4).clone(),)

    compiled = attention_flex.compiled_attention(count)
    attention_flex._compiled = lambda: compiled  # type: ignore[assignment]
    # FlexAttention refuses gradients on a CPU before it compiles; here nothing is computed.
    torch.nn.attention.flex_attention._validate_device = lambda *tensors: None
    for number in range(1, LENGTHS + 1):
        length = number * attention_flex.SHAPE_BUCKET
        for gradients, require in PASSES:
            layout = attention_flex.FlexLayout.build(np.full(length, length), torch.device("cpu"), None)
            query, key, value = (torch.zeros(length, heads, 8, requires_grad=require) for heads in (4, 2, 2))
            with torch.set_grad_enabled(gradients):
                attention_flex.attend(query, key, value, layout, None)
    return graphs


def spilled_bytes() -> dict[str, int]:
    """Bytes a thread that kernels which `auto` can choose spill, by compiler. Raises RuntimeError for a stale table."""
    stale = stale_tables()
    if stale:
        raise RuntimeError(f"golden tables of other kernels than these, to be written anew: {'; '.join(stale)}")
    return {f"triton_{version.replace('.', '_')}": kernel_spills(version) for version in VERSIONS}


def layouts_with_silent_ranks() -> list[str]:
    """Layouts in which some rank has neither sends nor receives."""
    found = []
    for shape, tp, dp, tp_v in itertools.product(SHAPES, (1, 2, 4, 8), (1, 2, 4), (1, 2, 4, 8)):
        spec = ModelSpec.from_hf(ROOT / "examples" / "configs" / shape)
        world = tp * dp
        if world % tp_v:
            continue
        try:
            source = mcore_side(spec, Grid(tp=tp), world)
            target = vllm_side(spec, tp_v, world)
        except LayoutError:
            continue
        plan = plan_reshard(source, target, Cluster(world, 8), itemsize=2, bucket_bytes=64 << 20)
        rounds = (plan.for_rank(rank) for rank in range(world))
        if any(not any(r.sends or r.receives for r in own) for own in rounds):
            found.append(f"{shape} TP {tp} DP {dp} TP_v {tp_v}")
    return found


def failed_proofs() -> list[str]:
    """Proofs of which no test passed, or one did not; all run in one child. Raises RuntimeError when it cannot run."""
    proofs = sorted({proof for finding in FINDINGS for proof in finding.proof})
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-rA", "--no-header", *proofs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"the proofs could not be run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return not_proven(proofs, done.stdout)


def not_proven(proofs: list[str], output: str) -> list[str]:
    """Those of `proofs` that pytest's summary does not name as passed, or names as failed."""
    lines = [line.split(" ", 1) for line in output.splitlines()]
    named: dict[str, set[str]] = {}
    for word, test in (line for line in lines if len(line) == 2 and line[0] in ("PASSED", "FAILED", "ERROR")):
        # A case stands in brackets, and the reason of a failure after a dash.
        named.setdefault(test.split("[")[0].split(" - ")[0], set()).add(word)
    # A skipped test has proven nothing, and the summary does not give its name.
    return [proof for proof in proofs if named.get(proof) != {"PASSED"}]


def main() -> int:
    """Count, prove and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="look whether the proofs exist, do not run them")
    args = parser.parse_args()
    missing = unknown_proofs()
    if missing:
        raise RuntimeError(f"proofs that name no test: {', '.join(missing)}")
    for finding in FINDINGS:
        print(f"{finding.id:3} {finding.status:9} {finding.title}")
        for proof in finding.proof:
            print(f"    {proof}")
    graphs = compiled_graphs()
    silent = layouts_with_silent_ranks()
    spills = spilled_bytes()
    print(f"\ntree attention: {graphs} graphs for {LENGTHS} pack lengths")
    print(f"kernels that auto can choose spill, in bytes a thread: {spills}")
    print(f"layouts with a rank that has no message: {len(silent)}")
    failed = None if args.quick else failed_proofs()
    for proof in failed or ():
        print(f"not proven here (failed or skipped; pytest says why): {proof}")
    report = {
        "findings": [
            {"id": finding.id, "status": finding.status, "proof": list(finding.proof)} for finding in FINDINGS
        ],
        "compilations": {"lengths": LENGTHS, "graphs": graphs},
        "spills": spills,
        "zero_op_layouts": len(silent),
        "proofs_failed": failed,
    }
    print(json.dumps(report))
    return 1 if failed or graphs > 8 or any(spills.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
