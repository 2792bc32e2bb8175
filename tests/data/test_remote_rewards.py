"""Rewards over HTTP against a real server on the loopback that is slow, fails, hangs, lies or goes away."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.bench.reward_server import FIXED, RewardServer, serving
from treepo_mega.config import Config, ConfigError, RewardConfig, check, parse_config
from treepo_mega.config.servers import missing_tokens
from treepo_mega.data.prompts import Prompt
from treepo_mega.data.rewards import RewardItem, RewardPool, RewardResult, VerifierError
from treepo_mega.data.rewards.cache import CacheError, ScoreCache
from treepo_mega.data.rewards.lost import describe_lost
from treepo_mega.data.rewards.trial import try_rewards

TOKEN = "sesame-7f31"
PATHS = ("fast", "slow", "half", "hang", "silent", "torn", "huge", "echo", "elsewhere", "busy", *FIXED)
QUICK: dict[str, Any] = {"timeout_s": 0.4, "retries": 2, "backoff_s": 0.01, "deadline_s": 20}


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    with serving(seed=3) as server:
        yield server


def config(server: RewardServer, *paths: str, **keys: Any) -> RewardConfig:
    servers = [{"name": path, "url": server.url(path) + "?key=hidden-2c"} | QUICK | keys for path in paths]
    return RewardConfig.model_validate({"servers": servers, "memory_mb": 2048})


@pytest.fixture(scope="module")
def pool(server: RewardServer) -> Iterator[RewardPool]:
    """One process for all behaviours, without a cache: each answer is a request."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUDGE_TOKEN", TOKEN)
        with RewardPool(config(server, *PATHS, token_env="JUDGE_TOKEN", cache_entries=0)) as pool:
            pool.warm(["http:fast"])
            pool.finish_warming(print)
            yield pool


def item(path: str, text: str = "so it is 4", **more: Any) -> RewardItem:
    return RewardItem(f"http:{path}", "sums", text, "4", {"row": 1}, None, "2+2=", **more)


def test_an_answer_is_sent_as_documented_and_comes_back_with_its_numbers(
    pool: RewardPool, server: RewardServer
) -> None:
    assert pool.score([item("fast"), item("fast", "5")]) == [
        RewardResult(1.0, None, {"length": 10.0}),
        RewardResult(0.0, None, {"length": 1.0}),
    ]
    sent = server.last["fast"]
    assert sent["headers"]["authorization"] == f"Bearer {TOKEN}"
    assert sent["items"][0] | {"solution_str": ""} == {
        "prompt": "2+2=", "data_source": "sums", "solution_str": "", "ground_truth": "4", "extra_info": {"row": 1},
    }  # fmt: skip


@pytest.mark.parametrize(
    "path, requests, reason",
    [
        ("hang", 3, r"no answer within 0.4 s (3 tries)"),
        ("silent", 3, r"closed the connection without a reply (3 tries)"),
        ("torn", 3, r"closed the connection amid its reply (3 tries)"),
        ("broken", 3, r"answered 500 Internal Server Error: 'Traceback' (3 tries)"),
        ("missing", 1, r"answered 404 Not Found: 'no such path'"),
        ("elsewhere", 1, r"answered 302 Found"),
        ("huge", 1, r"its reply is longer than 131072 bytes"),
        ("garbage", 1, r"its reply is no JSON: b'<html>the proxy is tired</html>'; expected {"),
        ("nested", 1, r"its reply is no JSON: b'[[[["),
        ("list", 1, r"its reply holds no list 'scores': b'[1.0]'; expected {"),
        ("short", 1, r"its reply holds 0 scores; expected {"),
        ("nan", 1, r"scores[0]: it is nan; expected a finite score"),
        ("infinite", 1, r"scores[0]: it is inf; expected a finite score"),
        ("text", 1, r"""scores[0] is "good"; expected a finite number, or"""),
        ("true", 1, r"scores[0] is true; expected a finite number, or"),
        ("refuses", 1, r"says: no reference answer"),
    ],
)
def test_what_is_no_score_is_lost_in_bounded_time_with_url_and_reason(
    pool: RewardPool, server: RewardServer, path: str, requests: int, reason: str
) -> None:
    before, restarts = server.requests[path], pool.restarts
    pool.take_tally(), pool.take_costs()
    started = time.monotonic()
    good, bad = pool.score([item("fast"), item(path)])
    assert time.monotonic() - started < 5
    assert good.score == 1.0
    assert bad.score is None
    assert f"reward server {path!r} ({server.url(path)}): " in str(bad.error) and reason in str(bad.error)
    assert "hidden-2c" not in str(bad.error) and TOKEN not in str(bad.error)
    assert server.requests[path] - before == requests and pool.restarts == restarts
    assert pool.take_costs() == {"remote_calls": 1 + requests, "remote_retries": requests - 1}
    lost, total, message = describe_lost([pool.take_tally()], "step 3")
    assert (lost, total) == (1, 2)
    assert f"verifier 'http:{path}' lost 1, first: " in message and "deadline_s of reward.servers" in message


