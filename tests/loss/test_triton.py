"""The fused kernels: their numbers in Triton's interpreter, and what the compiler makes of them for sm_90 and sm_100.

Two child processes, one each: a kernel decorated under the interpreter cannot be compiled, and the other way round.
What only a GPU can show is in test_gpu.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((REPO / "tests/golden/loss_kernels.json").read_text())
CHECKS = (
    "stock_interpreter_is_still_wrong",
    "patched_interpreter_is_right",
    "quantisers_equal_torchs",
    "quantisers_refuse_what_is_not_finite",
    "fp32_head_equals_torchs",
    "bf16_head_equals_torchs",
    "fp8_heads_equal_torchs_emulation",
    "shards_of_every_size_join",
    "many_splits_and_a_deep_product",
    "main_grad_is_added_to_and_the_weight_prepared_once",
    "fp8_gradient_of_logits_is_scaled_by_row",
    "policy_kernel_equals_torchs",
)


def child(*command: object, **variables: str) -> str:
    """Output of a child Python in this checkout."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=REPO, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What each check of interpreter_worker.py found."""
    out = tmp_path_factory.mktemp("interpreter") / "results.json"
    child("-m", "tests.loss.interpreter_worker", out, TRITON_INTERPRET="1")
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(interpreted: dict[str, str | None], name: str) -> None:
    assert interpreted[name] is None, interpreted[name]


def test_no_check_is_left_out(interpreted: dict[str, str | None]) -> None:
    assert set(interpreted) == set(CHECKS)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """Every kernel compiled for both architectures, from an empty cache."""
    cache = str(tmp_path_factory.mktemp("triton_cache"))
    out = json.loads(child("tools/bench/kernel_report.py", TRITON_CACHE_DIR=cache).strip().splitlines()[-1])
    assert out["measured"] is None
    return {(k["kernel"], k["arch"]): k for k in out["kernels"]}


EACH = [(k["kernel"], k["arch"]) for k in GOLDEN["kernels"]]


@pytest.mark.parametrize("key", EACH, ids="-".join)
def test_compiled_kernels_spill_nothing_and_use_the_tensor_cores(compiled, key) -> None:
    k = compiled[key]
    assert k["spill_bytes"] == 0 == k["mix"]["local"]
    assert k["registers"] <= 255 and k["shared_bytes"] <= 227 * 1024
    assert not any(m.startswith("mma.sync") for m in k["matrix"]), k["matrix"]
    if not key[0].startswith(("forward", "dlogits")):
        return
    fp8, bf16 = {
        "sm_90a": (
            "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3",
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
        ),
        "sm_100a": ("tcgen05.mma.cta_group::1.kind::f8f6f4", "tcgen05.mma.cta_group::1.kind::f16"),
    }[key[1]]
    # In FP8 kernels the bf16 product is that of the loud channels.
    assert set(k["matrix"]) == ({fp8, bf16} if "fp8" in key[0] else {bf16})
    assert k["tma_loads"] > 0 and k["mix"]["tma"] > 0 and k["mix"]["tensor"] > 0


def test_compiled_kernels_are_those_of_the_golden_table(compiled) -> None:
    """After an intended change: python tools/bench/kernel_report.py --update."""
    want = {(k["kernel"], k["arch"]): k for k in GOLDEN["kernels"]}
    assert compiled.keys() == want.keys()
    different = {k: (compiled[k], want[k]) for k in want if compiled[k] != want[k]}
    assert not different
