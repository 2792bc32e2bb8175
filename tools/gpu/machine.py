"""What this machine is: devices, driver, versions, and which packages can be imported. Run as a child by `check.py`.

    python tools/gpu/machine.py      (one line of JSON)

A child, because asking CUDA takes a context: some hundred MiB of every device, for as long as the asking process lives.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.gpu import plan  # noqa: E402

NAMED = ("torch", "triton", "megatron-core", "vllm", "transformer-engine", "transformers")
DEADLINE = 300.0


@dataclass(frozen=True)
class Machine:
    """`absence` says why there is no GPU, and is empty where there is one. `versions` are of installed packages."""

    devices: tuple[str, ...]
    driver: str
    versions: dict[str, str]
    present: tuple[str, ...]
    absence: str = ""

    @property
    def device(self) -> str:
        """The devices in one phrase, such as `2 x NVIDIA H100 (79 GiB)`."""
        kinds = list(dict.fromkeys(self.devices))
        return ", ".join(
            f"{self.devices.count(kind)} x {kind}" if self.devices.count(kind) > 1 else kind for kind in kinds
        )


def can_import(name: str) -> bool:
    """Whether the module is there; its parents are imported, itself not."""
    try:
        return importlib.util.find_spec(name) is not None
    # A parent that is missing or does not load. What is there and broken counts as not there.
    except (ImportError, ValueError, OSError):
        return False


def version_of(distribution: str) -> str:
    """The installed version; empty when there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def driver_version() -> str:
    """The NVIDIA driver's version, or `unknown`."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip() or "unknown"


def pins(python: str = "", root: Path = ROOT) -> dict[str, str]:
    """Versions that setup.py pins exactly, for everyone and for `.[gpu]`, on `python` (such as 3.12; empty: this)."""
    # Late: pytest brings it, and without pytest this file still says what the machine is.
    from packaging.requirements import Requirement

    values = {}
    for node in ast.parse((root / "setup.py").read_text(encoding="utf-8")).body:
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
        if isinstance(node, ast.Assign) and name in ("REQUIRED", "EXTRAS"):
            values[name] = ast.literal_eval(node.value)
    here = {"python_version": ".".join(python.split(".")[:2])} if python else {}
    every = [Requirement(text) for text in (*values["REQUIRED"], *values["EXTRAS"]["gpu"])]
    chosen = [needs for needs in every if needs.marker is None or needs.marker.evaluate(here)]
    exact = [(needs.name, str(needs.specifier).partition("==")[2]) for needs in chosen]
    return {name: version for name, version in exact if version}


def with_pins(versions: dict[str, str], pinned: dict[str, str]) -> str:
    """The versions in one phrase, each that is not the pinned one with its pin.

    >>> with_pins({"torch": "2.13.0+cu130", "vllm": "0.31.0"}, {"torch": "2.13.0", "vllm": "0.32.0"})
    'torch 2.13.0+cu130, vllm 0.31.0 (pin 0.32.0)'
    """
    out = []
    for name, version in versions.items():
        pin = pinned.get(name, "")
        other = pin and version.partition("+")[0] != pin
        out.append(f"{name} {version} (pin {pin})" if other else f"{name} {version}")
    return ", ".join(out)


def look(modules: Iterable[str]) -> Machine:
    """This machine, asked in this process. `modules` are the names whose presence matters."""
    versions = {"python": platform.python_version()}
    versions |= {name: version for name in NAMED if (version := version_of(name))}
    present = tuple(name for name in modules if can_import(name))
    if "torch" not in present:
        return Machine((), "", versions, present, "torch is not installed for this Python")
    try:
        import torch

        from treepo_mega.runtime.device import has_cuda
    except (ImportError, OSError) as error:
        return Machine((), "", versions, present, f"torch cannot be imported ({error})")
    if not has_cuda():
        return Machine((), "", versions, present, f"torch {torch.__version__} sees no CUDA device")
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
    versions["cuda"] = str(torch.version.cuda)
    return Machine(tuple(devices), driver_version(), versions, present)


def modules_of_the_plan() -> tuple[str, ...]:
    """Every importable name that some check needs."""
    return tuple(dict.fromkeys(name for check in plan.CHECKS for name in plan.needs_of(check)))


def look_in_a_child() -> Machine:
    """This machine, asked by a child that has ended when this returns."""
    command = [sys.executable, str(Path(__file__).resolve())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, cwd=ROOT)
        fields = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return Machine((), "", {}, (), f"asking torch for a GPU took more than {DEADLINE:.0f} s")
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Machine((), "", {}, (), f"asking torch for a GPU failed ({last})")
    return Machine(**{**fields, "devices": tuple(fields["devices"]), "present": tuple(fields["present"])})


if __name__ == "__main__":
    print(json.dumps(asdict(look(modules_of_the_plan()))))
