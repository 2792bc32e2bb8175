"""`treepo-mega environment NAME`: what an environment offers, and what its tools answer; no model, no GPU.

treepo-mega environment calculator --call calculate '{"expression": "2 + 3"}'
treepo-mega environment mine.py:Counter --row '{"goal": 5}' --call add '{"amount": 5}' --reward
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from treepo_mega.environment.contract import EnvironmentClassError, Manifest, read_manifest
from treepo_mega.environment.pool import EnvironmentPool
from treepo_mega.environment.state import EnvironmentLimits, Reply, ToolCall
from treepo_mega.errors import nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    limits = EnvironmentLimits()
    parser.add_argument("environment", metavar="NAME", help="path/to/file.py:Class, or a built-in name")
    parser.add_argument("--row", default="{}", metavar="JSON", help="what reset(**row) gets (default: {})")
    parser.add_argument(
        "--call", nargs=2, action="append", default=[], metavar=("TOOL", "JSON"), help="a call; may be given repeatedly"
    )
    parser.add_argument("--reward", action="store_true", help="ask get_reward at the end")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers that tools draw (default: 0)")
    parser.add_argument("--timeout-s", type=float, default=limits.timeout_s, help="of one call (default: %(default)s)")
    parser.add_argument("--network", action="store_true", help="let tools open network connections")
    parser.add_argument("--writes-anywhere", action="store_true", help="let tools write outside their own directory")


def run(args: argparse.Namespace, say: Callable[[str], None] = print) -> int:
    """Print the tools and the answers; 1 when something was lost. Raises EnvironmentClassError for bad input."""
    manifest = read_manifest(args.environment)
    row = _object(args.row, "--row")
    calls = [ToolCall(name, _object(text, f"--call {name}")) for name, text in args.call]
    for call in calls:
        if call.name not in manifest.tool_names:
            near = nearest(call.name, manifest.tool_names)
            raise EnvironmentClassError(
                f"--call {call.name}: no such tool{near}; it has {', '.join(manifest.tool_names)}"
            )
    if args.reward and not manifest.has_reward:
        raise EnvironmentClassError(
            f"--reward: {args.environment} has no get_reward; its answers are graded by a verifier"
        )
    say(describe(manifest))
    limits = EnvironmentLimits(
        num_workers=1, timeout_s=args.timeout_s, network=args.network, writes_anywhere=args.writes_anywhere
    )
    with EnvironmentPool(args.environment, limits) as pool:
        state, ticket = pool.open(row, seed=args.seed)
        reply = pool.wait()[ticket]
        say(f"reset: {_shown(reply, reply.text)}")
        for number, call in enumerate(calls):
            if reply.lost:
                break
            ticket = pool.act(state, [call], seed=args.seed + number + 1)
            reply = pool.wait()[ticket]
            say(f"{call.name}({json.dumps(call.arguments)}): {_shown(reply, reply.texts[0] if reply.texts else '')}")
        if args.reward and not reply.lost:
            ticket = pool.grade(state, seed=args.seed)
            reply = pool.wait()[ticket]
            say(f"get_reward: {_shown(reply, reply.score)}")
    return int(reply.lost)


def describe(manifest: Manifest) -> str:
    """The tools of an environment, a line each, and how its states are copied."""
    lines = [f"{manifest.name}: {len(manifest.tools)} tools"]
    for tool in manifest.tools:
        function = tool["function"]
        parameters = function["parameters"]["properties"]
        shown = ", ".join(f"{name}: {schema.get('type', 'any')}" for name, schema in parameters.items())
        lines.append(f"  {function['name']}({shown})  {function['description'].splitlines()[0]}")
    lines.append(f"  branches copy its state by {manifest.copies_by}")
    lines.append(f"  reward: {'get_reward' if manifest.has_reward else 'a verifier (data.verifier)'}")
    return "\n".join(lines)


def _shown(reply: Reply, value: Any) -> str:
    # As JSON: an observation may hold what moves the cursor of a terminal.
    return f"LOST: {reply.error}" if reply.lost else json.dumps(value, ensure_ascii=True)


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise EnvironmentClassError(f"{what}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise EnvironmentClassError(f"{what}: expected a JSON object, found {type(value).__name__}")
    return value
