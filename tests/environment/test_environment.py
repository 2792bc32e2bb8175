"""Environments in worker processes: what a class must be, copies and replays, and tools that misbehave."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from treepo_mega.data.rewards.grader import worker_environment
from treepo_mega.environment import EnvironmentClassError, EnvironmentLimits, EnvironmentPool, Reply, ToolCall
from treepo_mega.environment.contract import BUILT_IN, path_of, read_manifest
from treepo_mega.environment.keeper import descendants
from treepo_mega.environment.state import State

WORLDS = Path(__file__).parent / "worlds.py"
LIMITS = EnvironmentLimits(num_workers=1, timeout_s=3.0, memory_mb=1024, max_observation_chars=200)

Act = Callable[..., Reply]


def world(name: str) -> str:
    return f"{WORLDS}:{name}"


def opened(pool: EnvironmentPool, **row: object) -> State:
    state, ticket = pool.open(row, seed=1)
    reply = pool.wait()[ticket]
    assert not reply.lost, reply.error
    return state


def act(pool: EnvironmentPool, state: State, tool: str, seed: int = 7, **arguments: object) -> Reply:
    ticket = pool.act(state, [ToolCall(tool, arguments)], seed=seed)
    return pool.wait()[ticket]


@pytest.fixture(scope="module")
def counter() -> Iterator[EnvironmentPool]:
    with EnvironmentPool(world("Counter"), LIMITS) as pool:
        yield pool


@pytest.fixture(scope="module")
def hostile() -> Iterator[EnvironmentPool]:
    with EnvironmentPool(world("Hostile"), LIMITS) as pool:
        yield pool


def test_a_class_as_trl_takes_it_runs_unchanged(counter: EnvironmentPool) -> None:
    state, ticket = counter.open({"goal": 5, "prompt": "p"}, seed=1)
    assert counter.wait()[ticket].text == "Reach 5."
    turn = counter.act(state, [ToolCall("add", {"amount": 2}), ToolCall("add", {"amount": "3"})], seed=1)
    reply = counter.wait()[turn]
    assert reply.texts == ("2", "5")
    assert (reply.calls, reply.failed_calls, reply.lost) == (2, 0, False)
    grade = counter.grade(state, seed=1)
    assert counter.wait()[grade].score == 1.0


def test_branches_have_lives_of_their_own(counter: EnvironmentPool) -> None:
    state = opened(counter, goal=9)
    act(counter, state, "add", amount=4)
    copies_before = counter.counts["copies"]
    other = counter.branch(state)
    assert act(counter, other, "add", amount=1).texts == ("5",)
    assert act(counter, state, "add", amount=5).texts == ("9",)
    assert counter.counts["copies"] == copies_before + 1
    graded = [counter.grade(each, seed=1) for each in (state, other)]
    replies = counter.wait()
    assert [replies[ticket].score for ticket in graded] == [1.0, 0.0]


def test_random_numbers_depend_on_the_seed_alone(counter: EnvironmentPool) -> None:
    rolled = {seed: act(counter, opened(counter), "roll", seed=seed, sides=10**6).texts for seed in (1, 2, 3)}
    assert len(set(rolled.values())) == 3
    assert act(counter, opened(counter), "roll", seed=2, sides=10**6).texts == rolled[2]


def test_what_cannot_be_copied_is_replayed() -> None:
    with EnvironmentPool(world("OnlyReplayed"), LIMITS) as pool:
        state = opened(pool, goal=3)
        before = act(pool, state, "roll", seed=5, sides=1000).texts
        other = pool.branch(state)
        assert act(pool, other, "add", amount=1).texts == (str(int(before[0]) + 1),)
        assert (pool.counts["copies"], pool.counts["replays"]) == (0, 1)


def test_a_replay_that_differs_is_named() -> None:
    with EnvironmentPool(world("Drifting"), LIMITS) as pool:
        state = opened(pool)
        act(pool, state, "add", amount=1)
        # The worker is lost, so the state has to be rebuilt in another process.
        pool._replace(pool._workers[0], "as if it had died")  # type: ignore[arg-type]
        reply = act(pool, state, "add", amount=1)
        assert reply.lost
        assert reply.error is not None
        assert "replay differs at call 0 (add)" in reply.error


def test_states_over_the_limit_are_rebuilt() -> None:
    with EnvironmentPool(world("Counter"), EnvironmentLimits(num_workers=1, max_states=4)) as pool:
        states = [opened(pool, goal=number) for number in range(12)]
        for number, state in enumerate(states):
            assert act(pool, state, "add", amount=number).texts == (str(number),)
        assert pool.alive <= 5
        assert pool.counts["replays"] >= 8
        for number, state in enumerate(states):
            assert act(pool, state, "add", amount=1).texts == (str(number + 1),)


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("ad", {}, "there is no tool 'ad' (did you mean 'add'?)"),
        ("reset", {}, "there is no tool 'reset'"),
        ("__init__", {}, "there is no tool"),
        ("add", {}, "add: amount: Missing required argument"),
        ("add", {"amount": "many"}, "add: amount: Input should be a valid integer"),
        ("add", {"amount": 1, "more": 2}, "add: more: Unexpected keyword argument"),
        ("add", {"amount": float("nan")}, "add: amount: Input should be a finite number"),
        ("leave", {}, "leave raised SystemExit"),
        ("shout", {"megabytes": 3}, "characters left out"),
        ("half", {}, "half ?"),
        ("scribble", {}, "printed"),
        ("nothing", {}, ""),
        ("table", {}, '{"a": [1, 2], "b": "{3}"}'),
        ("call", {"host": "127.0.0.1"}, "Operation not permitted"),
        ("write", {"path": "/tmp/treepo-was-here"}, "Permission denied"),
        ("kill", {"signal": 9}, "Operation not permitted"),
    ],
)
def test_what_a_tool_does_is_an_observation(
    hostile: EnvironmentPool, tool: str, arguments: dict[str, object], said: str
) -> None:
    restarts = hostile.counts["restarts"]
    state = opened(hostile)
    ticket = hostile.act(state, [ToolCall(tool, arguments)], seed=1)
    reply = hostile.wait()[ticket]
    assert said in reply.texts[0]
    assert not reply.lost
    # The state goes on, in the same process.
    assert act(hostile, state, "add", amount=2).texts == ("2",)
    assert hostile.counts["restarts"] == restarts


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("hang", {}, "took more than 3 s"),
        ("spin", {}, "took more than 3 s"),
        ("die", {"status": 4}, "the worker died (exit status 4)"),
        ("fill", {}, "ran out of memory"),
    ],
)
def test_a_lost_worker_costs_one_call(
    hostile: EnvironmentPool, tool: str, arguments: dict[str, object], said: str
) -> None:
    neighbour, state = opened(hostile, goal=8), opened(hostile)
    act(hostile, neighbour, "add", amount=3)
    act(hostile, state, "add", amount=1)
    reply = act(hostile, state, tool, **arguments)
    assert reply.texts[0].startswith(f"Error: {tool}: ")
    assert said in reply.texts[0]
    # Both are rebuilt: the call that failed never was, and what came before is there.
    assert act(hostile, state, "add", amount=1).texts == ("2",)
    assert act(hostile, neighbour, "add", amount=5).texts == ("8",)


def test_on_error_lose_ends_the_trajectory() -> None:
    limits = EnvironmentLimits(num_workers=1, timeout_s=1.0, on_error="lose")
    with EnvironmentPool(world("Hostile"), limits) as pool:
        reply = act(pool, opened(pool), "hang")
        assert reply.lost
        assert reply.error is not None
        assert "hang: tool 'hang' took more than 1 s" in reply.error
        assert pool.counts["lost"] == 1


def test_processes_left_behind_are_ended(hostile: EnvironmentPool) -> None:
    state = opened(hostile)
    assert act(hostile, state, "children", count=10).texts == ("left",)
    worker = hostile._workers[0]
    assert worker is not None
    keeper = worker.process._process.pid
    left = descendants(keeper)
    assert len(left) >= 11
    restarts = hostile.counts["restarts"]
    # One more than the limit allows: the worker is ended with all of them.
    reply = act(hostile, state, "children", count=LIMITS.max_processes)
    assert "it left 7" in reply.texts[0]
    assert "processes behind (at most 64)" in reply.texts[0]
    assert hostile.counts["restarts"] == restarts + 1
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(_runs(pid) for pid in [keeper, *left]):
        time.sleep(0.05)
    assert not [pid for pid in [keeper, *left] if _runs(pid)]
    assert act(hostile, state, "add", amount=1).texts == ("1",)


def test_the_trainers_death_ends_everything(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = tmp_path / "trainer.py"
    script.write_text(
        "import os, signal\n"
        "from treepo_mega.environment import EnvironmentPool, ToolCall\n"
        f"pool = EnvironmentPool({world('Hostile')!r})\n"
        "state, _ = pool.open({}, seed=1)\n"
        "pool.act(state, [ToolCall('children', {'count': 3})], seed=1)\n"
        "pool.wait()\n"
        "from treepo_mega.environment.keeper import descendants\n"
        "print(*descendants(os.getpid()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=worker_environment()
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [int(word) for word in done.stdout.split()]
    assert len(left) >= 5
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(map(_runs, left)):
        time.sleep(0.1)
    assert not [pid for pid in left if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("calculater", "expected path/to/file.py:Class, or one of calculator, python, search, guess, game (did"),
        (world("Countr"), "(did you mean 'Counter'?)"),
        (str(WORLDS.with_name("world.py")) + ":Counter", "cannot read"),
        (world("NeedsArguments"), "__init__ needs size; expected no arguments"),
        (world("NoReset"), "it has no method reset(**row) (did you mean 'resett'?)"),
        (world("NoTools"), "it has no tools"),
        (world("Asynchronous"), "look is async"),
    ],
)
def test_a_class_that_cannot_serve_is_refused(name: str, said: str) -> None:
    from treepo_mega.environment.contract import import_class

    with pytest.raises(EnvironmentClassError) as caught:
        import_class(name)
    assert said in str(caught.value)


@pytest.mark.slow
def test_manifests_say_what_a_class_offers() -> None:
    manifest = read_manifest(world("Counter"))
    assert manifest.tool_names == ("add", "roll")
    assert manifest.has_reward
    assert manifest.copies_by == "deepcopy"
    assert manifest.tools[0]["function"]["parameters"]["properties"]["amount"]["type"] == "integer"
    assert read_manifest(world("OnlyReplayed")).copies_by == "replay"
    for name in BUILT_IN:
        assert read_manifest(name).tool_names
    for name, said in (("Untyped", "no type for where"), ("NoDocstring", "has no docstring")):
        with pytest.raises(EnvironmentClassError, match=said):
            read_manifest(world(name))


def test_built_in_names_are_files() -> None:
    for name in BUILT_IN:
        assert Path(path_of(name).rpartition(":")[0]).is_file()


def test_a_worker_that_cannot_start_says_why() -> None:
    with EnvironmentPool(world("NoTools"), LIMITS) as pool:
        pool.open({}, seed=1)
        with pytest.raises(EnvironmentClassError, match=r"cannot be started: environment .* has no tools"):
            pool.wait()


FUNCTIONS = """
def add(a: int, b: int = 1) -> str:
    '''Add two numbers.

    Args:
        a: One.
        b: The other.
    '''
    return str(a + b)


