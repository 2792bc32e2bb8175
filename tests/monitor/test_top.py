"""`treepo-mega top` on runs in every state, from files alone; and the status files that ranks write."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from treepo_mega.cli import main
from treepo_mega.monitor.live import FAULTS, LEAST_SILENCE_S, TopError, look
from treepo_mega.monitor.metrics import MetricsLogger
from treepo_mega.monitor.registry import check_known
from treepo_mega.monitor.status import BEAT, Status, status_path
from treepo_mega.monitor.timers import Timers
from treepo_mega.monitor.top import CURVES, picture

NOW = 1_800_000_000.0


def write_status(run: Path, rank: int, *, world: int = 2, age: float = 1.0, **changes) -> None:
    told = {"rank": rank, "world": world, "host": f"node{rank // 8}", "pid": 1, "interval_s": 1.0, "state": "running"}
    told |= {"phase": "update", "since": NOW - 65, "step": 3, "of": 40, "time": NOW - age}
    path = status_path(run, rank)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(told | changes))


def write_rows(run: Path, steps: int, **extra) -> None:
    with MetricsLogger(run, tensorboard=False) as logger:
        for step in range(1, steps + 1):
            logger.log(step, {"rollout/accuracy_policy": step / 8, "perf/step_s": 2.0, **extra})


def drawn(run: Path) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(picture(look(run, NOW), NOW))
    return console.file.getvalue()


def test_a_running_run(tmp_path):
    write_rows(tmp_path, 5)
    for rank in range(2):
        write_status(tmp_path, rank)
    seen = look(tmp_path, NOW)
    assert (seen.alive, seen.verdict, seen.step, seen.of) == (True, "running", 3, 40)
    text = drawn(tmp_path)
    assert "running  step 3 of 40" in text and "faults: none" in text
    assert "▁▃▅▆█" in text.replace(" ", "") and "accuracy" in text
    assert text.count("update") == 2 and "65 s" in text


def test_one_rank_that_is_silent_is_a_fault_and_all_of_them_are_a_death(tmp_path):
    write_status(tmp_path, 0)
    write_status(tmp_path, 1, age=LEAST_SILENCE_S + 3 * BEAT + 90, phase="rollout")
    seen = look(tmp_path, NOW)
    assert seen.alive
    (fault,) = seen.faults
    assert fault == "rank 1 on node0 gives no sign of life since 2 min, in rollout"
    write_status(tmp_path, 0, age=600)
    seen = look(tmp_path, NOW)
    assert not seen.alive and seen.faults == []
    assert seen.verdict.startswith("dead: no sign of life since 2 min; rank 1 on node0 was in rollout")


def test_a_rank_that_stands_still_is_a_fault_and_one_that_waits_is_not(tmp_path):
    write_status(tmp_path, 0, progress=NOW - 300, waits_for="generation")
    write_status(tmp_path, 1, progress=NOW - 300, phase="rollout")
    assert look(tmp_path, NOW).faults == ["rank 1 on node0 stands still for 5 min, in rollout"]
    assert "generation" in drawn(tmp_path)


def test_how_a_run_ended(tmp_path):
    write_status(tmp_path, 0, state="finished", age=7300)
    write_status(tmp_path, 1, state="finished", age=7310)
    assert look(tmp_path, NOW).verdict == "finished 2 h 1 min ago"
    write_status(tmp_path, 1, state="failed with TrainingDiverged", age=50)
    assert look(tmp_path, NOW).verdict == "dead: rank 1 on node0 failed with TrainingDiverged, 50 s ago"


def test_an_empty_run_and_none(tmp_path):
    (tmp_path / "demo").mkdir()
    assert look(tmp_path / "demo", NOW).verdict.startswith("empty: neither metrics nor signs of life")
    assert "nothing is known yet" in drawn(tmp_path / "demo")
    with pytest.raises(TopError, match=r"dem0: no such run directory \(did you mean 'demo'\?\)"):
        look(tmp_path / "dem0", NOW)


def test_a_run_without_status_files_is_judged_by_its_lines(tmp_path):
    write_rows(tmp_path, 4)
    assert look(tmp_path, NOW).verdict.startswith("not known: its last line is ")
    (tmp_path / "config.yaml").write_text("train: {num_rollouts: 4}\n")
    assert look(tmp_path, NOW).verdict.startswith("finished: all 4 steps are there")


def test_damaged_files_are_told_and_the_rest_is_shown(tmp_path):
    write_rows(tmp_path, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    write_status(tmp_path, 0, world=1)
    status_path(tmp_path, 3).write_text("{")
    seen = look(tmp_path, NOW)
    assert len(seen.rows) == 3 and seen.verdict == "running"
    assert sorted(seen.notes) == [
        "metrics.jsonl: the last line is torn and was left out",
        "rank_3.json: cannot be read and was left out",
    ]


def test_faults_are_counted_over_the_steps(tmp_path):
    write_rows(tmp_path, 3, **{"reward/lost": 2, "train/skipped_steps": 0})
    (fault,) = look(tmp_path, NOW).faults
    assert fault == "reward/lost: 6 gradings lost to a timeout or crash, last at step 3"
    for name in [*(name for name, _, _ in FAULTS), *(name for name, _ in CURVES)]:
        check_known(name)


def test_many_ranks_have_a_line_for_each_host(tmp_path):
    for rank in range(20):
        write_status(tmp_path, rank, world=24, phase="update" if rank % 2 else "rollout")
    text = drawn(tmp_path)
    assert "node0" in text and "4 x rollout, 4 x update" in text and "node2" in text
    assert "4 of 24 ranks have no status file here, such as rank 20" in text


def test_a_long_file_is_read_from_its_end(tmp_path, monkeypatch):
    write_rows(tmp_path, 200)
    monkeypatch.setattr("treepo_mega.monitor.live.TAIL_BYTES", 1000)
    seen = look(tmp_path, NOW)
    assert 1 < len(seen.rows) < 20 and seen.rows[-1]["step"] == 200 and seen.notes == []


def test_what_a_rank_writes_is_what_top_reads(tmp_path):
    status = Status(tmp_path, rank=0, world=1, interval_s=0.01)
    timers = Timers()
    timers.watchers.append(status.phase)
    path = status_path(tmp_path, 0)
    assert json.loads(path.read_text())["phase"] == "start-up"
    status.step(7, 9)
    with timers("step"), timers("rollout"):
        while json.loads(path.read_text())["phase"] != "rollout":
            pass
        first = json.loads(path.read_text())["time"]
        # A sign of life comes although nothing changes.
        while json.loads(path.read_text())["time"] == first:
            pass
    status.close("finished")
    seen = look(tmp_path, first + 60)
    assert seen.verdict.startswith("finished") and (seen.step, seen.of) == (7, 9)
    assert list(tmp_path.glob("status/.*")) == []


def test_off_means_no_file(tmp_path):
    status = Status(tmp_path, rank=0, world=1, interval_s=0)
    status.phase("rollout")
    status.close("finished")
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_one_picture(tmp_path, capsys):
    write_rows(tmp_path, 3)
    assert main(["top", str(tmp_path), "--once"]) == 0
    shown = capsys.readouterr().out
    assert tmp_path.name in shown and "not known" in shown
    assert main(["top", str(tmp_path / "nothing"), "--once"]) == 2
    assert main(["top", str(tmp_path), "--interval", "0"]) == 2
