"""Run a script on several ranks from a test, with a deadline; its output is shown when it fails."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import psutil
import pytest

from tests.world import LAUNCHER_VARIABLES, REPO, run_world

CLI = REPO / "treepo_mega" / "cli.py"
"""The command `treepo-mega`, as a script for `run_ranks`."""


def start_ranks(n: int, *command: object) -> subprocess.Popen[str]:
    """Start `command` (a script, or "-m" and a module, with arguments) on `n` ranks, in a process group of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    env |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *torchrun, *map(str, command)],
        env=env,
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float) -> tuple[int, str]:
    """(exit status, stdout and stderr together); at the deadline the whole process group ends and the test fails."""
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # torchrun starts each rank in a session of its own: killing its process group would miss them.
        launcher = psutil.Process(process.pid)
        for member in [launcher, *launcher.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        out, _ = process.communicate()
        pytest.fail(f"{process.args} did not end within {timeout:.0f} s:\n{out[-6000:]}")
    return process.returncode, out


def run_ranks(n: int, worker: object, *arguments: object, timeout: float = 240) -> str:
    """The output of the script `worker` on `n` forked ranks (see world.py); the test fails unless all left with 0.

    The failure shows the traceback of each rank that raised, then the end of all output.
    """
    code, out, failure = run_world(n, [str(worker), *map(str, arguments)], timeout)
    if code:
        pytest.fail(f"{worker} on {n} ranks ended with {code}:\n{failure}\n--- output\n{out[-6000:]}", pytrace=False)
    return out


def found_by(output: str) -> dict[str, Any]:
    """What a worker reported in `output`: its line `FOUND {json}`."""
    line = next(line for line in output.splitlines() if line.startswith("FOUND "))
    found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
    return found


def launch_ranks(n: int, *command: object, timeout: float = 240) -> str:
    """As `run_ranks` under a real torchrun, for tests whose subject is the start: a script, or "-m" and a module."""
    code, out = finish(start_ranks(n, *command), timeout)
    if code:
        pytest.fail(f"{command[0]} on {n} ranks ended with {code}:\n{out[-8000:]}")
    return out


def launch_once(launch: Callable[..., Any]) -> Callable[..., Any]:
    """`launch`, remembering what it gave for its arguments, also that it failed: a hang costs its deadline once."""
    done: dict[tuple[Any, ...], Any] = {}
    failed: set[tuple[Any, ...]] = set()

    @wraps(launch)
    def remembering(*args: Any) -> Any:
        if args in failed:
            pytest.fail("the launch that measures this failed before; the first test to need it shows its output")
        if args not in done:
            failed.add(args)
            done[args] = launch(*args)
            failed.remove(args)
        return done[args]

    return remembering


def leave_layout() -> None:
    """Forget Megatron's parallel state and close every group but the world's; collective over all ranks.

    Megatron's own end of a layout forgets its groups but leaves them open: each gloo group keeps threads, and a worker
    that goes through dozens of layouts ends with thousands of them a rank and is slower by an order of magnitude.
    """
    from megatron.core import parallel_state as ps
    from torch.distributed import destroy_process_group, distributed_c10d

    from treepo_mega.runtime import dist

    dist.barrier("the end of a layout", 60)
    ps.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group != distributed_c10d.GroupMember.WORLD:
            destroy_process_group(group)
    gc.collect()  # models refer to their groups in cycles


def report_found(found: dict[str, object]) -> None:
    """The end of a worker, on every rank: rank 0 prints what it found, as one line `FOUND {json}`."""
    from treepo_mega.runtime import dist

    if dist.is_main():
        print("FOUND " + json.dumps(found), flush=True)
    dist.barrier("the end", 60)
    dist.leave()
