"""The pool against real misbehaviour: each hostile verifier is a user's file run in a real worker process."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.data.hostile import HOSTILE
from treepo_mega.config import RewardConfig
from treepo_mega.data.rewards import RewardItem, RewardPool, RewardResult, VerifierError
from treepo_mega.data.rewards.grader import Grader

Grade = Callable[..., RewardResult]


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("user") / "hostile.py"
    file.write_text(HOSTILE)
    return f"{file}:score"


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(RewardConfig(timeout_s=4, startup_timeout_s=60, memory_mb=512, num_workers=2)) as pool:
        yield pool


@pytest.fixture
def grade(pool: RewardPool, verifier: str) -> Grade:
    def run(text: str, truth: str = "", extra: dict | None = None) -> RewardResult:
        """One hostile item between two good ones: whatever it does, its neighbours keep their scores."""
        good = RewardItem(verifier, "x", "good", "")
        before, result, after = pool.score([good, RewardItem(verifier, "x", text, truth, extra), good])
        assert before.score == after.score == 0.5
        return result

    return run


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_good_function_with_verls_signature(grade: Grade) -> None:
    assert grade("good") == RewardResult(0.5)
    assert grade("dict") == RewardResult(1.0, None, {"acc": 1.0, "pred": "4"})
    assert grade("extra", extra={"a": {"b": 0.75}}).score == 0.75


@pytest.mark.parametrize(
    "text, reason",
    [
        ("raise", r"KeyError: 'no such thing' (hostile.py:"),
        ("nan", "returned nan; expected a finite score"),
        ("inf", "returned inf; expected a finite score"),
        ("text", "returned str; expected a float or a dict"),
        ("none", "returned NoneType; expected a float or a dict"),
        ("noscore", "a dict without 'score' (keys: points)"),
        ("nanextra", "returned nan as 'format'; expected a finite number"),
        ("sysexit", "SystemExit: 3"),
        ("recurse", "RecursionError"),
    ],
)
def test_what_raises_or_returns_nonsense_is_lost_with_the_reason(
    grade: Grade, pool: RewardPool, text: str, reason: str
) -> None:
    restarts = pool.restarts
    result = grade(text)
    assert result.score is None
    assert reason in str(result.error)
    assert pool.restarts == restarts, "the worker must survive it"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("hang", "grading took more than 4 s (2 tries)"),
        ("spin", "grading took more than 4 s (2 tries)"),
        ("exit", "the grader process died (exit code 7) (2 tries)"),
        ("memory", "MemoryError"),
        ("grow", "MemoryError"),
        ("leak", "MemoryError"),
        ("segfault", "signal SIGSEGV); it last wrote: 'about to touch address 0' (2 tries)"),
    ],
)
def test_what_hangs_or_dies_is_killed_tried_again_and_lost(
    grade: Grade, pool: RewardPool, text: str, reason: str
) -> None:
    restarts = pool.restarts
    result = grade(text)
    assert result.score is None
    assert reason in str(result.error)
    assert pool.restarts == restarts + 2


def test_a_worker_that_dies_once_costs_nothing(grade: Grade, tmp_path: Path) -> None:
    assert grade("once", str(tmp_path / "flag")) == RewardResult(1.0)


def test_prints_do_not_reach_the_protocol(grade: Grade) -> None:
    assert grade("print") == RewardResult(0.25)
    assert grade("stdin") == RewardResult(1.0)


def test_nonsense_on_the_protocols_own_pipe_ends_the_worker(grade: Grade) -> None:
    result = grade("forge", "4")  # the private copy of stdout: 0, 1, 2, requests 3, replies 4
    assert result.score is None
    assert "something that is no reply: b'this is no reply'" in str(result.error)


def test_a_hung_verifiers_children_are_killed_too(grade: Grade, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    assert grade("child", str(file)).score is None
    # It has been killed: the kernel takes a moment to end it.
    deadline = time.monotonic() + 10
    while alive(int(file.read_text())) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(int(file.read_text()))


def test_long_answers_are_cut_from_the_front_and_large_items_pass(verifier: str) -> None:
    cfg = RewardConfig(max_chars=16)
    with RewardPool(cfg) as pool:
        text = "x" * 200_000 + "0123456789abcdef"
        whole = RewardItem("exact", "x", text, "0123456789abcdef")
        assert pool.score([whole]) == [RewardResult(1.0)]
        # Larger than a pipe's buffer in both directions of the request: must not block.
        big = RewardItem(verifier, "x", "length", "y" * 1_000_000)
        assert pool.score([big]) == [RewardResult(1.0, None, {"length": 1_000_000.0})]


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{9^{9^{9^9}}}",
        r"\boxed{(10^7)!}",
        "\\boxed{" * 28_000,
        "\\boxed{" * 14_000 + "}" * 14_000,
        "{" * 200_000,
        "1" * 200_000,
        "\\boxed{" + "(" * 3_000 + "1" + ")" * 3_000 + "}",
        "\ud800\x00\u202e" * 60_000,
        "1,234" * 40_000,
    ],
    ids=["tower", "factorial", "unclosed", "nested", "braces", "digits", "brackets", "surrogates", "commas"],
)
def test_hostile_answers_cost_a_bounded_time_in_every_built_in(text: str) -> None:
    with RewardPool(RewardConfig(timeout_s=20, max_chars=200_000)) as pool:
        names = ["boxed", "last_number", "exact", "math"]
        results = pool.score([RewardItem(name, "x", text, "42") for name in names])
    assert [r.score for r in results[:3]] == [0.0, 0.0, 0.0]
    assert results[3].score in (0.0, None)
    assert results[3].score is not None or results[3].error


def test_results_keep_the_order_of_the_items_with_several_workers() -> None:
    with RewardPool(RewardConfig(num_workers=3)) as pool:
        items = [RewardItem("exact", "x", str(i % 7), str(i % 5)) for i in range(200)]
        assert [r.score for r in pool.score(items)] == [float(i % 7 == i % 5) for i in range(200)]
        assert pool.score([]) == []


def test_a_verifier_that_cannot_be_loaded_stops_the_run(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import no_such_module_here\ndef score(**kw):\n    return 1.0\n")
    with RewardPool(RewardConfig()) as pool:
        with pytest.raises(VerifierError, match="cannot be loaded: ModuleNotFoundError: No module named 'no_such"):
            pool.score([RewardItem(f"{file}:score", "x", "a", "b")])
        with pytest.raises(VerifierError, match="did you mean 'exact'"):
            pool.score([RewardItem("exakt", "x", "a", "b")])
        # The pool is still of use after a refused call.
        assert pool.score([RewardItem("exact", "x", "a", "a")]) == [RewardResult(1.0)]


def test_an_import_that_hangs_stops_the_run_after_its_own_deadline(tmp_path: Path) -> None:
    file = tmp_path / "slow.py"
    file.write_text("import time\ntime.sleep(1000)\ndef score(**kw):\n    return 1.0\n")
    with (
        RewardPool(RewardConfig(startup_timeout_s=1.0)) as pool,
        pytest.raises(VerifierError, match=r"cannot be loaded \(2 tries\): starting up .* took more than 1 s"),
    ):
        pool.score([RewardItem(f"{file}:score", "x", "a", "b")])


def test_all_workers_import_beforehand_and_the_first_grading_waits_for_none(tmp_path: Path) -> None:
    file, log = tmp_path / "slow.py", tmp_path / "imports"
    file.write_text(
        f"import os, time\ntime.sleep(0.3)\nopen({str(log)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        "def score(**kw):\n    return 0.5\n"
    )
    said: list[str] = []
    with RewardPool(RewardConfig(num_workers=2)) as pool:
        pool.warm([f"{file}:score", "exact"])
        assert not log.exists(), "it does not wait"
        pool.finish_warming(said.append)
        imported = log.read_text()
        assert len(set(imported.split())) == len(imported.split()) == 2, "each worker, once"
        assert said == [
            f"waiting for reward workers to import {file}:score, exact, each at most 120 s (reward.startup_timeout_s)"
        ]
        assert pool.score([RewardItem(f"{file}:score", "x", "a", "b")] * 8) == [RewardResult(0.5)] * 8
        assert log.read_text() == imported
        assert pool.take_tally() == {"total": 8, "lost": {}, "reasons": {}}, "imports are no gradings"
        pool.warm([f"{file}:score"])
        pool.finish_warming(said.append)
        assert pool.poll() == {}


def test_what_cannot_be_imported_beforehand_stops_the_run(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import no_such_module_here\ndef score(**kw):\n    return 1.0\n")
    with RewardPool(RewardConfig()) as pool:
        pool.warm([f"{file}:score"])
        with pytest.raises(VerifierError, match="cannot be loaded: ModuleNotFoundError: No module named 'no_such"):
            pool.finish_warming(print)


def test_a_user_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("VALUE = 0.125\n")
    file = tmp_path / "mine.py"
    file.write_text("from neighbour import VALUE\ndef score(**kw):\n    return VALUE\n")
    with RewardPool(RewardConfig()) as pool:
        assert pool.score([RewardItem(f"{file}:score", "x", "a", "b")]) == [RewardResult(0.125)]


def test_extra_info_that_is_not_json_is_named(verifier: str) -> None:
    with RewardPool(RewardConfig()) as pool, pytest.raises(ValueError, match=r"reward item 0 \(src\): not JSON"):
        pool.score([RewardItem(verifier, "src", "good", "", {"a": object()})])


def test_close_leaves_no_process_and_scoring_after_it_is_refused(verifier: str) -> None:
    pool = RewardPool(RewardConfig(num_workers=2))
    pids = {int(r.score or 0) for r in pool.score([RewardItem(verifier, "x", "pid", "")] * 8)}
    assert pids
    assert all(alive(pid) for pid in pids)
    pool.close()
    pool.close()
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="after close"):
        pool.score([])


@pytest.mark.parametrize("hung", [False, True], ids=["idle", "hung"])
def test_workers_do_not_outlive_a_trainer_that_is_killed(tmp_path: Path, verifier: str, hung: bool) -> None:
    code = textwrap.dedent(f"""
        from treepo_mega.config import RewardConfig
        from treepo_mega.data.rewards import RewardItem, RewardPool
        pool = RewardPool(RewardConfig(timeout_s=600))
        print(int(pool.score([RewardItem({verifier!r}, "x", "pid", "")])[0].score), flush=True)
        if {hung}:
            pool.score([RewardItem({verifier!r}, "x", "hang", "")])
        input()
    """)
    trainer = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())
    assert alive(worker)
    trainer.send_signal(signal.SIGKILL)
    trainer.communicate(timeout=30)
    deadline = time.monotonic() + 30
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(worker)


def test_signals_to_the_whole_job_do_not_end_a_worker(verifier: str) -> None:
    with RewardPool(RewardConfig()) as pool:
        pid = int(pool.score([RewardItem(verifier, "x", "pid", "")])[0].score or 0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, number)
        assert pool.score([RewardItem(verifier, "x", "pid", "")])[0].score == pid
        assert pool.restarts == 0


def test_code_that_holds_the_interpreter_lock_is_ended_by_the_kernel_without_its_trainer(verifier: str) -> None:
    command = [sys.executable, "-m", "treepo_mega.data.rewards.worker", "--memory-mb=1024", "--timeout-s=0.1"]
    worker = subprocess.Popen(
        [*command, "--startup-timeout-s=60", f"--parent={os.getpid()}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    fields = {"data_source": "x", "solution_str": "spin", "ground_truth": "", "extra_info": None}
    worker.communicate(json.dumps({"id": 1, "verifier": verifier, **fields}).encode() + b"\n", timeout=120)
    assert worker.returncode == -signal.SIGPROF


def test_a_pool_works_inside_a_rank_with_torch_and_gloo(tmp_path: Path, verifier: str) -> None:
    code = textwrap.dedent(f"""
        import torch, torch.distributed as dist
        from treepo_mega.config import RewardConfig
        from treepo_mega.data.rewards import RewardItem, RewardPool
        dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
        with RewardPool(RewardConfig(timeout_s=1)) as pool:
            items = [RewardItem({verifier!r}, "x", text, "") for text in ("good", "exit", "hang", "good")]
            scores = [r.score for r in pool.score(items)]
        total = torch.tensor([sum(s for s in scores if s is not None)])
        dist.all_reduce(total)
        print(scores, total.item())
        dist.destroy_process_group()
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[0.5, None, None, 0.5] 1.0", done.stderr


