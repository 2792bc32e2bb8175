"""A short all-reduce over the nodes of a job: is the sum right, how fast is it, and which node is slow?

    findings = check_all_reduce(directory, host="node3", hosts=["node1", ...], gpus=8, timeout_s=120)

A rank a GPU over NCCL, or one a node over gloo where there are no GPUs: the libraries, interfaces and routes that the
run will use. Each rank is a process of its own (`exchange.py`), ended at the deadline. The ranks of NCCL have not run
on cards.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treepo_mega.doctor.finding import Finding, State
from treepo_mega.doctor.meeting import wait_for_files
from treepo_mega.runtime.files import atomic_file

BYTES = {"gloo": 16 << 20, "nccl": 256 << 20}
"""Long enough that the links and not their latency are measured, short enough for a second or two."""
SLOW = 0.5
"""A node is named when its better link has less than this share of the median. Links of one kind differ by less."""
POLL_S = 0.1
REMEDY = "name the interface between the nodes in TREEPO_NIC; NCCL_DEBUG=INFO says more"


def check_all_reduce(
    directory: Path, host: str, hosts: Sequence[str], gpus: int, timeout_s: float, bytes_each: int | None = None
) -> list[Finding]:
    """Findings of this node; it says of the others what they wrote into `directory`, which all nodes share.

    `hosts`: those of the job, in the same order on all nodes. Never raises for what another node does.
    """
    if len(hosts) < 2 and gpus < 2:
        return []
    backend = "nccl" if gpus else "gloo"
    size = bytes_each or BYTES[backend]
    about, problem = _run(directory, host, hosts, gpus or 1, backend, size, timeout_s)
    if about is None:
        return [Finding("all-reduce", State.FAIL, problem, REMEDY)]
    with atomic_file(directory / f"{host}.reduce") as file:
        json.dump(about, file)
    of_host = wait_for_files(directory, ".reduce", len(hosts), timeout_s)
    if len(of_host) < len(hosts):
        absent = ", ".join(sorted(set(hosts) - set(of_host)))
        return [Finding("all-reduce", State.FAIL, f"no figures came from {absent}", "look at its log")]
    return judge(host, of_host)


def judge(host: str, of_host: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """What `host` says of the figures of all.

    Bus bandwidth is that of NVIDIA's nccl-tests (PERFORMANCE.md): 2 (n - 1) / n x bytes / seconds.

    >>> slow = {"wrong": 0, "seconds": 1.0, "bytes": 10**9, "world": 4, "rates": {"node2": 0.1, "node4": 0.1}}
    >>> ring = {"node1": {"node4": 0.1, "node2": 1.0}, "node2": {"node1": 1.0, "node3": 1.1},
    ...         "node3": {"node2": 1.1, "node4": 0.1}, "node4": {"node3": 0.1, "node1": 0.1}}
    >>> for finding in judge("node1", {name: {**slow, "rates": rates} for name, rates in ring.items()}):
    ...     print(finding.state.value, finding.found)
    ok 4 ranks: the sum is right, 1.50 GB/s (bus)
    FAIL node4 exchanges 0.10 GB/s with its neighbours, the median node 1.05
    """
    mine = of_host[host]
    wrong = sorted(name for name, about in of_host.items() if about["wrong"])
    if wrong:
        what = f"sums are wrong on {', '.join(wrong)} ({of_host[wrong[0]]['wrong']} elements on {wrong[0]})"
        return [Finding("all-reduce", State.FAIL, what, "drain it, and test its memory, cards and links")]
    world = mine["world"]
    bus = 2 * (world - 1) / world * mine["bytes"] / mine["seconds"] / 1e9
    findings = [Finding("all-reduce", State.OK, f"{world} ranks: the sum is right, {bus:.2f} GB/s (bus)")]
    best = {name: max(about["rates"].values()) for name, about in of_host.items() if about["rates"]}
    if len(best) < 2:
        return findings
    middle = statistics.median(best.values())
    slow = {name: rate for name, rate in sorted(best.items()) if rate < SLOW * middle}
    for name, rate in slow.items():
        what = f"{name} exchanges {rate:.2f} GB/s with its neighbours, the median node {middle:.2f}"
        findings.append(Finding("links", State.FAIL, what, "look at its cards, cables and switch port, or drain it"))
    if not slow:
        rates = [rate for about in of_host.values() for rate in about["rates"].values()]
        what = f"neighbours exchange {min(rates):.2f} to {max(rates):.2f} GB/s"
        findings.append(Finding("links", State.OK, what))
    return findings


def _run(
    directory: Path, host: str, hosts: Sequence[str], ranks: int, backend: str, size: int, timeout_s: float
) -> tuple[dict[str, Any] | None, str]:
    """(what this node's first rank found, "") or (None, what went wrong)."""
    with tempfile.TemporaryDirectory(prefix="treepo-doctor-") as place:
        logs = [Path(place) / str(rank) for rank in range(ranks)]
        children = []
        try:
            for rank, log in enumerate(logs):
                command = [sys.executable, "-m", "treepo_mega.doctor.exchange", str(directory), ",".join(hosts), host]
                command += [f"--local-rank={rank}", f"--local-world={ranks}", f"--backend={backend}"]
                command += [f"--bytes={size}", f"--timeout={timeout_s:g}"]
                with log.open("wb") as out:
                    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                    children.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment))
            return _watch(children, logs, timeout_s)
        finally:
            for child in children:
                child.kill()
                child.wait()


def _watch(
    children: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], timeout_s: float
) -> tuple[dict[str, Any] | None, str]:
    """Wait until all have ended, one has failed, or time is up."""
    # Imports come before the ranks' own deadline begins.
    deadline = time.monotonic() + timeout_s + 60
    while any(child.poll() is None for child in children):
        failed = [rank for rank, child in enumerate(children) if child.poll()]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    for rank, (child, log) in enumerate(zip(children, logs, strict=True)):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        doing = [line for line in lines if re.match("joining|summing|exchanging", line)]
        phase = doing[-1] if doing else "starting"
        if child.poll():
            return None, f"rank {rank} of this node failed while {phase}: {lines[-1][:300] if lines else 'no word'}"
        if child.poll() is None and time.monotonic() > deadline:
            return None, f"rank {rank} of this node was still {phase} after {timeout_s:.0f} s"
    if any(child.poll() is None for child in children):
        return None, "a rank of this node failed"
    told = [line for line in logs[0].read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    about: dict[str, Any] = json.loads(told[-1])
    return about, ""
