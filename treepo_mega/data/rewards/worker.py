"""A grader process: `python -m treepo_mega.data.rewards.worker`, started and killed by `pool.RewardPool`.

Protocol, one JSON message a line. In: a list of requests `{"id", "verifier", "data_source", "solution_str",
"ground_truth", "extra_info", "trajectory", "prompt"}`, or a single one. One with `"only_import": true` grades nothing.
Out: `{"ready": true}` at the start; then in the order of the requests `{"id", "loaded": true}` when its verifier was
imported for it (so that imports have a deadline of their own) or `{"id", "load_error"}`, and `{"id", "score", "extra"}`
or `{"id", "error"}`, the latter with `"retire": true` when the process ran out of memory and should be replaced, and
with `"returned"`, a type, when that is no reward. Each reply is written before the next request is begun, so the first
request without a reply is the one that hung or crashed.

It grades untrusted text with code that may misbehave, so: the protocol's pipes are moved to private file
descriptors and 0 and 1 pointed elsewhere (what a verifier prints, even from C, goes to stderr, and it
cannot read requests); address space and file sizes are limited; and it never outlives its parent: a thread
watches for that, and the kernel's CPU-time alarm ends code that never lets that thread run. It does not
react to SIGINT, SIGTERM or SIGUSR1, which schedulers send to all processes of a job: the trainer decides.

Imports only the standard library until a verifier needs more; never torch or megatron.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import resource
import signal
import sys
import threading
import time
from typing import Any, BinaryIO

from treepo_mega.data.rewards.returned import interpret, reason_of
from treepo_mega.data.rewards.verifiers import OPTIONAL_PARAMETERS, PARAMETERS, Verifier, load_verifier

MAX_FILE_BYTES = 1 << 30


def protect_streams() -> tuple[BinaryIO, BinaryIO]:
    """Move the protocol off file descriptors 0 and 1; returns (requests, replies)."""
    # Copies by `os.dup` are not inherited. A program of the verifier would hold the pipe open after this process died.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests, replies


def limit_resources(memory_mb: int) -> None:
    """Allocations beyond `memory_mb` MiB of address space raise MemoryError; no core dumps."""
    for what, value in ((resource.RLIMIT_AS, memory_mb << 20), (resource.RLIMIT_FSIZE, MAX_FILE_BYTES)):
        hard = resource.getrlimit(what)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def watch_parent(parent: int) -> None:
    """End this process soon after its parent did, whatever the main thread is doing."""

    def watch() -> None:
        # The id is told by the parent: asked for here, it could be init's already.
        # PR_SET_PDEATHSIG would fire as soon as the thread that started this process ends.
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def ignore_job_signals() -> None:
    """Handlers that do nothing: unlike SIG_IGN they are not inherited by programs a verifier starts."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)


@functools.lru_cache(maxsize=64)
def wishes(function: Verifier) -> tuple[str, ...]:
    """The optional parameters (trajectory, prompt) that a verifier has; `**kwargs` alone is no wish."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # callables of C have no signature
        return ()
    return tuple(name for name in OPTIONAL_PARAMETERS if name in parameters)


def arguments_of(function: Verifier, request: dict[str, Any]) -> dict[str, Any]:
    """What a verifier is called with for a request."""
    return {name: request.get(name) for name in (*PARAMETERS, *wishes(function))}


def grade(function: Verifier, request: dict[str, Any]) -> dict[str, Any]:
    """Run a verifier on one request; whatever it raises, SystemExit included, becomes an error text."""
    try:
        returned = function(**arguments_of(function, request))
    except MemoryError as e:
        # What filled the memory may be what earlier items left behind: this process must take no more of them.
        return {"error": reason_of(e), "retire": True}
    except BaseException as e:
        return {"error": reason_of(e)}
    try:
        return interpret(returned)
    except MemoryError as e:
        return {"error": reason_of(e), "retire": True}
    except BaseException as e:
        return {"error": reason_of(e), "returned": type(returned).__name__}


def serve(requests: BinaryIO, replies: BinaryIO, timeout_s: float, startup_timeout_s: float) -> None:
    """Answer requests until the parent closes the pipe."""

    def reply(message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[replies.write(data) or 0 :]

    def cpu_alarm(seconds: float) -> None:
        # math-verify uses SIGALRM, hence SIGPROF. A Python handler would wait for C code to return; the default kills.
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)

    loaded: dict[str, Verifier] = {}
    reply({"ready": True})
    for line in requests:
        message = json.loads(line)
        for request in message if isinstance(message, list) else [message]:
            name = request["verifier"]
            key = {"id": request["id"]}
            if name not in loaded:
                cpu_alarm(2 * startup_timeout_s + 5)
                try:
                    loaded[name] = load_verifier(name)
                except BaseException as e:
                    cpu_alarm(0)
                    reply({**key, "load_error": reason_of(e)})
                    continue
                reply({**key, "loaded": True})
            if request.get("only_import"):
                cpu_alarm(0)
                reply({**key, "score": 0.0, "extra": {}})
                continue
            cpu_alarm(2 * timeout_s + 5)
            result = grade(loaded[name], request)
            cpu_alarm(0)
            reply({**key, **result})


def read_arguments(description: str | None) -> argparse.Namespace:
    """What the pool tells its processes: limits, and whose they are."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--memory-mb", type=int, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--startup-timeout-s", type=float, required=True)
    parser.add_argument("--parent", type=int, required=True)
    return parser.parse_args()


def main() -> None:
    """Entry point of the process."""
    args = read_arguments(__doc__)
    requests, replies = protect_streams()
    ignore_job_signals()
    limit_resources(args.memory_mb)
    watch_parent(args.parent)
    serve(requests, replies, args.timeout_s, args.startup_timeout_s)
    sys.stdout.flush()
    os._exit(0)  # do not wait for threads that a verifier left behind


if __name__ == "__main__":
    main()
