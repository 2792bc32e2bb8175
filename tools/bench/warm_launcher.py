"""A launcher whose ranks are forked from a process that has torch, Megatron, the trainer and vLLM imported already.

    with WarmServer() as server:
        launcher = server.launch(2, script, arguments, log=log, marker="K1=V1")
        launcher.pid, launcher.poll(), launcher.wait(60)

For benches that start a run a hundred times: a start under torchrun spends most of its CPU time in imports. The server
is one child of the bench. For every launch it forks a launcher, a process of its own that forks the ranks, holds their
store as torchrun's agent does, and ends the others as it does when one fails: SIGTERM, then SIGKILL. A launcher that
is killed leaves its ranks alone, as torchrun does.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 30.0
"""Between SIGTERM and SIGKILL of the other ranks, as torchrun has it."""
LOOK_S = 0.02
"""Between two looks of a launcher at its ranks."""


class Launcher:
    """A launch, seen from the bench: the process id of its launcher, and how it ended."""

    def __init__(self, server: WarmServer, pid: int) -> None:
        self._server = server
        self.pid = pid
        self.status: int | None = None

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.status is None:
            self.status = self._server.ask({"poll": self.pid})["status"]
        return self.status

    def wait(self, timeout_s: float) -> int:
        """The exit status; TimeoutError after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"launcher {self.pid} runs for more than {timeout_s:.0f} s")
            time.sleep(LOOK_S)
        return status


class WarmServer:
    """The process with the imports: one request a line, one answer a line."""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ask({"ready": True})

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The server's answer. Raises RuntimeError when it is gone."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the warm server ended with status {self._process.wait(10)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def launch(
        self, ranks: int, script: Path, arguments: list[str], *, log: Path, environment: dict[str, str]
    ) -> Launcher:
        """Start `script` with `arguments` on `ranks` ranks; their output is added to `log`."""
        asked = {"ranks": ranks, "command": [str(script), *arguments], "log": str(log), "environment": environment}
        return Launcher(self, self.ask({"launch": asked})["pid"])

    def __enter__(self) -> WarmServer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer until the bench has closed its end."""
    ended: dict[int, int] = {}
    for line in requests:
        request = json.loads(line)
        if "launch" in request:
            answer = {"pid": _fork_launcher(request["launch"])}
        elif "poll" in request:
            _reap(ended)
            answer = {"status": ended.get(request["poll"])}
        else:
            answer = {"ready": True}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _reap(ended: dict[int, int]) -> None:
    """Note the children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            ended[pid] = os.waitstatus_to_exitcode(status)


def _fork_launcher(asked: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        output = os.open(asked["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, nothing), (1, output), (2, output)):
            os.dup2(source, target)
        os.environ.update(asked["environment"])
        code = _supervise(asked["ranks"], asked["command"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _supervise(ranks: int, command: list[str]) -> int:
    """Fork the ranks, hold their store, and wait; returns the exit status."""
    pipes = [os.pipe() for _ in range(ranks)]
    alive = {}
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            _run_rank(rank, ranks, command, pipes[rank][0])
        alive[pid] = rank
    from torch.distributed import TCPStore

    # Only now: a store has threads, which a fork would lose.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _, end in pipes:
        os.write(end, f"{store.port}\n".encode())
    failed = 0
    deadline = 0.0
    while alive:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            if failed and time.monotonic() > deadline:
                _signal(alive, signal.SIGKILL)
            time.sleep(LOOK_S)
            continue
        rank = alive.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            print(f"launcher: rank {rank} ended with {code}; ending the others", flush=True)
            failed = code
            deadline = time.monotonic() + GRACE_S
            _signal(alive, signal.SIGTERM)
    del store
    return 1 if failed else 0


def _signal(processes: dict[int, int], number: int) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _run_rank(rank: int, ranks: int, command: list[str], port: int) -> None:
    """One rank, as torchrun would start it; ends this process."""
    code = 1
    try:
        os.setsid()
        with os.fdopen(port) as told:
            os.environ["MASTER_PORT"] = told.readline().strip()
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_RUN_ID": "warm",
        }
        for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
            setattr(sys, name, os.fdopen(number, "r" if not number else "w", closefd=False))
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _import_all() -> None:
    """What a rank imports until its first step. Nothing here starts a thread, which a fork would lose."""
    sys.path.insert(0, str(ROOT))
    from treepo_mega.engine import cuda_profile

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import treepo_mega.trainer  # noqa: F401

    cuda_profile.apply()
    import vllm.entrypoints.llm
    import vllm.v1.worker.cpu_worker  # noqa: F401


if __name__ == "__main__":
    # Its own copy of the pipe to the bench: imports print.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_all()
    serve(sys.stdin, answers)
    # No ordinary exit: what was imported has destructors for things that were never begun here.
    os._exit(0)
