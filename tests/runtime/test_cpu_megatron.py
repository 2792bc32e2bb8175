"""Megatron's CUDA calls are rewritten at import; torch itself stays as it is."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from treepo_mega.runtime import cpu_megatron
from treepo_mega.runtime.device import has_cuda

pytestmark = pytest.mark.skipif(has_cuda(), reason="with a GPU nothing is rewritten")
REPO = Path(__file__).parents[2]


def rewritten(source: str) -> dict:
    """Names after running `source` as a module of megatron would run."""
    tree = ast.fix_missing_locations(cpu_megatron._Retarget().visit(ast.parse(source)))
    names = {"torch": torch, cpu_megatron.STAND_IN: cpu_megatron.CpuCuda()}
    exec(compile(tree, "source", "exec"), names)  # the test's own text
    return names


def python(code: str, cwd: Path | None = None, timeout: float = 120) -> str:
    """The output of a fresh interpreter that runs `code`."""
    path = f"{cwd}{os.pathsep}{REPO}" if cwd else str(REPO)
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": ""},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout


@pytest.mark.parametrize(
    "source, want",
    [
        ("x = torch.zeros(2, device='cuda').device.type", "cpu"),
        ("x = torch.empty(1, device=torch.cuda.current_device()).device.type", "cpu"),
        ("x = torch.ones(1).cuda(non_blocking=True).device.type", "cpu"),
        ("x = torch.empty(2, pin_memory=True).is_pinned()", False),
        ("x = torch.zeros(1).type() == 'torch.cuda.FloatTensor'", True),
        ("x = torch.cuda.FloatTensor([1.0]).dtype", torch.float32),
        ("from torch.cuda import is_available as f\nx = f()", False),
        ("from torch.cuda import device_count, max_memory_allocated\nx = device_count() + max_memory_allocated()", 1),
        ("with torch.cuda.stream(torch.cuda.Stream()):\n  x = 3\ntorch.cuda.current_stream().wait_stream(None)", 3),
        ("torch.cuda.synchronize()\nx = torch.cuda.Event(enable_timing=True).record() and 1", 1),
        ("x = 'a cuda in a sentence stays'", "a cuda in a sentence stays"),
    ],
)  # fmt: skip
def test_rules(source, want):
    assert rewritten(source)["x"] == want


def test_generators_are_the_cpus():
    state = torch.get_rng_state()
    names = rewritten(
        "torch.cuda.manual_seed(3)\nfirst = torch.cuda.get_rng_state()\ntorch.rand(3)\n"
        "torch.cuda.random.set_rng_state(first)\nx = torch.rand(3)\ng = torch.cuda.default_generators[0]"
    )
    torch.manual_seed(3)
    assert torch.equal(names["x"], torch.rand(3)) and names["g"] is torch.default_generator
    torch.set_rng_state(state)


def test_line_numbers_survive():
    with pytest.raises(ZeroDivisionError) as e:
        rewritten("from torch.cuda import is_available, device_count\nx = torch.cuda.device_count()\n1 / 0\n")
    assert e.traceback[-1].lineno == 2  # counted from 0


def test_only_megatron_is_rewritten_and_only_for_us(tmp_path):
    for package in ("megatron", "other"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / "m.py").write_text("import torch\nDEVICE = 'cuda'\nCUDA = torch.cuda\n")
    module = tmp_path / "megatron" / "m.py"
    code = """
        import torch
        import treepo_mega
        import megatron.m, other.m, sys
        assert megatron.m.DEVICE == "cpu" and type(megatron.m.CUDA).__name__ == "CpuCuda"
        assert other.m.DEVICE == "cuda" and other.m.CUDA is torch.cuda
        assert sum(type(f).__name__ == "MegatronFinder" for f in sys.meta_path) == 1
        print(megatron.m.__file__)
    """
    assert python(code, tmp_path).strip() == str(module)
    (kept,) = (tmp_path / "megatron").rglob("m.*.pyc")
    assert ".opt-retargeted." in kept.name, "under its plain name it would shadow the real module's"
    written = kept.read_bytes()
    assert python(code, tmp_path).strip() == str(module) and kept.read_bytes() == written, "from what was kept"
    kept.write_bytes(written[:-9])
    assert python(code, tmp_path).strip() == str(module) and kept.read_bytes() == written, "made again if damaged"
    module.write_text(module.read_text() + "MORE = 1\n")
    assert "1 cpu" in python(code + "    print(megatron.m.MORE, megatron.m.DEVICE)", tmp_path), "and for another source"
    assert "cuda" in python("import megatron.m\nprint(megatron.m.DEVICE)", tmp_path), "only treepo_mega rewrites"


def test_the_real_megatron_imports_and_torch_stays_untouched():
    code = """
        import torch
        before = dict(vars(torch.cuda)), torch.Tensor.cuda, torch.zeros
        import treepo_mega
        import megatron.core.parallel_state, megatron.core.optimizer, megatron.core.models.gpt
        after = vars(torch.cuda)
        changed = [k for k, v in before[0].items() if k != "_initialized" and after.get(k) is not v]
        assert not changed, changed
        assert torch.Tensor.cuda is before[1] and torch.zeros is before[2] and not torch.cuda.is_initialized()
        print("untouched")
    """
    assert python(code).strip().endswith("untouched")


@pytest.mark.parametrize("first, second", [("torch", "treepo_mega"), ("treepo_mega", "torch")])
def test_importing_the_package_suffices_before_or_after_torch(first, second):
    code = f"""
        import {first}
        import {second}
        from megatron.core import parallel_state
        from treepo_mega.runtime import cpu_megatron
        cpu_megatron.require_retargeted()
        stand_in = vars(parallel_state)[cpu_megatron.STAND_IN]
        print(type(parallel_state.__spec__.loader).__module__, stand_in.device_count())
    """
    assert python(code).strip() == "treepo_mega.runtime.cpu_megatron 1"


def test_importing_the_package_imports_neither_torch_nor_the_rules():
    code = """
        import sys, treepo_mega
        heavy = {"torch", "megatron", "vllm", "numpy", "pydantic", "treepo_mega.runtime"}
        print(sorted(heavy & set(sys.modules)), type(sys.meta_path[0]).__name__)
    """
    assert python(code).strip() == "[] MegatronFinder"


def test_megatron_before_the_package_is_an_error_when_a_run_needs_it():
    code = f"""
        import megatron.core.parallel_state
        import treepo_mega
        import megatron.core.tensor_parallel.random as later
        assert "CpuCuda" not in repr(vars(later)), "what began as shipped stays as shipped: never half and half"
        from treepo_mega.config import load_config
        from treepo_mega.errors import TreepoError
        from treepo_mega.runtime import dist
        try:
            dist.initialize(load_config({str(REPO / "examples" / "tiny_cpu.yaml")!r}))
        except TreepoError as e:
            print(type(e).__name__, e)
    """
    printed = python(code)
    assert printed.startswith("EarlyMegatron megatron.")
    assert "was imported before treepo_mega and calls CUDA" in printed
    assert "Import treepo_mega first" in printed
