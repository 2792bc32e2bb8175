"""What can be said of one node alone."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from treepo_mega.checkpoint.space import check_space, describe_space, in_units
from treepo_mega.config import Config
from treepo_mega.config.surroundings import nearest_existing
from treepo_mega.doctor.finding import Finding, State
from treepo_mega.errors import nearest
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.plan.disk import expected_journals
from treepo_mega.runtime.environment import check_environment

OPEN_FILES = 4096
"""A rank holds its peers' sockets, a file a checkpoint shard, and pipes to its graders."""
SHM_BYTES = 64 << 20
"""What containers get by default; NCCL's rings between the cards of one node need more."""
SHM_BYTES_A_RANK = 256 << 20
CLOCK_S = 2.0
"""Logs and requeues of nodes that differ by more are hard to read; certificates and rendezvous may fail."""
USED_MEMORY = 2 << 30
"""Bytes in use on an idle card: a CUDA context has half a GiB, another process's model more."""
INTERFACE_KEYS = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def check_packages() -> list[Finding]:
    """Known accidents of the environment, and installed versions against the project's own pins."""
    findings = [Finding("environment", State.FAIL, problem) for problem in check_environment(try_imports=False)]
    engine = "gpu" if _version("vllm") else "cpu"
    if _version("treepo-mega") is None:
        return [*findings, Finding("versions", State.FAIL, "treepo-mega is not installed", "run `make setup`")]
    # Torch's build for CUDA brings the triton that it was tested with; the extra [cpu] names that of the other build.
    brought = _brought_by_torch()
    for text in metadata.requires("treepo-mega") or []:
        if problem := _unmet(text, engine, brought):
            findings.append(Finding("versions", State.FAIL, problem, "run `make setup`, or pip install -e '.[gpu]'"))
    if not findings:
        findings.append(Finding("versions", State.OK, f"as pinned, with the engine for {engine.upper()}"))
    return findings


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _brought_by_torch() -> dict[str, Requirement]:
    """What the installed torch requires here, by name."""
    texts = (metadata.requires("torch") or []) if _version("torch") else []
    every = [Requirement(text) for text in texts]
    return {needs.name: needs for needs in every if needs.marker is None or needs.marker.evaluate({"extra": ""})}


def _unmet(text: str, engine: str, brought: Mapping[str, Requirement]) -> str:
    """What is wrong with the requirement `text` here; empty when it is met or of another extra.

    `brought`: what goes before the pins of an extra.
    """
    needs = Requirement(text)
    of_extra = "extra ==" in text
    if needs.marker is not None and not needs.marker.evaluate({"extra": engine if of_extra else ""}):
        return ""
    if of_extra:
        needs = brought.get(needs.name, needs)
    found = _version(needs.name)
    if found is None:
        return f"{needs.name} is missing, expected {needs.name}{needs.specifier}"
    if not needs.specifier.contains(found, prereleases=True):
        return f"{needs.name} {found}, expected {needs.specifier}"
    return ""


def check_cards(asked: int, nvml: Any | None, visible: str | None) -> list[Finding]:
    """`asked` GPUs are there, free, and reach each other. `nvml`: the module pynvml, or None where it is missing.

    `visible`: CUDA_VISIBLE_DEVICES. On real cards this has not run.
    """
    if not asked:
        return []
    if nvml is None:
        return [Finding("GPUs", State.FAIL, "nvidia-ml-py is missing", "pip install 'treepo-mega[gpu]'")]
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return [Finding("GPUs", State.FAIL, f"{asked} asked for, but no driver: {error}", "drain this node")]
    there = nvml.nvmlDeviceGetCount() if visible is None else len([name for name in visible.split(",") if name.strip()])
    if there < asked:
        what = f"{asked} asked for, {there} visible (CUDA_VISIBLE_DEVICES={visible})"
        return [Finding("GPUs", State.FAIL, what, "ask Slurm for --gpus-per-node, or drain this node")]
    cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    name = nvml.nvmlDeviceGetName(cards[0])
    findings = [Finding("GPUs", State.OK, f"{there} x {name}, driver {nvml.nvmlSystemGetDriverVersion()}")]
    for index, card in enumerate(cards):
        used = nvml.nvmlDeviceGetMemoryInfo(card).used
        if used > USED_MEMORY:
            what = f"card {index} has {in_units(used)} in use before the run"
            findings.append(Finding("GPU memory", State.FAIL, what, "end the process that nvidia-smi names there"))
    apart = [
        f"{first}-{second}"
        for first in range(len(cards))
        for second in range(first + 1, len(cards))
        if nvml.nvmlDeviceGetP2PStatus(cards[first], cards[second], nvml.NVML_P2P_CAPS_INDEX_READ)
        != nvml.NVML_P2P_STATUS_OK
    ]
    if apart:
        what = f"cards {', '.join(apart)} do not read each other's memory"
        findings.append(Finding("GPU links", State.WARN, what, "tensor parallelism crosses host memory there"))
    return findings