def test_a_worker_killed_between_two_calls_is_replaced(verifier: str) -> None:
    with RewardPool(RewardConfig()) as pool:
        pid = int(pool.score([RewardItem(verifier, "x", "pid", "")])[0].score or 0)
        os.kill(pid, signal.SIGKILL)
        assert pool.score([RewardItem(verifier, "x", "length", "y" * 300_000)])[0].score == 1.0
        assert pool.restarts == 1


def test_in_a_batch_only_the_item_that_hangs_or_dies_is_lost(verifier: str, tmp_path: Path) -> None:
    """One worker, so that all items stand in common batches with the hostile ones."""
    texts = ["good"] * 40
    hostile = {3: "exit", 4: "exit", 9: "hang", 15: "raise", 20: "leak", 39: "exit"}
    for place, text in hostile.items():
        texts[place] = text
    with RewardPool(RewardConfig(timeout_s=2, startup_timeout_s=60, memory_mb=512, num_workers=1)) as pool:
        results = pool.score([RewardItem(verifier, "x", text, "") for text in texts])
        assert pool.restarts == 2 * 5, "two tries for each that kills its worker; raising kills none"
    assert [i for i, r in enumerate(results) if r.score is None] == sorted(hostile)
    assert {r.score for i, r in enumerate(results) if i not in hostile} == {0.5}