def untyped(a):
    '''Nothing.'''


TOOLS = [add]
TWICE = [add, add]
NONE = []
NUMBER = 3
MIXED = [add, untyped]
"""


def test_plain_functions_are_tools_without_a_state(tmp_path):
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    for name in ("add", "TOOLS"):
        manifest = read_manifest(f"{path}:{name}")
        assert manifest.tool_names == ("add",) and not manifest.has_reward and manifest.copies_by == "fork"
        parameters = manifest.tools[0]["function"]["parameters"]
        assert list(parameters["properties"]) == ["a", "b"] and parameters["required"] == ["a"]
    with EnvironmentPool(f"{path}:TOOLS", EnvironmentLimits(num_workers=1)) as pool:
        state, _ = pool.open({"anything": 1}, seed=1)
        first = pool.act(state, [ToolCall("add", {"a": "2"}), ToolCall("add", {"a": "x"})], seed=2)
        replies = pool.wait()
        assert replies[first].texts[0] == "3" and "a: Input should be a valid integer" in replies[first].texts[1]
        other = pool.act(pool.branch(state), [ToolCall("add", {"a": 2, "b": 5})], seed=3)
        assert pool.wait()[other].texts == ("7",)


@pytest.mark.parametrize(
    "name, message",
    [
        ("NUMBER", "expected a class, a function or a list of functions, found int"),
        ("TWICE", "two functions are called 'add'"),
        ("NONE", "the list of functions is empty"),
        ("MIXED", "tool untyped: no type for a"),
    ],
)
def test_what_is_no_tool_is_refused(tmp_path, name, message):
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    with pytest.raises(EnvironmentClassError, match=message):
        read_manifest(f"{path}:{name}")
