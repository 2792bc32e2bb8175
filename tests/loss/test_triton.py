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
from typing import Any, get_args

import pytest

from tools.bench import kernel_report
from tools.bench.kernel_report import QUICK, SOURCES, VERSIONS, fingerprint, golden, installed
from treepo_mega.config import LossConfig

REPO = Path(__file__).resolve().parents[2]
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
    "a_row_that_is_not_finite_spoils_no_other_or_is_refused",
    "fp8_gradient_of_logits_is_scaled_by_row",
    "policy_kernel_equals_torchs",
)


def child(*command: object, **variables: str) -> str:
    """Output of a child Python in this checkout."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=REPO, env=env, capture_output=True, text=True, timeout=285
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


Kernels = dict[tuple[str, str], dict[str, Any]]


def by_name(kernels: list[dict[str, Any]]) -> Kernels:
    """{(kernel, architecture): its report}."""
    return {(k["kernel"], k["arch"]): k for k in kernels}


def compile_all(cache: Path, *options: str) -> Kernels:
    """Kernels compiled for both architectures, from an empty cache."""
    out = child("tools/bench/kernel_report.py", *options, TRITON_CACHE_DIR=str(cache))
    report = json.loads(out.strip().splitlines()[-1])
    assert report["measured"] is None
    return by_name(report["kernels"])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The kernels of the default settings. Compiled only if a source differs from those of the golden table."""
    table = golden(installed())
    if fingerprint(installed()) == table["fingerprint"]:
        return {key: kernel for key, kernel in by_name(table["kernels"]).items() if kernel["kernel"] in QUICK}
    return compile_all(tmp_path_factory.mktemp("triton_cache"), "--quick")