def check_limits(ranks: int, gpus: int, shm: Path = Path("/dev/shm")) -> list[Finding]:
    """Open files, locked memory and shared memory for `ranks` processes."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    unlimited = files == resource.RLIM_INFINITY
    findings = [Finding("open files", State.OK, "unlimited" if unlimited else f"{files} a process")]
    if not unlimited and files < OPEN_FILES:
        what = f"{files} a process, expected {OPEN_FILES}"
        findings[0] = Finding("open files", State.FAIL, what, f"ulimit -n {OPEN_FILES} in the job script")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if gpus and locked != resource.RLIM_INFINITY:
        what = f"{in_units(locked)} a process"
        findings.append(Finding("locked memory", State.WARN, what, "RDMA pins more: LimitMEMLOCK=infinity for slurmd"))
    free = shutil.disk_usage(shm).free
    wanted = SHM_BYTES_A_RANK * ranks
    state = State.OK if free >= wanted else State.WARN if free > SHM_BYTES else State.FAIL
    remedy = "" if state is State.OK else f"{ranks} ranks want {in_units(wanted)}: --shm-size for a container"
    return [*findings, Finding("shared memory", state, f"{in_units(free)} free in {shm}", remedy)]


def check_disks(cfg: Config, spec: ModelSpec) -> list[Finding]:
    """Directories that the run writes to take files, and have room for its checkpoints and durable trees."""
    directories = [Path(cfg.logging.run_dir)]
    if cfg.checkpoint.enabled and cfg.checkpoint.save:
        directories.append(Path(cfg.checkpoint.save))
    findings = []
    # Two keys may name places below one directory: one probe says it of both.
    for place in dict.fromkeys(nearest_existing(directory) for directory in directories):
        findings.append(_writable(place))
    trees = expected_journals(cfg, spec)
    findings += [Finding("disk room", State.FAIL, problem) for problem in check_space(cfg, spec, trees)]
    if findings[-1].check != "disk room":
        lines = describe_space(cfg, spec, trees)
        findings += [Finding("disk room", State.OK, line.removeprefix("disk: ")) for line in lines]
    return findings


def _writable(place: Path) -> Finding:
    probe = place / f".treepo_doctor_{socket.gethostname()}_{os.getpid()}"
    try:
        probe.write_bytes(b"probe")
        now = time.time()
        ahead = now - probe.stat().st_mtime
    except OSError as error:
        remedy = "mount it writable, or set logging.run_dir and checkpoint.save elsewhere"
        return Finding("disk", State.FAIL, f"{place}: {error.strerror}", remedy)
    finally:
        probe.unlink(missing_ok=True)
    # The file server's clock stamps the file: a node that differs from it differs from the others.
    if abs(ahead) > CLOCK_S:
        what = f"this node is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the clock of {place}"
        return Finding("clock", State.WARN, what, "start an NTP client on it")
    return Finding("disk", State.OK, f"{place} takes files")


def check_network(port: int | None, environment: Mapping[str, str]) -> list[Finding]:
    """Interfaces that the environment names exist; on the head node, `port` is free for the rendezvous."""
    there = sorted(psutil.net_if_addrs())
    findings = []
    for key in INTERFACE_KEYS:
        named = environment.get(key, "")
        # NCCL's forms, for the whole list: "^lo,docker" leaves out, "=eth0" is exact, "eth" begins so.
        wanted = [] if named.startswith("^") else [name for name in named.removeprefix("=").split(",") if name]
        for name in wanted:
            if not any(each.startswith(name) for each in there):
                what = f"{key}={named}: no interface {name}{nearest(name, there)}, there are {', '.join(there)}"
                findings.append(Finding("network", State.FAIL, what, f"name one of them in {key}"))
    if port is not None:
        findings.append(_free_port(port))
    return findings or [Finding("network", State.OK, f"interfaces {', '.join(there)}")]


def _free_port(port: int) -> Finding:
    with socket.socket() as listener:
        # As the rendezvous store does: a port that a finished start left in TIME_WAIT is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            return Finding("port", State.FAIL, f"{port}: {error.strerror}", "set TREEPO_PORT to a free one")
    return Finding("port", State.OK, f"{port} is free for the rendezvous")