def test_a_token_or_query_that_a_server_sends_back_is_not_shown(pool: RewardPool) -> None:
    (result,) = pool.score([item("echo")])
    assert "answered 401 Unauthorized" in str(result.error) and "Bearer ***" in str(result.error)
    assert TOKEN not in str(result.error)


def test_half_of_all_tries_fail_and_nearly_nothing_is_lost(pool: RewardPool, server: RewardServer) -> None:
    pool.take_costs()
    results = pool.score([item("half", f"{index} 4") for index in range(64)])
    lost = [result for result in results if result.score is None]
    # One of eight fails three times.
    assert 0 < len(lost) < 20
    assert all("answered 503 Service Unavailable: 'overloaded' (3 tries)" in str(result.error) for result in lost)
    costs = pool.take_costs()
    assert costs["remote_calls"] == server.requests["half"] == 64 + costs["remote_retries"]


def test_the_server_says_how_long_to_wait(pool: RewardPool) -> None:
    started = time.monotonic()
    assert pool.score([item("busy")])[0].score == 1.0
    assert time.monotonic() - started >= 1.0, "its Retry-After, not our 10 ms"


def test_many_requests_are_in_flight_and_no_more_than_allowed(server: RewardServer) -> None:
    with RewardPool(config(server, "slow", in_flight=16, cache_entries=0)) as pool:
        tickets = pool.submit([item("slow", f"{index} 4") for index in range(48)])
        early = pool.poll()
        assert len(early) < len(tickets), "the engine does not wait"
        results = early | pool.wait()
        assert [results[ticket].score for ticket in tickets] == [1.0] * len(tickets)
    assert server.most_open["slow"] == 16


def test_a_server_that_hangs_costs_a_step_its_deadline_whatever_waits(server: RewardServer) -> None:
    """Ten times as many as may be in flight: those that wait for their turn have the same deadline."""
    with RewardPool(config(server, "hang", in_flight=4, deadline_s=1.5, cache_entries=0)) as pool:
        started = time.monotonic()
        results = pool.score([item("hang", f"{index} 4") for index in range(40)])
        assert time.monotonic() - started < 8
    assert all(result.score is None and "deadline_s 1.5 has passed" in str(result.error) for result in results[4:])
    assert "its turn did not come; its deadline_s 1.5 has passed (0 tries)" in str(results[-1].error)


def test_equal_answers_are_asked_once_and_later_runs_need_not_ask(server: RewardServer, tmp_path: Path) -> None:
    keys = {"cache_dir": str(tmp_path / "scores")}
    items = [item("fast", f"{index % 3} 4") for index in range(30)]
    before = server.requests["fast"]
    with RewardPool(config(server, "fast", **keys)) as pool:
        assert [result.score for result in pool.score(items)] == [1.0] * 30
        assert pool.take_costs() == {"remote_calls": 3, "remote_retries": 0, "remote_cached": 27}
        assert pool.score(items)[0] == RewardResult(1.0, None, {"length": 3.0})
        assert pool.score([RewardItem("http:fast", "sums", "0 4", "4", {"row": 2}, None, "2+2=")])[0].score == 1.0
        assert pool.take_costs() == {"remote_calls": 1, "remote_retries": 0, "remote_cached": 30}
    with RewardPool(config(server, "fast", **keys)) as pool:
        assert pool.score(items)[0] == RewardResult(1.0, None, {"length": 3.0})
        assert pool.take_costs() == {"remote_cached": 30}
    assert server.requests["fast"] - before == 4
    # What is lost is asked again: the server may be well the next time.
    with RewardPool(config(server, "missing")) as pool:
        assert [result.score for result in pool.score([item("missing")] * 3)] == [None] * 3
        assert pool.take_costs() == {"remote_calls": 1, "remote_retries": 0}
        assert pool.score([item("missing")])[0].score is None
        assert pool.take_costs()["remote_calls"] == 1


def test_several_answers_share_a_request_and_one_bad_score_costs_one(server: RewardServer) -> None:
    before = server.requests["fast"]
    with RewardPool(config(server, "fast", "refuses", batch_size=8, in_flight=1)) as pool:
        assert [r.score for r in pool.score([item("fast", f"{i} {4 + i % 2}") for i in range(33)])][:3] == [
            1.0,
            0.0,
            1.0,
        ]
        assert server.requests["fast"] - before <= 7, "the first may go alone"
        results = pool.score([item("refuses", str(index)) for index in range(3)])
    assert "its reply holds 1 scores; expected" in str(results[-1].error)


