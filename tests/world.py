"""Ranks that are forked from one process with torch, Megatron and the trainer imported: no start pays for imports.

A session starts one fork server. Each rank of each test is a fresh fork of it, so a test leaves nothing to the next
one, and a rank that hangs or dies costs its own test only. The ranks meet over gloo, as under torchrun.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from torch.distributed import TCPStore

from tests.starts import count_start

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
REPO = Path(__file__).resolve().parents[1]
PRELOAD = [
    "pytest",
    "treepo_mega.runtime.dist",
    "treepo_mega.actor.update",
    "treepo_mega.convert.convert",
    "treepo_mega.trainer",
    "treepo_mega.evaluate",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "tests.world",
]
"""What the server imports; conftest.py adds vLLM where ranks build engines. None of them starts a thread, which a fork
would lose."""
GRACE_S = 10.0
"""Seconds that the other ranks have to end, after one of them failed."""
PR_SET_PDEATHSIG = 1


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """torchrun's variables; none for a single rank, which then is a plain `python worker.py`."""
    if ranks == 1:
        return {}
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The store is the test's own, as torchrun's is its agent's: no rank has to find a free port for it.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _rank_main(command: list[str], rank: int, ranks: int, port: int, log: str, failure: str) -> None:
    """One rank: run the script `command[0]` as `__main__`; its traceback goes to the file `failure`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the server ends with the session: so do its ranks
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(_environment(rank, ranks, port))
    os.chdir(REPO)
    sys.argv = list(command)
    code = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        Path(failure).write_text(traceback.format_exc())
        traceback.print_exc()
        code = 1
    for child in multiprocessing.active_children():
        child.kill()  # Megatron's checkpoint writer keeps one that would outlive this rank
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _kill(processes: list[BaseProcess]) -> None:
    """End ranks and everything that they started."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(process.pid)
            for member in [*root.children(recursive=True), root]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
    for process in processes:
        process.join(30)


def _wait(processes: list[BaseProcess], timeout: float) -> bool:
    """Wait for all ranks; after a failed one for `GRACE_S` more. Returns whether the deadline passed."""
    deadline = time.monotonic() + timeout
    failed = False
    while alive := [p for p in processes if p.exitcode is None]:
        if not wait([p.sentinel for p in alive], max(0.0, deadline - time.monotonic())):
            _kill(alive)
            return not failed
        if not failed and any(p.exitcode for p in processes):
            failed = True
            deadline = min(deadline, time.monotonic() + GRACE_S)
    return False


def run_world(ranks: int, command: list[str], timeout: float) -> tuple[int, str, str]:
    """Run the script `command[0]` with arguments on `ranks` forked ranks.

    Returns (status, output, failure): the first failed rank's exit status or 0; stdout and stderr of all ranks; and
    what to show of a failure: the tracebacks by rank, or that the deadline of `timeout` seconds passed.
    """
    context = multiprocessing.get_context("forkserver")
    if not os.path.exists("/dev/nvidiactl"):  # asking for a GPU starts CUDA, which does not survive a fork
        context.set_forkserver_preload(PRELOAD)
    count_start("rank-group", f"{ranks} {command[0]}")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks") as directory:
        log = Path(directory) / "output"
        log.touch()
        failures = [Path(directory) / f"failure_{rank}" for rank in range(ranks)]
        processes: list[BaseProcess] = [
            context.Process(target=_rank_main, args=(command, rank, ranks, store.port, str(log), str(failures[rank])))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        late = _wait(processes, timeout)
        codes = [p.exitcode for p in processes]
        shown = [f"rank {rank} of {ranks}:\n{f.read_text()}" for rank, f in enumerate(failures) if f.exists()]
        if late:
            shown.insert(0, f"ranks did not end within {timeout:.0f} s and were killed")
        output = log.read_text(errors="replace")
    # Ranks that failed on their own say more than those killed after them.
    own = [code for code in codes if code and code > 0]
    status = own[0] if own else next((code for code in codes if code), 0)
    return (status or int(late)), output, "\n".join(shown)
