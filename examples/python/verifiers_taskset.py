"""Single-turn tasksets of `verifiers` (V1) as prompts and rewards: rows of prompts, and a server that scores answers.

    python verifiers_taskset.py rows my-taskset --out rows.jsonl        # once, in the Python that has verifiers
    python verifiers_taskset.py serve my-taskset --port 8801            # beside the run

    data.train=[{path: rows.jsonl}] data.apply_chat_template=true data.verifier=http:taskset
    'reward.servers=[{name: taskset, url: http://localhost:8801/score}]'

`my-taskset` is an installed taskset, or path/to/file.py:Class. verifiers wants a Python of its own, because it and the
engine pin other versions of the same packages: `pip install verifiers`. This file needs nothing else.

An answer is one turn. So a task with tools, a container, hooks round its turn, or a score that needs a runtime is
refused: verifiers would leave such scores out without a word.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import inspect
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MAX_BYTES = 16 << 20
"""Of a request."""


class NotSingleTurn(Exception):
    """A taskset that one answer cannot be scored by; the message says what it needs."""


def verifiers(name: str = "") -> Any:
    """`verifiers.v1`, or a module below it. Ends the program with what to install where it is missing."""
    try:
        return importlib.import_module(f"verifiers.v1{name and '.'}{name}")
    except ModuleNotFoundError as error:
        sys.exit(f"{error}: run this with a Python that has verifiers: pip install 'verifiers>=0.4'")


def load(name: str, config: dict[str, Any]) -> Any:
    """The taskset `name`, configured. Ends the program for a name that is none, and for a wrong configuration."""
    vf = verifiers()
    try:
        if ".py:" in name:
            path, _, title = name.rpartition(":")
            spec = importlib.util.spec_from_file_location(Path(path).stem, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            # Its classes are looked up by their module.
            sys.modules[Path(path).stem] = module
            spec.loader.exec_module(module)
            found = getattr(module, title)
        else:
            found = verifiers("utils.loaders").taskset_class(name)
        concrete_type = verifiers("utils.generic").concrete_type
        made = concrete_type(found, vf.TasksetConfig, origin=vf.Taskset) or vf.TasksetConfig
        return found(made.model_validate({"id": name, **config}))
    except (OSError, ImportError, AttributeError, TypeError, ValueError) as error:
        sys.exit(f"taskset {name!r}: {type(error).__name__}: {error}")


def check(taskset: Any, task: Any) -> None:
    """Raise NotSingleTurn for a task that one answer cannot be scored by."""
    vf = verifiers()
    kind = type(task)
    scores = [*task.hooks("reward"), *(judge.score for judge in task.plugged_judges())]
    required = inspect.Parameter.empty
    wants_runtime = [
        score.__name__
        for score in [*scores, *task.hooks("metric")]
        if "runtime" in (given := inspect.signature(score).parameters) and given["runtime"].default is required
    ]
    hooks = [hook for hook in ("setup", "finalize") if getattr(kind, hook) is not getattr(vf.Task, hook)]
    needs = {
        "tools": bool(type(taskset).toolsets(taskset.config) or kind.toolsets(task.config)),
        "a container": kind.NEEDS_CONTAINER,
        f"a runtime for {', '.join(wants_runtime)}": bool(wants_runtime),
        f"a runtime for {', '.join(hooks)}": bool(hooks),
        "a user who opens the conversation": task.data.prompt is None,
    }
    if missing := [need for need, is_so in needs.items() if is_so]:
        raise NotSingleTurn(f"{kind.__name__} needs {' and '.join(missing)}: it cannot be scored by one answer")
    if not scores:
        raise NotSingleTurn(f"{kind.__name__} has no reward: nothing could be learnt from it")


def messages_of(data: Any) -> list[dict[str, str]]:
    """The prompt of a task as messages. Raises NotSingleTurn for one that is no text, or holds tools' answers."""
    said = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    if isinstance(data.prompt, str):
        return [*said, {"role": "user", "content": data.prompt}]
    for message in data.prompt:
        if not isinstance(message.content, str) or message.role == "tool":
            raise NotSingleTurn(f"the prompt has a message of {message.role} that is no text")
        said.append({"role": message.role, "content": message.content})
    return said