def test_a_cache_that_cannot_be_read_stops_the_run_and_a_torn_line_does_not(
    server: RewardServer, tmp_path: Path
) -> None:
    cache = ScoreCache(2, str(tmp_path))
    for key in "abc":
        cache.put(key, {"score": 1.0, "extra": {}})
    assert cache.get("a") is None, "the oldest went"
    (file,) = tmp_path.glob("scores-*.jsonl")
    with file.open("a") as out:
        out.write('{"key": "d", "answ')
    assert ScoreCache(9, str(tmp_path)).get("c") == {"score": 1.0, "extra": {}}
    file.write_text("no score\n")
    with pytest.raises(CacheError, match=rf"{file}:1: expected a line of the score cache, got b'no score"):
        ScoreCache(9, str(tmp_path))
    with (
        RewardPool(config(server, "fast", cache_dir=str(tmp_path))) as pool,
        pytest.raises(VerifierError, match=r"'http:fast' cannot be loaded: CacheError: .*:1: expected a line"),
    ):
        pool.score([item("fast")])


def prompt(verifier: str) -> Prompt:
    return Prompt("rows:4", "2+2=", [1], "4", verifier, "sums")


@pytest.mark.parametrize(
    "path, reason", [("fast", ""), ("nan", "it is nan"), ("broken", "500"), ("gone", "Cannot conn")]
)
def test_the_start_asks_each_server_once_and_needs_an_answer(server: RewardServer, path: str, reason: str) -> None:
    servers = config(server, path)
    if path == "gone":
        servers.servers[0].url = "http://127.0.0.1:9/score"
    with RewardPool(servers) as pool:
        if not reason:
            assert try_rewards(pool, servers, [prompt("http:fast")]) == []
            assert (pool.take_costs(), pool.take_tally()["total"]) == ({}, 0), "no step has this"
            return
        with pytest.raises(VerifierError, match=rf"'http:{path}' on the example answer .*reward server.*{reason}"):
            try_rewards(pool, servers, [prompt(f"http:{path}")])


def test_only_the_process_that_asks_sees_the_token(
    server: RewardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    file = tmp_path / "look.py"
    look = "return float('JUDGE_TOKEN' in os.environ)"
    file.write_text(
        f"import os\ndef plain(data_source, solution_str, ground_truth, extra_info):\n    {look}\n"
        f"async def waits(data_source, solution_str, ground_truth, extra_info):\n    {look}\n"
    )
    with RewardPool(config(server, "fast", token_env="JUDGE_TOKEN")) as pool:
        names = (f"{file}:plain", f"{file}:waits", "http:fast")
        results = pool.score([RewardItem(name, "x", "4", "4") for name in names])
    assert [result.score for result in results] == [0.0, 0.0, 1.0]


def whole(servers: list[dict[str, Any]], **data: Any) -> Config:
    raw = {"model": {"hf_checkpoint": "none"}, "data": {"train": [{"reasoning_gym": "chain_sum"}]} | data}
    return parse_config(raw | {"reward": {"servers": servers}})


def test_wrong_keys_are_refused_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = {"name": "judge", "url": "http://localhost:8000/score"}
    assert check(whole([judge], verifier="http:judge"), 1)
    for servers, verifier, said in (
        ([judge], "http:juge", r"data.verifier 'http:juge': no server of that name .*did you mean 'judge'"),
        ([], "http:judge", r"data.verifier 'http:judge': no server of that name in reward.servers, which is empty"),
        ([judge], "math", r"reward.servers.0: nothing asks it; set data.verifier .* to http:judge"),
        ([judge, judge], "http:judge", r"reward.servers: 'judge' names several servers"),
    ):
        with pytest.raises(ConfigError, match=said):
            check(whole(servers, verifier=verifier), 1)
    for url, said in (
        ("ftp://x/y", "expected a URL such as http://localhost:8000/score, got 'ftp://x/y'"),
        ("http://me:secret-9@host/x", "expected no user or password in the URL of host; name a variable in token_env"),
        ("http://host:99999999/x", "expected a URL such as .*Port out of range"),
    ):
        with pytest.raises(ConfigError, match=said) as error:
            whole([judge | {"url": url}], verifier="http:judge")
        assert "secret-9" not in str(error.value)
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    (said,) = missing_tokens(whole([judge | {"token_env": "NO_SUCH_TOKEN"}], verifier="http:judge"))
    assert said == "reward.servers.0.token_env: the environment variable NO_SUCH_TOKEN is not set, or is empty"
    with (
        RewardPool(RewardConfig()) as pool,
        pytest.raises(VerifierError, match=r"no server of that name in reward\.serv"),
    ):
        pool.submit([item("judge")])


def test_a_token_that_is_missing_when_the_process_starts_is_named(server: RewardServer) -> None:
    with (
        RewardPool(config(server, "fast", token_env="NO_SUCH_TOKEN")) as pool,
        pytest.raises(VerifierError, match=r"the environment variable NO_SUCH_TOKEN \(token_env\) is not set"),
    ):
        pool.score([item("fast")])


def test_a_server_gets_text_that_no_one_can_encode(pool: RewardPool, server: RewardServer) -> None:
    """Model output is any text: half a surrogate pair, zeros, quotes."""
    text = '\ud800\x00"}]}\n4'
    assert pool.score([item("fast", text)])[0].score == 1.0
    assert json.dumps(server.last["fast"]["items"][0]["solution_str"]) == json.dumps(text)
