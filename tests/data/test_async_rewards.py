"""`async def` rewards: many in one process, and whatever one of them does, the others keep their scores."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.bench.reward_server import serving
from treepo_mega.config import RewardConfig
from treepo_mega.data.rewards import RewardItem, RewardPool, RewardResult, VerifierError, check_verifier

SOURCE = """
import asyncio, functools, os, time

LEFT = []
FLYING = [0, 0]

async def score(data_source, solution_str, ground_truth, extra_info=None, trajectory=None, prompt=None):
    what = solution_str
    FLYING[0] += 1
    FLYING[1] = max(FLYING)
    try:
        await asyncio.sleep(0.02)
        if what == "hang":
            await asyncio.sleep(1000)
        if what == "deaf":
            while True:
                try:
                    await asyncio.sleep(1000)
                except asyncio.CancelledError:
                    pass
        if what == "block":
            time.sleep(1000)
        if what == "lock":
            sum(range(10**13))
        if what == "exit":
            os._exit(7)
        if what == "sysexit":
            raise SystemExit(3)
        if what == "raise":
            raise KeyError("no such thing")
        if what == "cancel":
            raise asyncio.CancelledError
        if what == "nan":
            return float("nan")
        if what == "memory":
            return float(len(bytearray(64 << 30)))
        if what == "forge":
            print('{"id": 0, "score": 99.0, "extra": {}}' * 10, flush=True)
            return 0.25
        if what == "most":
            return {"score": 1.0, "acc": 1.0, "most": FLYING[1], "tokens": trajectory["tokens"], "prompt": len(prompt)}
        return 0.5
    finally:
        FLYING[0] -= 1

def made_plain(function):
    @functools.wraps(function)
    def plain(*a, **k):
        return asyncio.run(function(*a, **k))
    del plain.__wrapped__
    return plain

@made_plain
async def decorated(data_source, solution_str, ground_truth, extra_info):
    return 1.0

hidden = score
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("user") / "waits.py"
    file.write_text(SOURCE)
    return file


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("treepo_mega.data.rewards.flight_grader.GRACE_S", 1.5)
        yield from opened()


def opened() -> Iterator[RewardPool]:
    with RewardPool(RewardConfig(timeout_s=0.5, startup_timeout_s=60, memory_mb=1024, in_flight=12)) as pool:
        yield pool


def test_many_calls_are_in_flight_and_no_more_than_allowed(pool: RewardPool, file: Path) -> None:
    name = f"{file}:score"
    told = {"prompt_id": "p", "tokens": 9, "stop": "eos", "segments": 1, "fallback": False}
    items = [RewardItem(name, "x", "good", "")] * 100 + [RewardItem(name, "x", "most", "", None, told, "2+2=")]
    *good, last = pool.score(items)
    assert good == [RewardResult(0.5)] * 100
    assert last == RewardResult(1.0, None, {"acc": 1.0, "most": 12.0, "tokens": 9.0, "prompt": 4.0})


@pytest.mark.parametrize(
    "what, reason, restarts",
    [
        ("raise", "KeyError: 'no such thing' (waits.py:", 0),
        ("nan", "returned nan; expected a finite score", 0),
        ("sysexit", "SystemExit: 3 (waits.py:", 0),
        ("cancel", "CancelledError: it cancelled itself", 0),
        ("hang", "grading took more than 0.5 s (2 tries)", 0),
        ("deaf", "grading took more than 0.5 s, and went on when it was cancelled (2 tries)", 2),
        ("block", "it held the event loop for more than 0.5 s; an async reward awaits what it waits for (2 tries)", 2),
        pytest.param(
            "lock", "grading, without a sign of life, took more than 2 s (2 tries)", 2, marks=pytest.mark.slow
        ),
        ("exit", "the grader process died (exit code 7) (2 tries)", 2),
        ("memory", "MemoryError", 2),
    ],
)
def test_the_guilty_alone_is_lost_with_its_reason(
    pool: RewardPool, file: Path, what: str, reason: str, restarts: int
) -> None:
    name, before = f"{file}:score", pool.restarts
    items = [RewardItem(name, "x", text, "") for text in ["good"] * 8 + [what] + ["good"] * 8]
    # Those that grade in batches are another process's.
    results = pool.score([*items, RewardItem("exact", "x", "4", "4")])
    assert [result.score for result in results] == [0.5] * 8 + [None] + [0.5] * 8 + [1.0]
    assert reason in str(results[8].error)
    assert pool.restarts - before == restarts


def test_prints_do_not_reach_the_protocol(pool: RewardPool, file: Path) -> None:
    assert pool.score([RewardItem(f"{file}:score", "x", "forge", "")]) == [RewardResult(0.25)]


def test_what_is_submitted_goes_on_while_nobody_looks(pool: RewardPool, file: Path) -> None:
    started = time.monotonic()
    tickets = pool.submit([RewardItem(f"{file}:score", "x", "good", "")] * 60)
    assert time.monotonic() - started < 0.5
    time.sleep(1.5)
    results = pool.poll()
    assert sorted(results) == tickets, "60 calls of 20 ms by 12, without a look at them"


@pytest.mark.parametrize(
    "function, said",
    [
        ("decorated", "'decorated' is written async, but its decorator makes a plain function of it"),
        ("hidden", "'hidden' is async, expected a plain function: nothing awaits it"),
    ],
)
def test_a_file_that_hides_what_is_async_is_refused(pool: RewardPool, file: Path, function: str, said: str) -> None:
    check_verifier(f"{file}:{function}")
    with pytest.raises(VerifierError, match=said):
        pool.score([RewardItem(f"{file}:{function}", "x", "a", "b")])


def test_an_import_that_raises_or_hangs_stops_the_run(tmp_path: Path) -> None:
    for text, seconds, said in (
        ("import no_such_module_here", 60, r"cannot be loaded: ModuleNotFoundError"),
        ("import time\ntime.sleep(1000)", 1, r"cannot be loaded \(2 tries\): starting up .* took more than 1 s"),
    ):
        file = tmp_path / f"broken{len(text)}.py"
        file.write_text(f"{text}\nasync def score(**kw):\n    return 1.0\n")
        with (
            RewardPool(RewardConfig(startup_timeout_s=seconds)) as pool,
            pytest.raises(VerifierError, match=said),
        ):
            pool.score([RewardItem(f"{file}:score", "x", "a", "b")])


def test_the_example_judge_asks_a_chat_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        monkeypatch.setenv("JUDGE_URL", server.url(""))
        with RewardPool(RewardConfig()) as pool:
            right, wrong = pool.score(
                [RewardItem("examples/plugins/judge.py:judge", "x", text, "", prompt="6*7") for text in ("42", "41")]
            )
        (asked,) = {message["content"] for message in server.last["v1/chat/completions"]["messages"]}
    assert right == RewardResult(0.7)
    assert "the judge named no score from 0 to 10: 'It is fine.\\nScore: 11'" in str(wrong.error)
    assert "<problem>6*7</problem>" in asked
