"""What a reward server costs a step when it is quick, slow, fails half the time, or hangs; and async against sync.

    python tools/bench/rewards.py [--quick]

An engine is played: every 10 ms a tree of 16 answers is done, of which 4 say what another of it says, and is handed to
the graders. The servers are real ones on the loopback (tools/bench/reward_server.py); slow waits 0.2 s. Keys: 32
requests in flight, 1 s a request, 3 retries, 5 s an answer. `sampling`: seconds of that play, which must not depend on
the server. `waited`: seconds afterwards until every answer has its score or is lost. The second table grades by a
function that waits 20 ms: plain ones in one worker, one after the other, and `async def` with 64 in flight.

The last line is JSON: {"servers": [{"name", "answers", "sampling_s", "waited_s", "calls", "retries", "cached", "lost",
"message"}], "functions": [{"name", "answers", "seconds", "most_open"}], "async_over_sync": answers a second, ratio}.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.bench.reward_server import serving  # noqa: E402 - the path is set above
from treepo_mega.config import RewardConfig  # noqa: E402
from treepo_mega.data.rewards import RewardItem, RewardPool  # noqa: E402

LEAVES = 16
SAME = 4
STEP_S = 0.01
SERVERS = {
    "fast": "quick",
    "slow": "slow",
    "half": "fails half",
    "torn": "closes midway",
    "garbage": "lies",
    "hang": "hangs",
}
KEYS: dict[str, Any] = {"timeout_s": 1.0, "retries": 3, "backoff_s": 0.05, "deadline_s": 5.0, "in_flight": 32}
WAITS = """
import asyncio, time
OPEN = [0, 0]

def plain(data_source, solution_str, ground_truth, extra_info):
    time.sleep(0.02)
    return {"score": 1.0, "open": 1}

async def waits(data_source, solution_str, ground_truth, extra_info):
    OPEN[0] += 1
    OPEN[1] = max(OPEN)
    await asyncio.sleep(0.02)
    OPEN[0] -= 1
    return {"score": 1.0, "open": OPEN[1]}
"""


def tree(path: str, number: int) -> list[RewardItem]:
    """The answers of a tree; the last ones say what the first one says."""
    texts = [f"{number} {leaf if leaf < LEAVES - SAME else 0} 42" for leaf in range(LEAVES)]
    return [RewardItem(f"http:{path}", "bench", text, "42", prompt=f"problem {number}") for text in texts]


def step(path: str, url: str, trees: int) -> dict[str, Any]:
    """One played step against the server at `url`."""
    cfg = RewardConfig.model_validate({"servers": [{"name": path, "url": url} | KEYS]})
    with RewardPool(cfg) as pool:
        pool.warm([f"http:{path}"])
        pool.finish_warming(lambda _: None)
        results = {}
        started = time.monotonic()
        for number in range(trees):
            # The engine's own work, which goes on whatever the graders do.
            time.sleep(STEP_S)
            pool.submit(tree(path, number))
            results |= pool.poll()
        sampled = time.monotonic()
        results |= pool.wait()
        ended = time.monotonic()
        costs = pool.take_costs()
    lost = [result.error for _, result in sorted(results.items()) if result.score is None]
    return {
        "name": SERVERS[path],
        "answers": len(results),
        "sampling_s": round(sampled - started, 3),
        "waited_s": round(ended - sampled, 3),
        "calls": costs.get("remote_calls", 0),
        "retries": costs.get("remote_retries", 0),
        "cached": costs.get("remote_cached", 0),
        "lost": len(lost),
        "message": lost[0] if lost else "",
    }


def functions(count: int) -> list[dict[str, Any]]:
    """A plain and an async function that wait 20 ms, on `count` answers each."""
    found = []
    with tempfile.TemporaryDirectory() as folder, RewardPool(RewardConfig(in_flight=64)) as pool:
        file = Path(folder) / "rewards.py"
        file.write_text(WAITS, encoding="utf-8")
        for name, function in (("plain", "plain"), ("async", "waits")):
            verifier = f"{file}:{function}"
            pool.warm([verifier])
            pool.finish_warming(lambda _: None)
            started = time.monotonic()
            results = pool.score([RewardItem(verifier, "bench", str(index), "") for index in range(count)])
            seconds = round(time.monotonic() - started, 3)
            most = max(int(result.extra["open"]) for result in results)
            found.append({"name": name, "answers": count, "seconds": seconds, "most_open": most})
    return found


def main() -> None:
    """Print both tables, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 trees a step in place of 200")
    args = parser.parse_args()
    trees = 40 if args.quick else 200
    rows = []
    columns = ("answers", "sampling_s", "waited_s", "calls", "retries", "cached", "lost")
    print(f"{'server':14}" + "".join(f"{name:>12}" for name in columns) + "  first message")
    with serving(seed=1) as server:
        for path in SERVERS:
            rows.append(step(path, server.url(path), trees))
            numbers = "".join(f"{rows[-1][name]:>12}" for name in columns)
            print(f"{rows[-1]['name']:14}{numbers}  {rows[-1]['message'].replace(server.url(path), 'URL')}")
    told = functions(trees * 8)
    print(f"\n{'function':14}{'answers':>12}{'seconds':>12}{'in flight':>12}")
    for row in told:
        print(f"{row['name']:14}{row['answers']:>12}{row['seconds']:>12}{row['most_open']:>12}")
    ratio = round(told[0]["seconds"] / told[1]["seconds"], 1)
    print(json.dumps({"servers": rows, "functions": told, "async_over_sync": ratio}))
    if any(row["waited_s"] > KEYS["deadline_s"] + 3 for row in rows):
        sys.exit("a step waited for longer than its deadline")


if __name__ == "__main__":
    main()