def test_the_deadline_is_the_items_not_the_batchs(tmp_path: Path) -> None:
    file = tmp_path / "steady.py"
    file.write_text("import time\ndef score(**kw):\n    time.sleep(0.2)\n    return 1.0\n")
    with RewardPool(RewardConfig(timeout_s=1.5, num_workers=1)) as pool:
        results = pool.score([RewardItem(f"{file}:score", "x", "a", "b")] * 16)  # 3.2 s, half of it in one batch
        assert [r.score for r in results] == [1.0] * 16
        assert pool.restarts == 0


def test_many_items_share_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    give = Grader.give

    def counted(self, batch, message):
        sizes.append(len(batch))
        give(self, batch, message)

    monkeypatch.setattr(Grader, "give", counted)
    with RewardPool(RewardConfig(num_workers=1)) as pool:
        results = pool.score([RewardItem("exact", "x", str(i), "7") for i in range(512)])
    assert [i for i, r in enumerate(results) if r.score == 1.0] == [7]
    assert sum(sizes) == 512
    assert max(sizes) == 64
    assert len(sizes) <= 20, "messages for 512 items"


def polled(pool: RewardPool, tickets: list[int], seconds: float = 60) -> dict[int, RewardResult]:
    """Results of all `tickets`, by polling alone."""
    got: dict[int, RewardResult] = {}
    deadline = time.monotonic() + seconds
    while len(got) < len(tickets) and time.monotonic() < deadline:
        got |= pool.poll()
        time.sleep(0.005)
    assert sorted(got) == sorted(tickets), "each has one result, and no other ticket has any"
    return got


