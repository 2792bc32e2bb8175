"""A worker of an environment: `python -m treepo_mega.environment.worker`, started and killed by `process.py`.

Protocol, one JSON message a line. In: `{"do": open | call | copy | replay | grade | free, ...}` with the arguments of
the method of `Episodes`. Out: `{"ready": true}` or `{"load_error"}` once, then an answer for each message, in order,
with the number of processes that exist below the keeper.

The pipes are moved out of the way of tools, which may print; memory is limited, the network and writing fenced in. The
keeper (`keeper.py`) ends whatever is left when this process ends.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from treepo_mega.data.rewards.worker import ignore_job_signals, limit_resources, protect_streams, watch_parent
from treepo_mega.environment.contract import EnvironmentClassError
from treepo_mega.environment.episode import Episodes
from treepo_mega.environment.keeper import descendants, keep
from treepo_mega.environment.sandbox import SandboxError, confine_writes, deny_network


def serve(args: argparse.Namespace, folder: Path) -> None:
    """Answer requests until the trainer closes the pipe."""
    requests, replies = protect_streams()
    ignore_job_signals()
    limit_resources(args.memory_mb)
    watch_parent(os.getppid())
    os.chdir(folder)
    os.environ.update(TMPDIR=str(folder), HOME=str(folder))
    tempfile.tempdir = None

    def reply(message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[replies.write(data) or 0 :]

    try:
        if not args.network:
            deny_network()
        if not args.writes_anywhere:
            confine_writes([folder])
        episodes = Episodes(args.environment, args.max_chars)
    except (EnvironmentClassError, SandboxError) as error:
        reply({"load_error": str(error)})
        return
    reply({"ready": True})
    answer_all(episodes, requests, reply)


def answer_all(episodes: Episodes, requests: BinaryIO, reply: Any) -> None:
    """Each request by the method of its name. The keeper and this process are not counted as left behind."""
    for line in requests:
        request = json.loads(line)
        answer = getattr(episodes, request.pop("do"))(**request)
        reply({**answer, "processes": len(descendants(os.getppid())) - 1})


def main() -> None:
    """Entry point: the keeper's, and below it the worker's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", required=True)
    parser.add_argument("--memory-mb", type=int, required=True)
    parser.add_argument("--max-chars", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--network", action="store_true")
    parser.add_argument("--writes-anywhere", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="treepo-environment-", ignore_cleanup_errors=True) as folder:
        status = keep(lambda: serve(args, Path(folder)), args.parent)
    sys.exit(status)


if __name__ == "__main__":
    main()