@pytest.fixture(scope="module")
def all_compiled(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Every kernel, compiled whether a source changed or not: nothing else proves that the table is true."""
    return compile_all(tmp_path_factory.mktemp("triton_cache_all"))


def check_code(k: dict[str, Any]) -> None:
    """No spills, within the hardware's bounds, on the tensor cores through TMA."""
    assert k["spill_bytes"] == 0 == k["mix"]["local"]
    assert k["registers"] <= 255 and k["shared_bytes"] <= 227 * 1024
    assert not any(m.startswith("mma.sync") for m in k["matrix"]), k["matrix"]
    if not k["kernel"].startswith(("forward", "dlogits")):
        return
    fp8, bf16 = {
        "sm_90a": (
            "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3",
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
        ),
        "sm_100a": ("tcgen05.mma.cta_group::1.kind::f8f6f4", "tcgen05.mma.cta_group::1.kind::f16"),
    }[k["arch"]]
    # In FP8 kernels the bf16 product is that of the loud channels; quiet ones have none.
    assert set(k["matrix"]) == ({fp8} if "quiet" in k["kernel"] else {fp8, bf16} if "fp8" in k["kernel"] else {bf16})
    assert k["tma_loads"] > 0 and k["mix"]["tma"] > 0 and k["mix"]["tensor"] > 0


def check_golden(kernels: Kernels) -> None:
    """As in the golden table. After an intended change: python tools/bench/kernel_report.py --update."""
    want = by_name(golden(installed())["kernels"])
    different = {key: (k, want.get(key)) for key, k in kernels.items() if k != want.get(key)}
    assert not different


def test_default_kernels_spill_nothing_and_use_the_tensor_cores(compiled: Kernels) -> None:
    assert {arch for _, arch in compiled} == {"sm_90a", "sm_100a"}
    assert {"forward-fp8-blockwise", "dlogits-fp8-blockwise"} < {name for name, _ in compiled}
    for k in compiled.values():
        check_code(k)


def test_default_kernels_are_those_of_the_golden_table(compiled: Kernels) -> None:
    check_golden(compiled)


@pytest.mark.slow
def test_all_kernels_spill_nothing_and_use_the_tensor_cores(all_compiled: Kernels) -> None:
    for k in all_compiled.values():
        check_code(k)


@pytest.mark.slow
def test_the_golden_tables_name_the_sources_they_are_of() -> None:
    """Otherwise the fast lane compiles every time, and nobody knows what CUDA's Triton makes of the kernels."""
    assert kernel_report.stale_tables() == []


def test_a_table_of_other_sources_is_named_with_the_commands_that_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "kernels.py"
    changed.write_text("# other kernels")
    monkeypatch.setattr(kernel_report, "SOURCES", (changed,))
    stale = kernel_report.stale_tables()
    assert [line.split(":")[0] for line in stale] == list(VERSIONS)
    other = next(version for version in VERSIONS if version != installed())
    assert f"--target build/triton-{other} triton=={other}` and" in stale[list(VERSIONS).index(other)]


@pytest.mark.parametrize("index", range(len(SOURCES)), ids=[path.name for path in SOURCES])
def test_a_change_in_any_source_changes_the_fingerprint(
    index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint("3.8.0")
    assert before != fingerprint("3.7.1")
    changed = tmp_path / SOURCES[index].name
    changed.write_bytes(SOURCES[index].read_bytes() + b"# changed\n")
    monkeypatch.setattr(kernel_report, "SOURCES", (*SOURCES[:index], changed, *SOURCES[index + 1 :]))
    assert fingerprint("3.8.0") != before


@pytest.mark.slow
def test_all_kernels_are_those_of_the_golden_table(all_compiled: Kernels) -> None:
    assert all_compiled.keys() == by_name(golden(installed())["kernels"]).keys()
    check_golden(all_compiled)


def test_the_installed_triton_has_a_golden_table() -> None:
    table = golden(installed())
    assert table["triton"] == installed() in VERSIONS


def test_a_triton_without_a_golden_table_is_an_error_that_says_how_to_make_one() -> None:
    with pytest.raises(kernel_report.NoGoldenTable) as said:
        golden("3.9.9")
    message = str(said.value)
    assert message.startswith("Triton 3.9.9 has no golden table in tests/golden/loss_kernels, which has 3.7.1, 3.8.0:")
    assert "triton==3.9.9` and `python tools/bench/kernel_report.py --update --triton build/triton-3.9.9`" in message


def test_both_compilers_were_given_the_same_kernels() -> None:
    """The one that this project pins, and the one that torch's CUDA wheel requires."""
    tables = {version: by_name(golden(version)["kernels"]).keys() for version in VERSIONS}
    assert {path.stem for path in kernel_report.GOLDEN.iterdir()} == set(VERSIONS)
    assert len(set(map(frozenset, tables.values()))) == 1 and all(map(len, tables.values()))
    assert [kernel_report.spilled_bytes(version) for version in VERSIONS] == [0, 0]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_golden_tables_hold_all_that_the_settings_can_ask_for(version: str) -> None:
    """Each precision, recipe, number of loud channels and entropy term: `auto` runs all but fp32 in kernels."""
    fields = LossConfig.model_fields
    recipes = get_args(fields["fp8_recipe"].annotation)
    assert set(get_args(fields["logprob_precision"].annotation)[0].__args__) == {"fp32", "bf16", "fp8"}
    operands = ["bf16", *(f"fp8-{recipe}{kind}" for recipe in recipes for kind in ("", "-quiet"))]
    wanted = {f"forward-{operand}" for operand in operands}
    wanted |= {f"dlogits-{operand}{term}" for operand in operands for term in ("", "-entropy")}
    wanted |= {"policy", "policy-k1", "policy-k2", "policy-no-kl", "combine", "quantise-amax", "quantise-cast"}
    kernels = {kernel["kernel"] for kernel in golden(version)["kernels"]}
    assert wanted == kernels - {"dlogits-fp8-rowwise-entropy-e5m2"}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_golden_tables_themselves_are_of_good_kernels(version: str) -> None:
    for kernel in golden(version)["kernels"]:
        check_code(kernel)
