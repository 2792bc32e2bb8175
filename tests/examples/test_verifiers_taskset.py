"""examples/python/verifiers_taskset.py: rows of a taskset train, and its own rewards score the answers.

With a stand-in of `verifiers`, which cannot be installed beside the engine. VERIFIERS_PYTHON=path/to/python names one
that has the real package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from treepo_mega.config import RewardConfig
from treepo_mega.data.rewards import RewardItem, RewardPool

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "examples" / "python" / "verifiers_taskset.py"
TASKSETS = HERE / "tasksets.py"


def command(*args: str) -> tuple[list[str], dict[str, str]]:
    """The command line, and the environment it runs in."""
    real = os.environ.get("VERIFIERS_PYTHON")
    path = {} if real else {"PYTHONPATH": str(HERE / "stand_in")}
    return [real or sys.executable, str(SCRIPT), *args], {**os.environ, "PYTHONPATH": "", **path}


def run(*args: str) -> subprocess.CompletedProcess[str]:
    line, environment = command(*args)
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)


@contextmanager
def serving(*args: str) -> Iterator[str]:
    """A server; yields its URL."""
    line, environment = command("serve", *args, "--port", "0")
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def test_rows_train_and_the_tasks_own_rewards_score(tmp_path):
    out = tmp_path / "rows.jsonl"
    made = run("rows", f"{TASKSETS}:Sums", "--config", '{"most": 4}', "--out", str(out))
    assert made.returncode == 0, made.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 4
    assert rows[2]["messages"] == [
        {"role": "system", "content": "Only the number."},
        {"role": "user", "content": "2 + 1 ="},
    ]
    with serving(f"{TASKSETS}:Sums") as url:
        row = rows[2]

        def item(answer: str, truth: str) -> RewardItem:
            return RewardItem("http:sums", row["data_source"], answer, truth, row["extra_info"], None, "2 + 1 =")

        answers = [
            item("It is 3", row["answer"]),
            item("I am sure that it is 3", row["answer"]),
            item("4", row["answer"]),
        ]
        with RewardPool(RewardConfig.model_validate({"servers": [{"name": "sums", "url": url}]})) as pool:
            short, long, wrong = pool.score(answers)
            assert (short.score, long.score, wrong.score) == (2.5, 2.0, 0.5)
            assert short.extra == {"right": 1.0, "short": 1.0, "letters": 7.0}
            (other,) = pool.score([item("3", rows[1]["answer"])])
            assert other.score is None and "the task is" in str(other.error)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("Files",), "FileTask needs a runtime for written and a runtime for setup: it cannot be scored by one answer"),
        (("Endless",), "the taskset has no end: say how many tasks to take with --limit"),
        (("Sums", "--config", '{"least": 1}'), "least"),
        (("Other",), "AttributeError"),
    ],
)
def test_what_one_answer_cannot_score_is_refused(tmp_path, args, said):
    made = run("rows", f"{TASKSETS}:{args[0]}", *args[1:], "--out", str(tmp_path / "rows.jsonl"))
    assert made.returncode == 1 and said in made.stderr
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_python_without_verifiers_is_told_what_it_needs(tmp_path):
    line, environment = command("rows", "any", "--out", str(tmp_path / "rows.jsonl"))
    line[0] = sys.executable
    made = subprocess.run(line, env={**environment, "PYTHONPATH": ""}, capture_output=True, text=True, check=False)
    assert made.returncode == 1 and "pip install 'verifiers>=0.4'" in made.stderr
