"""What `.[gpu]` and `.[te]` resolve to on a GPU machine, asked of the package index without downloading a wheel."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.gpu.machine import pins

ROOT = Path(__file__).resolve().parents[2]
UNREACHABLE = ("error sending request", "dns error", "Connection refused", "timed out", "status code 5")
GUIDE = ROOT / "docs" / "guides" / "gpu.md"


def uv() -> str:
    """The resolver, beside this Python or on the path; skips without it."""
    found = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if found is None:
        pytest.skip("uv, which resolves without downloading wheels, is not installed (pip install uv)")
    return found


def requirements() -> dict[str, list[str]]:
    """REQUIRED and EXTRAS of setup.py, which runs nothing here."""
    body = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body
    values = {ast.unparse(node.targets[0]): node.value for node in body if isinstance(node, ast.Assign)}
    return {"": ast.literal_eval(values["REQUIRED"]), **ast.literal_eval(values["EXTRAS"])}


def resolve(wanted: list[str], python: str, folder: Path) -> dict[str, str]:
    """Name -> version on 64-bit Linux. Skips, with what was said, where no index answers."""
    source = folder / "wanted.in"
    source.write_text("\n".join(wanted) + "\n")
    platform = ["--python-platform", "x86_64-manylinux_2_28", "--python-version", python]
    # Their metadata is a file of its own on the index: a version without a wheel would have to be built.
    wheels = [part for name in ("torch", "triton", "vllm", "megatron-core") for part in ("--only-binary", name)]
    environment = dict(os.environ)
    if (index := environment.get("PIP_INDEX_URL")) is not None:
        environment.setdefault("UV_DEFAULT_INDEX", index)
    try:
        done = subprocess.run(
            [uv(), "pip", "compile", "--quiet", "--no-header", "--no-annotate", *platform, *wheels, str(source)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=240,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("the package index did not answer within 240 s")
    reasons = [line.strip() for line in done.stderr.splitlines() if any(part in line for part in UNREACHABLE)]
    if done.returncode and reasons:
        pytest.skip(f"the package index cannot be reached: {reasons[0]}")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (line.split(" ;")[0] for line in done.stdout.splitlines() if "==" in line)
    return dict(line.strip().split("==", 1) for line in lines)


def stated(python: str) -> dict[str, str]:
    """The guide's table of what is installed on `python`: package -> version."""
    rows = re.findall(
        r"^\| `([\w-]+)`(?: \(Python ([\d.]+)\))? \| ([\w.]+) \|", GUIDE.read_text(encoding="utf-8"), re.M
    )
    return {name: version for name, only, version in rows if only in ("", python)}


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_guide_states_the_pins(python):
    table = stated(python)
    pinned = pins(python)
    assert {name: table[name] for name in ("torch", "vllm", "megatron-core")} == {
        name: pinned[name] for name in ("torch", "vllm", "megatron-core")
    }
    engine = next(Requirement(text) for text in requirements()["te"] if text.startswith("transformer-engine"))
    assert engine.specifier.contains(table["transformer-engine"])


def test_telemetry_brings_its_library():
    wanted = {Requirement(text).name for text in requirements()["gpu"]}
    assert "nvidia-ml-py" in wanted, "monitor/nvml.py imports it"


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_gpu_extra_resolves_to_the_pins_and_to_what_the_guide_states(tmp_path, python):
    wanted = requirements()
    # The PyTorch half of Transformer Engine has no wheel: to resolve it would be to build it.
    engine = [text.replace(",pytorch]", "]") for text in wanted["te"]]
    found = resolve([*wanted[""], *wanted["gpu"], *engine], python, tmp_path)
    exact = pins(python)
    assert {name: found[name] for name in exact} == exact
    table = stated(python)
    assert {name: found[name] for name in table if name in found} == table, "of the index, and of the guide"
    assert found["nvidia-cuda-runtime"].startswith("13."), "the guide states a driver for CUDA 13"
    assert "nvidia-ml-py" in found, "vLLM asks it for the devices, and telemetry for what they do"
    assert "transformer-engine-cu13" in found and "transformer-engine-cu12" not in found
    for companion in ("torchvision", "torchaudio", "torchcodec"):
        assert companion in found, "the environment check says that vLLM for CUDA requires it"
    if python == "3.12":
        assert int(found["setuptools"].partition(".")[0]) < 81, "vLLM's bound on Python 3.12"