def rows(taskset: Any, name: str, limit: int | None) -> Iterator[dict[str, Any]]:
    """A row for each task, the first `limit` of them. Raises NotSingleTurn."""
    if limit is None and not taskset.bounded:
        raise NotSingleTurn("the taskset has no end: say how many tasks to take with --limit")
    for task in itertools.islice(taskset, limit):
        check(taskset, task)
        # The key is the truth: a score of another task than the row's is never given.
        yield {
            "messages": messages_of(task.data),
            "answer": task.key,
            "data_source": name,
            "extra_info": {"task": task.data.model_dump(mode="json", exclude_none=True)},
        }


def scorer(taskset: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function from an item of a request to its score; `error` says why there is none."""
    vf = verifiers()
    kind = taskset.task_type()
    state_cls = verifiers("state").state_cls

    def trace_of(task: Any, answer: str) -> Any:
        said = [*messages_of(task.data), {"role": "assistant", "content": answer}]
        makes = {"system": vf.SystemMessage, "user": vf.UserMessage, "assistant": vf.AssistantMessage}
        nodes = [
            vf.MessageNode(
                parent=place - 1 if place else None,
                message=makes[message["role"]](content=message["content"]),
                sampled=place == len(said) - 1,
            )
            for place, message in enumerate(said)
        ]
        return vf.Trace(
            task=vf.TraceTask(type=kind.__name__, data=task.data, key=task.key, hash=task.hash),
            state=state_cls(kind)(),
            agent=vf.AgentInfo(config=vf.AgentConfig()),
            nodes=nodes,
            is_completed=True,
            ok=True,
        )

    def score(item: dict[str, Any]) -> dict[str, Any]:
        try:
            data = kind.data_type().model_validate(item["extra_info"]["task"])
            task = kind(data, taskset.config.task)
            if task.key != item["ground_truth"]:
                return {"error": f"the task is {task.key[:16]} now and was {item['ground_truth'][:16]} in the rows"}
            check(taskset, task)
            trace = trace_of(task, item["solution_str"])
            asyncio.run(task.score(trace))
        except Exception as error:  # a taskset is a program of others: it fails in any way it likes
            return {"error": f"{type(error).__name__}: {error}"[:500]}
        parts = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
        unscored = [name for name, reward in trace.rewards.items() if reward is None]
        if unscored:
            return {"error": f"no score by {', '.join(unscored)}"}
        numbers = {name: value for name, value in trace.metrics.items() if value is not None}
        return {**numbers, **parts, "score": trace.reward}

    return score


def server(score: Callable[[dict[str, Any]], dict[str, Any]], host: str, port: int) -> ThreadingHTTPServer:
    """POST of `{"items": [...]}` gives `{"scores": [...]}`, as docs/guides/remote-rewards.md says."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if not 0 < length <= MAX_BYTES:
                self.reply(413, {"error": f"expected a body of at most {MAX_BYTES} bytes"})
                return
            try:
                items = json.loads(self.rfile.read(length))["items"]
                scores = [score(item) for item in items]
            except (ValueError, KeyError, TypeError) as error:
                self.reply(400, {"error": f"{type(error).__name__}: {error}"})
                return
            self.reply(200, {"scores": scores})

        def reply(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: a run sends thousands of requests a step."""

    return ThreadingHTTPServer((host, port), Handler)


def main() -> None:
    """Write rows, or serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rows", "serve"])
    parser.add_argument("taskset", help="an installed taskset, or path/to/file.py:Class")
    parser.add_argument("--config", default="{}", metavar="JSON", help="of the taskset (default: {})")
    parser.add_argument("--out", type=Path, help="rows: the file to write, .jsonl")
    parser.add_argument("--limit", type=int, help="rows: the first so many tasks (default: all)")
    parser.add_argument("--host", default="127.0.0.1", help="serve: where to listen; 0.0.0.0 for other machines")
    parser.add_argument("--port", type=int, default=8801, help="serve: 0 takes a free one (default: %(default)s)")
    args = parser.parse_args()
    taskset = load(args.taskset, json.loads(args.config))
    if args.what == "serve":
        serving = server(scorer(taskset), args.host, args.port)
        print(f"http://{args.host}:{serving.server_address[1]}/score", flush=True)
        serving.serve_forever()
    if args.out is None:
        parser.error("rows needs --out FILE")
    try:
        written = [json.dumps(row) + "\n" for row in rows(taskset, args.taskset, args.limit)]
    except NotSingleTurn as error:
        sys.exit(f"taskset {args.taskset!r}: {error}")
    args.out.write_text("".join(written), encoding="utf-8")
    print(f"{args.out}: {len(written)} rows")


if __name__ == "__main__":
    main()
