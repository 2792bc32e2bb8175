"""metrics.jsonl: one line a step, through restarts, torn lines and values that are not numbers."""

import ast
import json
import math
import re
from pathlib import Path

import pytest

from treepo_mega.monitor.metrics import METRICS, MetricsError, MetricsLogger, check_known, read_metrics
from treepo_mega.monitor.registry import known_names


def log_steps(run, steps, **kwargs):
    with MetricsLogger(run, tensorboard=False, **kwargs) as logger:
        for step in steps:
            logger.log(step, {"train/loss": step / 10, "tree/leaves": step})


def test_one_line_a_step_flushed_before_log_returns(tmp_path):
    logger = MetricsLogger(tmp_path, tensorboard=False)
    logger.log(1, {"train/loss": 0.5, "tree/leaves": 8})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line.endswith("\n") and line.count("\n") == 1
    row = json.loads(line)
    assert row.pop("time") > 0
    assert row == {"step": 1, "train/loss": 0.5, "tree/leaves": 8}
    logger.close()
    logger.close()


def test_numpy_and_torch_scalars_become_numbers(tmp_path):
    import numpy as np
    import torch

    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log(0, {"train/loss": torch.tensor(0.25), "grad-norm": np.float32(2.0)})
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert row["train/loss"] == 0.25
    assert row["grad-norm"] == 2.0


def test_a_step_logged_in_parts_has_one_line(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log(0, {"train/loss": 1.0})
        logger.log(1, {"train/loss": 2.0})
        logger.log(1, {"eval/accuracy": 0.5, "train/loss": 3.0})
        logger.log(2, {"train/loss": 4.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert (rows[1]["train/loss"], rows[1]["eval/accuracy"]) == (3.0, 0.5)


def test_a_part_may_be_added_after_a_resume(tmp_path):
    log_steps(tmp_path, range(3))
    with MetricsLogger(tmp_path, tensorboard=False, resume_step=1) as logger:
        logger.log(1, {"eval/accuracy": 0.5})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1]
    assert (rows[1]["train/loss"], rows[1]["eval/accuracy"]) == (0.1, 0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_null_and_counted(tmp_path, value):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log(3, {"train/loss": value, "grad-norm": value, "tree/leaves": 1})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["train/loss"] is None
    assert row["train/nonfinite_metrics"] == 2


def test_resume_keeps_each_step_once(tmp_path):
    log_steps(tmp_path, range(6))
    log_steps(tmp_path, range(3, 8), resume_step=2)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(8))
    assert not list(tmp_path.glob("*.tmp"))


def test_resume_drops_a_torn_last_line(tmp_path):
    log_steps(tmp_path, range(3))
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 3, "train/lo')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl:4.*torn"):
        log_steps(tmp_path, [3], resume_step=2)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_resume_without_a_file_starts_one(tmp_path):
    log_steps(tmp_path / "new", [5], resume_step=4)
    assert [r["step"] for r in read_metrics(tmp_path / "new" / "metrics.jsonl")] == [5]


def test_a_new_run_sets_the_old_file_aside(tmp_path):
    for first in (0, 10, 20):
        log_steps(tmp_path, [first])
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["step"] == 20
    assert read_metrics(tmp_path / "metrics.1.jsonl")[0]["step"] == 0
    assert read_metrics(tmp_path / "metrics.2.jsonl")[0]["step"] == 10


def test_steps_must_ascend_and_reserved_names_are_refused(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log(4, {"train/loss": 1.0})
        with pytest.raises(ValueError, match="step 3 logged after step 4"):
            logger.log(3, {"train/loss": 1.0})
        with pytest.raises(ValueError, match="'step' is reserved"):
            logger.log(5, {"step": 1.0})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", 'expected an object with an integer "step"'),
        ('{"step": "1"}', 'expected an object with an integer "step"'),
        ('{"step": 1, "train/loss": "high"}', "'train/loss' is 'high'"),
        ('{"step": 0}', "step 0 comes after step 0"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n' + line + '\n{"step": 9}\n')
    with pytest.raises(MetricsError, match=r"metrics\.jsonl:2: ") as error:
        read_metrics(path)
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MetricsError, match="cannot read the metrics"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_tensorboard_holds_the_same_numbers_and_hides_what_a_resume_dropped(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, resume in ((range(5), None), (range(3, 6), 2)):
        with MetricsLogger(tmp_path, tensorboard=True, resume_step=resume) as logger:
            for step in steps:
                logger.log(step, {"train/loss": step + (100 if resume else 0), "grad-norm": math.nan})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert "grad-norm" not in events.Tags()["scalars"]
    scalars = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert scalars == [(r["step"], r["train/loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert scalars == [(0, 0), (1, 1), (2, 2), (3, 103), (4, 104), (5, 105)]


def test_every_metric_is_documented_once():
    names = [name for metric in METRICS for name in metric.names()]
    assert len(names) == len(set(names))
    assert all(m.unit and m.healthy and m.meaning for m in METRICS)
    folders = {name.rsplit("/", i)[0] for name in names for i in range(1, name.count("/") + 1)}
    assert not folders & set(names), "a name may not be both a metric and a folder"


def test_known_names():
    assert check_known("tree/stop_answer").unit == "count"
    assert check_known("timing_s/update").unit == "s"
    assert {"learning-rate", "grad-norm", "eval/pass_at_n"} <= set(known_names())
    with pytest.raises(KeyError, match=r"did you mean 'rollout/reward_mean'\?"):
        check_known("rollout/rewards_mean")


def test_every_metric_the_code_spells_out_is_documented():
    pattern = re.compile(r"(train|rollout|tree|reward|reshard|perf|timing_s|cpu_s|eval|gpu|host|logging)/[a-z0-9_]+")
    package = Path(__file__).parents[2] / "treepo_mega"
    spelled = set()
    for path in package.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        # The fixed part of an f-string is no name by itself.
        parts = {id(v) for n in nodes if isinstance(n, ast.JoinedStr) for v in n.values}
        words = [n.value for n in nodes if isinstance(n, ast.Constant) and id(n) not in parts]
        spelled |= {(path.name, w) for w in words if isinstance(w, str) and pattern.fullmatch(w)}
    assert len(spelled) > 30
    known = known_names()

    def documented(name: str) -> bool:
        # A gauge of the telemetry is a stem: its metrics are its mean and its maximum over a step.
        return name in known or {f"{name}_mean", f"{name}_max"} <= known.keys()

    undocumented = sorted((file, name) for file, name in spelled if not documented(name))
    assert not undocumented
