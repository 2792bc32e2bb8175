"""200 tools and calls that do what they should not: what comes of each, and what is left running.

    python tools/bench/hostile_tools.py [--quick]

A case is a tool of tests/environment/worlds.py with arguments, or a call that a model might have written. Every case
is made in a state that has a history, beside a neighbour in the same worker. Afterwards both must go on as if nothing
had been.
The last line is JSON: `{"cases", "observed", "lost", "hung", "state_kept", "neighbour_kept", "processes_left", ...}`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from treepo_mega.environment import EnvironmentLimits, EnvironmentPool, ToolCall  # noqa: E402
from treepo_mega.environment.keeper import descendants  # noqa: E402

WORLD = f"{ROOT / 'tests' / 'environment' / 'worlds.py'}:Hostile"
LIMITS = EnvironmentLimits(num_workers=1, timeout_s=2.0, memory_mb=1024, max_observation_chars=1000)
LATEST_S = 60.0
"""A case that takes longer counts as hung; the deadlines of its calls sum up to less."""


def cases() -> list[tuple[str, str, Any]]:
    """(kind, tool, arguments), 200 of them."""
    found: list[tuple[str, str, Any]] = []
    found += [("hang", tool, {}) for tool in ("hang", "spin") for _ in range(5)]
    found += [("dies", "die", {"status": status}) for status in range(10)]
    found += [("leaves", "leave", {})] * 5
    found += [("floods", "shout", {"megabytes": size}) for size in (1, 16, 64, 256, 1024) for _ in range(2)]
    found += [("invalid UTF-8", "half", {}), ("invalid UTF-8", "scribble", {})] * 5
    found += [("children", "children", {"count": count}) for count in (1, 5, 10, 20, 50)] * 2
    found += [("memory", "fill", {})] * 5
    found += [("network", "call", {"host": host}) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0")] * 3
    outside = ("/tmp/treepo-outside", "/etc/treepo-outside", "../outside", str(ROOT / "outside"), "/dev/shm/outside")
    found += [("writes outside", "write", {"path": path}) for path in outside] * 3
    found += [("signals", "kill", {"signal": number}) for number in (1, 2, 9, 15, 19)] * 2
    unknown = (
        "",
        "ad",
        "reset",
        "get_reward",
        "__init__",
        "__class__",
        "value",
        "add\n",
        "x" * 10_000,
        "add()",
        "\ud800",
    )
    found += [("unknown tool", tool, {}) for tool in unknown] * 2
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    wrong: tuple[Any, ...] = (
        *({"amount": value} for value in ("one", None, [], {}, [1], 1.5, "1e400", float("nan"), float("inf"), deep)),
        *({}, {"amount": 1, "more": 2}, {"Amount": 1}, {"self": 1}, {"amount": "9" * 5000}, {"": 1}, {"\ud800": 1}),
        *([], "amount", 3, None, True),
    )
    found += [("wrong arguments", "add", arguments) for arguments in wrong] * 3
    found += [("returns no text", tool, {}) for tool in ("nothing", "table")] * 5
    nested = {"amount": {"name": "add", "arguments": {"amount": {"name": "add", "arguments": {}}}}}
    found += [("nested calls", "add", nested)] * 5
    return found


def measure(chosen: list[tuple[str, str, Any]]) -> dict[str, Any]:
    """Make every case, one after the other."""
    totals: Counter[str] = Counter()
    by_kind: dict[str, Counter[str]] = {}
    with EnvironmentPool(WORLD, LIMITS) as pool:
        neighbour, _ = pool.open({}, seed=1)
        pool.act(neighbour, [ToolCall("add", {"amount": 1})], seed=1)
        pool.wait()
        for number, (kind, tool, arguments) in enumerate(chosen):
            outcome = one_case(pool, neighbour, number, tool, arguments)
            totals.update(outcome)
            by_kind.setdefault(kind, Counter()).update({**outcome, "cases": 1})
        counts = dict(pool.counts)
        below = descendants(os.getpid())
    left = [pid for pid in below if Path(f"/proc/{pid}").exists()]
    outside = [path for path in ("/tmp/treepo-outside", "/etc/treepo-outside") if Path(path).exists()]
    return {
        "cases": len(chosen),
        **{name: totals[name] for name in ("observed", "lost", "hung", "state_kept", "neighbour_kept")},
        "processes_left": len(left),
        "files_outside": len(outside),
        "restarts": counts["restarts"],
        "replays": counts["replays"],
        "by_kind": {kind: dict(tally) for kind, tally in by_kind.items()},
    }


def one_case(pool: EnvironmentPool, neighbour: Any, number: int, tool: str, arguments: Any) -> dict[str, int]:
    """What comes of one call, and whether its state and the neighbour go on."""
    started = time.monotonic()
    state, _ = pool.open({}, seed=number)
    pool.act(state, [ToolCall("add", {"amount": number})], seed=number)
    pool.wait()
    ticket = pool.act(state, [ToolCall(tool, arguments)], seed=number)
    reply = pool.wait()[ticket]
    after = pool.act(state, [ToolCall("add", {"amount": 1})], seed=number)
    beside = pool.act(neighbour, [ToolCall("add", {"amount": 0})], seed=number)
    replies = pool.wait()
    pool.free(state)
    return {
        "observed": int(bool(reply.texts) and not reply.lost),
        "lost": int(reply.lost),
        "hung": int(time.monotonic() - started > LATEST_S),
        "state_kept": int(replies[after].texts == (str(number + 1),)),
        "neighbour_kept": int(replies[beside].texts == ("1",)),
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case in six")
    args = parser.parse_args()
    chosen = cases()[::6] if args.quick else cases()
    result = measure(chosen)
    print(f"{'kind':<18}{'cases':>7}{'observed':>10}{'state kept':>12}{'neighbour kept':>16}")
    for kind, tally in result["by_kind"].items():
        row = (tally["cases"], tally["observed"], tally["state_kept"], tally["neighbour_kept"])
        print(f"{kind:<18}{row[0]:>7}{row[1]:>10}{row[2]:>12}{row[3]:>16}")
    print(f"left running: {result['processes_left']}; files outside: {result['files_outside']}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
