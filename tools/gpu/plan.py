"""What only a GPU can show: stages by what is installed, and in each the checks in the order that settles most first.

A check is a pytest node of this suite, run as a child with its own time limit. Tests with the mark `gpu` stand here
exactly once (tests/gpu/test_plan.py); a new one needs a row. A node may be split by `keyword`, when a part of its
parameters settles less or needs more: the parts are `X` and `not X`.

Rows with `marked=False` are tests of the CPU's lanes whose code takes the GPU where there is one. Their limits were
written for fp32 on a CPU, and CUDA's attention multiplies in TF32: a failure there is a figure to be read.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"


@dataclass(frozen=True)
class Stage:
    """Checks that need the same packages. `needs` are importable names, `gpus` the fewest devices."""

    name: str
    title: str
    needs: tuple[str, ...]
    gpus: int
    settles: str


@dataclass(frozen=True)
class Check:
    """One child: `node` as pytest names it, `minutes` as estimated; three times as long is its limit."""

    stage: str
    node: str
    minutes: float
    settles: str
    keyword: str = ""
    needs: tuple[str, ...] = ()
    gpus: int = 0
    marked: bool = True

    @property
    def name(self) -> str:
        """What reports call it: the node, with the keyword where it is a part."""
        return f"{self.node} -k '{self.keyword}'" if self.keyword else self.node


BASE = ("torch", "triton", "pytest", "hypothesis", "psutil", "pydantic")
TRAINER = (*BASE, "megatron.core", "transformers", "safetensors")
ENGINE = (*TRAINER, "vllm")
TE = "transformer_engine"

STAGES = (
    Stage("torch", "torch and triton alone", BASE, 1, "whether the loss kernels compute what torch computes"),
    Stage("megatron", "with megatron-core", TRAINER, 1, "whether attention and the actor train as on a CPU"),
    Stage("vllm", "with vLLM", ENGINE, 1, "whether the engine starts, resets, branches and takes weights"),
    Stage("figures", "ratios to the card's bounds", BASE, 1, "how far kernels, refit and decoding are from them"),
    Stage("gpus", "several GPUs", ENGINE, 2, "whether ranks exchange weights over NCCL and engines span GPUs"),
)

KERNELS = "tests/loss/test_gpu.py"
TREES = "tests/actor/test_layers.py::test_trees_on_a_gpu_against_transformers_on_the_cpu"

DEVICE = "tests/gpu/test_device.py"
FIGURES = "tests/gpu/test_figures.py"

CHECKS = (
    Check("torch", f"{DEVICE}::test_one_rank_over_nccl", 1, "first collective and a batch of sends, one rank"),
    Check("torch", f"{KERNELS}::test_kernels_equal_tiles_of_torch", 3, "bf16 and FP8 loss kernels", "not fp32"),
    Check("torch", f"{DEVICE}::test_offloaded_memory_is_free_for_others_and_comes_back_unchanged", 1, "offloading"),
    Check("torch", f"{DEVICE}::test_nvml_counts_what_a_busy_device_does", 1, "NVML's counters", needs=("pynvml",)),
    Check(
        "torch",
        f"{DEVICE}::test_arrays_arrive_whole_behind_a_busy_device_and_the_host_does_not_wait",
        1,
        "copies through pinned buffers",
    ),
    Check("torch", f"{KERNELS}::test_transformer_engines_quantiser_is_ours", 1, "FP8 quantiser", needs=(TE,)),
    Check("torch", f"{KERNELS}::test_transformer_engines_gradient_products", 1, "FP8 products", needs=(TE,)),
    # Last: fp32 tiles do not fit the registers, which takes minutes to compile and is no layout that `auto` chooses.
    Check("torch", f"{KERNELS}::test_kernels_equal_tiles_of_torch", 3, "fp32 loss kernels", "fp32"),
    # It needs no Megatron itself, but the actor's package imports it.
    Check(
        "megatron",
        "tests/actor/test_attention_flex.py::test_compiled_flex_attention_with_gradients",
        2,
        "compiled attention over packs, and its backward",
    ),
    Check("megatron", TREES, 5, "an update over trees, Megatron's own layers", "overrides2"),
    Check("megatron", TREES, 8, "the same with Transformer Engine", "not overrides2", needs=(TE,)),
    Check(
        "vllm",
        f"{DEVICE}::test_two_steps_on_one_gpu_without_graphs",
        8,
        "two whole steps: sleep of both levels, wake by tag, refit, canary, branch copies",
    ),
    Check("vllm", f"{DEVICE}::test_two_steps_on_one_gpu_with_graphs", 10, "the same with CUDA graphs"),
    Check("vllm", "tests/engine/test_branch_cache.py", 6, "copies of blocks behind a branch", marked=False),
    Check("vllm", "tests/engine/test_engine.py", 6, "logprobs, resets, scores", marked=False),
    Check("vllm", "tests/rollout/test_generator.py", 8, "whole trees, admission, aborts", marked=False),
    Check(
        "figures", f"{FIGURES}::test_shares_of_the_loss_head", 2, "fused head against torch, Liger, CCE", needs=TRAINER
    ),
    Check("figures", f"{FIGURES}::test_shares_of_attention", 3, "packs against flash attention", needs=TRAINER),
    Check("figures", f"{FIGURES}::test_shares_of_a_refit", 2, "refit against a copy", needs=TRAINER),
    Check("figures", f"{FIGURES}::test_seconds_of_the_hand_over", 4, "offload, sleep and wake", needs=ENGINE),
    Check("figures", f"{FIGURES}::test_shares_of_decoding", 5, "trees against independent samples", needs=ENGINE),
    Check("gpus", f"{DEVICE}::test_a_rank_without_operations_holds_up_nobody", 2, "NCCL with a rank that is silent"),
    Check(
        "gpus",
        "tests/doctor/test_reduce.py::test_all_cards_of_this_node_sum_over_nccl",
        2,
        "the doctor's all-reduce, a rank a card",
    ),
    Check(
        "gpus",
        f"{DEVICE}::test_two_steps_of_tp_2_into_an_engine_over_two_gpus",
        5,
        "refit over NCCL, TP_v 2 in lock-step",
    ),
    Check(
        "gpus",
        f"{DEVICE}::test_two_steps_of_tp_2_pp_2_into_engines_over_two_gpus",
        5,
        "refit from TP2·PP2 into two engines",
        gpus=4,
    ),
    Check("gpus", "tests/rollout/test_ranks.py", 8, "trees of engines apart and together", marked=False),
)


def stage_named(name: str) -> Stage:
    """The stage of a check."""
    return next(stage for stage in STAGES if stage.name == name)


def needs_of(check: Check) -> tuple[str, ...]:
    """Importable names that the check and its stage need, in order."""
    return tuple(dict.fromkeys((*stage_named(check.stage).needs, *check.needs)))


def gpus_of(check: Check) -> int:
    """The fewest devices that it can run on."""
    return max(stage_named(check.stage).gpus, check.gpus)


def missing(check: Check, present: Iterable[str], gpus: int) -> str:
    """Why the check cannot run with these importable names and this number of devices; empty when it can."""
    there = set(present)
    absent = [name for name in needs_of(check) if name not in there]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if gpus < gpus_of(check):
        return f"needs {gpus_of(check)} GPUs, and {gpus} {'is' if gpus == 1 else 'are'} here"
    return ""


def is_gpu_mark(node: ast.AST) -> bool:
    """Whether the node is `pytest.mark.gpu` or `mark.gpu`."""
    if not isinstance(node, ast.Attribute) or node.attr != "gpu":
        return False
    return getattr(node.value, "attr", getattr(node.value, "id", "")) == "mark"


def has_mark(nodes: Iterable[ast.AST]) -> bool:
    """Whether the mark stands anywhere below: as a decorator, or with one parameter of a parametrisation."""
    return any(is_gpu_mark(child) for node in nodes for child in ast.walk(node))


def marks_module(statement: ast.stmt) -> bool:
    """Whether it is a `pytestmark = ...` that holds the mark."""
    if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
        return False
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    return "pytestmark" in names and has_mark([statement.value])


def marked_in(source: str, path: str) -> list[str]:
    """Node ids of the tests with the mark `gpu` in a test file, without importing it."""
    found = []

    def visit(body: list[ast.stmt], prefix: str, marked: bool) -> None:
        inherited = marked or any(marks_module(statement) for statement in body)
        for statement in body:
            if isinstance(statement, ast.ClassDef) and statement.name.startswith("Test"):
                visit(statement.body, f"{prefix}::{statement.name}", inherited or has_mark(statement.decorator_list))
            elif isinstance(statement, ast.FunctionDef) and statement.name.startswith("test_"):
                mine = inherited or has_mark(statement.decorator_list)
                found.extend([f"{prefix}::{statement.name}"] if mine else [])

    visit(ast.parse(source).body, path, False)
    return found


def marked_tests(root: Path = ROOT) -> list[str]:
    """Node ids of all tests with the mark `gpu` under `root`/tests, sorted."""
    out: list[str] = []
    for path in (root / "tests").rglob("test_*.py"):
        source = path.read_text(encoding="utf-8")
        if "mark.gpu" in source:
            out += marked_in(source, path.relative_to(root).as_posix())
    return sorted(out)


def without_row(root: Path = ROOT, checks: Iterable[Check] = CHECKS) -> list[str]:
    """Marked tests that no row of the plan runs."""
    planned = {check.node for check in checks}
    return [node for node in marked_tests(root) if node not in planned]


def listing(checks: Iterable[Check] = CHECKS) -> str:
    """Stages, checks and minutes, for people."""
    lines = []
    total = 0.0
    for stage in STAGES:
        mine = [check for check in checks if check.stage == stage.name]
        minutes = sum(check.minutes for check in mine)
        total += minutes
        lines.append(f"{stage.name}: {stage.title}, {minutes:g} min; settles {stage.settles}")
        for check in mine:
            extra = [*check.needs, *([f"{check.gpus} GPUs"] if check.gpus else [])]
            also = f" (also needs {', '.join(extra)})" if extra else ""
            lines.append(f"  {check.minutes:>3g} min  {check.settles}{also}\n           {check.name}")
    return "\n".join([*lines, f"all: {total:g} min"])