def test_what_is_submitted_ends_as_by_score_hanging_and_dying_ones_too(pool: RewardPool, verifier: str) -> None:
    texts = ["good", "hang", "dict", "exit", "raise", "good", "length"]
    items = [RewardItem(verifier, "x", text, "y" * 300_000) for text in texts]
    restarts = pool.restarts
    pool.take_tally()
    tickets = pool.submit(items[:3]) + pool.submit(items[3:])
    # Another call in between takes its own results and no others.
    assert [r.score for r in pool.score([RewardItem(verifier, "x", "good", "")] * 3)] == [0.5] * 3
    got = polled(pool, tickets)
    assert pool.restarts == restarts + 4, "both hostile ones were tried twice"
    assert [got[ticket].score for ticket in tickets] == [0.5, None, 1.0, None, None, 0.5, 1.0]
    assert "grading took more than 4 s (2 tries)" in str(got[tickets[1]].error)
    tally = pool.take_tally()
    assert (tally["total"], tally["lost"]) == (10, {verifier: 3})
    assert "grading took more than 4 s" in tally["reasons"][verifier], "of the first item, not of the first end"


def test_a_poll_with_nothing_in_flight_asks_the_system_nothing(
    pool: RewardPool, verifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ticket,) = pool.submit([RewardItem(verifier, "x", "good", "")])
    assert pool.wait() == {ticket: RewardResult(0.5)}
    monkeypatch.setattr("selectors.PollSelector", None)
    assert pool.poll() == pool.wait() == {}


def test_an_answer_that_is_there_beats_a_deadline_that_passed_unseen(pool: RewardPool, verifier: str) -> None:
    restarts = pool.restarts
    (ticket,) = pool.submit([RewardItem(verifier, "x", "good", "")])
    (worker,) = [each for each in pool._workers if each.batch]
    while verifier not in worker.imported:
        pool._move(block=True)
    if worker.batch:
        assert select.select([worker.replies], [], [], 60)[0]
    worker.deadline = 0.0
    assert pool.poll() == {ticket: RewardResult(0.5)}
    assert pool.restarts == restarts


def test_a_pool_is_of_use_after_what_was_submitted_is_abandoned_or_refused(
    pool: RewardPool, verifier: str, tmp_path: Path
) -> None:
    good = RewardItem(verifier, "x", "good", "")
    pool.submit([RewardItem(verifier, "x", "hang", "")] * 3)
    pids = [worker.process.pid for worker in pool._workers]
    pool.abandon()
    assert pids and not any(alive(pid) for pid in pids)
    with pytest.raises(VerifierError, match="did you mean 'exact'"):
        pool.submit([good, RewardItem("exakt", "x", "a", "b")])
    with pytest.raises(ValueError, match=r"reward item 1 \(x\): not JSON"):
        pool.submit([good, RewardItem(verifier, "x", "good", "", {"a": object()})])
    assert pool.wait() == {}, "nothing of a refused call is in flight"
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module_here\ndef score(**kw):\n    return 1.0\n")
    pool.submit([good, RewardItem(f"{broken}:score", "x", "a", "b")])
    with pytest.raises(VerifierError, match="cannot be loaded: ModuleNotFoundError"):
        pool.wait()
    assert pool.wait() == {}
    assert pool.score([good]) == [RewardResult(0.5)]


def test_math_truths_are_read_by_math_verify_in_a_worker() -> None:
    with RewardPool(RewardConfig()) as pool:
        reasons = pool.check_math_truths(["x^2+1", "}{", "\\frac{1}{2}"])
    assert reasons[0] is None
    assert reasons[2] is None
    assert "cannot be parsed" in str(reasons[1])
