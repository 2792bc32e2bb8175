"""Sinks: trackers in their offline modes hold what metrics.jsonl holds; one that fails is said once and stops nothing.

A tracker's test is skipped where its library is not installed. wandb's is always run: [test] has it.
"""

from __future__ import annotations

import json
import math
import sqlite3
import struct
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from treepo_mega.config import ConfigError, load_config
from treepo_mega.monitor.metrics import MetricsLogger, read_metrics
from treepo_mega.monitor.sinks import BUILT_IN, Run, SinkError, Sinks, base, check_sinks, flat, open_sink

STEPS = {
    1: {"train/loss": 0.5, "grad-norm": 1.25, "tree/leaves": 8},
    2: {"train/loss": -0.25, "grad-norm": math.inf, "tree/leaves": 8},
    3: {"train/loss": 0.125, "eval/accuracy": 0.75},
}
CONFIG = {"train.lr": 1e-6, "data.train": "a.jsonl"}


def run_in(directory: Path, **changes) -> Run:
    settings = {"project": "trees", "name": "first", "identity": "0123456789ab", "resumed": False, "offline": True}
    return Run(directory, **(settings | {"config": CONFIG} | changes))


def recorded(directory: Path, name: str) -> dict[int, dict[str, float]]:
    """Log STEPS into metrics.jsonl and into the sink, which must not fail; what the file holds, without None."""
    said: list[str] = []
    sinks = Sinks([(name, open_sink(name, run_in(directory)))], say=said.append)
    with MetricsLogger(directory, tensorboard=False, sinks=[sinks]) as logger:
        for step, metrics in STEPS.items():
            logger.log(step, metrics)
    sinks.close()
    assert said == [] and sinks.take_failures() == 0
    rows = read_metrics(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(STEPS)
    return {
        row["step"]: {key: value for key, value in row.items() if key not in ("step", "time") and value is not None}
        for row in rows
    }


def test_trackio_holds_the_same_numbers(tmp_path, monkeypatch):
    # Before the import, which reads it once.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="pip install 'treepo-mega[trackio]'")
    expected = recorded(tmp_path, "trackio")
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        found = {step: json.loads(text) for step, text in connection.execute("select step, metrics from metrics")}
        (config,) = connection.execute("select config from configs").fetchone()
    assert found == expected
    assert json.loads(config)["train.lr"] == 1e-6


def test_mlflow_holds_the_same_numbers_and_a_resume_goes_on_with_the_run(tmp_path, monkeypatch):
    client_of = pytest.importorskip("mlflow.tracking", reason="pip install 'treepo-mega[mlflow]'").MlflowClient
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    expected = recorded(tmp_path, "mlflow")
    again = open_sink("mlflow", run_in(tmp_path, resumed=True))
    again.start()
    again.log(4, {"train/loss": 0.0625})
    again.close()
    client = client_of(tracking_uri=f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("trees").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "first" and run.data.params["train.lr"] == "1e-06"
    found: dict[int, dict[str, float]] = {step: {} for step in [*expected, 4]}
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            found[point.step][name] = point.value
    assert found == expected | {4: {"train/loss": 0.0625}}


def test_wandb_holds_the_same_numbers(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install 'treepo-mega[wandb]'")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    expected = recorded(tmp_path, "wandb")
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found: dict[int, dict[str, float]] = {}
    for data in records_of(path):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "run":
            assert (record.run.project, record.run.display_name, record.run.run_id) == (
                "trees",
                "first",
                "0123456789ab",
            )
        if record.WhichOneof("record_type") != "history":
            continue
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        found[record.history.step.num] = {name: value for name, value in items.items() if not name.startswith("_")}
    assert found == expected


def records_of(path: Path) -> Iterator[bytes]:
    """Whole records of LevelDB's log format, which wandb's offline files are in after their header of 7 bytes."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, block, whole = 7, 32768, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        # 1: whole, 2: first, 3: middle, 4: last part of a record.
        if kind in (1, 4):
            yield whole
            whole = b""


def test_swanlab_holds_the_same_numbers(tmp_path, monkeypatch):
    pytest.importorskip("swanlab", reason="pip install 'treepo-mega[swanlab]'")
    store = pytest.importorskip("swanlab.sdk.internal.core_python.store")
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    expected = recorded(tmp_path, "swanlab")
    (path,) = tmp_path.glob("swanlab/run-*/run-*.swanlab")
    reader = store.DataStoreReader()
    reader.open(path)
    found: dict[int, dict[str, float]] = {}
    for data in reader:
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "scalar":
            found.setdefault(record.scalar.step, {})[record.scalar.key] = record.scalar.value.number
    reader.close()
    assert found == expected


def test_prometheus_shows_the_newest_numbers_in_its_text_format(tmp_path):
    sink = open_sink("prometheus", run_in(tmp_path))
    sinks = Sinks([("prometheus", sink)], strict=True)
    for step, metrics in STEPS.items():
        sinks(step, {name: value if math.isfinite(value) else None for name, value in metrics.items()})
    with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        lines = answer.read().decode().splitlines()
    assert 'treepo_train_loss{run="first"} 0.125' in lines
    assert 'treepo_grad_norm{run="first"} NaN' in lines, "the newest one was not finite"
    assert 'treepo_tree_leaves{run="first"} 8.0' in lines, "an older step had it last"
    assert 'treepo_step{run="first"} 3.0' in lines
    assert "# TYPE treepo_train_loss gauge" in lines
    assert any(line.startswith("# HELP treepo_train_loss policy loss plus KL") for line in lines)
    taken = run_in(tmp_path, port=sink.port)
    with pytest.raises(SinkError, match=rf"logging\.prometheus_port {sink.port} on .* cannot be opened"):
        open_sink("prometheus", taken)
    sinks.close()
    open_sink("prometheus", taken).close()


class Broken:
    """Fails at the steps of `at`; what else it gets is kept."""

    def __init__(self, at: set[int], *, hangs: threading.Event | None = None) -> None:
        self.at = at
        self.hangs = hangs
        self.got: list[int] = []
        self.closed = False

    def start(self) -> None:
        if self.hangs is not None:
            self.hangs.wait(60)

    def log(self, step: int, metrics: object) -> None:
        if step in self.at:
            raise ConnectionError("the tracker is down")
        self.got.append(step)

    def close(self) -> None:
        self.closed = True


def test_a_sink_that_fails_is_said_once_counted_and_stops_nothing():
    said: list[str] = []
    sink, other = Broken({2, 3}), Broken(set())
    sinks = Sinks([("wandb", sink), ("mlflow", other)], [("mine.py:f", Broken({4}).log)], say=said.append)
    for step in range(1, 6):
        sinks(step, {"train/loss": 1.0})
    sinks.close()
    assert sink.got == [1, 4, 5] and other.got == [1, 2, 3, 4, 5] and sink.closed and other.closed
    assert sinks.take_failures() == 3 and sinks.take_failures() == 0
    assert sorted(line.partition(":")[2].split(" failed")[0] for line in said) == [
        " the sink mine.py:f",
        " the sink wandb",
    ]
    assert "ConnectionError: the tracker is down" in said[0]


def test_a_sink_that_hangs_holds_up_neither_a_step_nor_the_end(monkeypatch):
    monkeypatch.setattr("treepo_mega.monitor.sinks.fan.WAITING", 2)
    monkeypatch.setattr("treepo_mega.monitor.sinks.fan.CLOSE_S", 0.05)
    said: list[str] = []
    never = threading.Event()
    sinks = Sinks([("wandb", Broken(set(), hangs=never))], say=said.append)
    for step in range(10):
        sinks(step, {})
    sinks.close()
    never.set()
    assert len(said) == 1 and "this one is dropped" in said[0]
    assert sinks.take_failures() >= 7, "two wait, and one is in its hands"


def test_strict_ends_the_run():
    sinks = Sinks([("wandb", Broken({2}))], strict=True)
    sinks(1, {})
    with pytest.raises(ConnectionError):
        sinks(2, {})


def config(*overrides: str):
    return load_config(None, ["model.hf_checkpoint=unused", "data.train=[{path: unused.jsonl}]", *overrides])


def test_a_typo_names_the_nearest_and_a_missing_library_its_extra(monkeypatch):
    with pytest.raises(ConfigError, match=r"logging\.sinks\.0: .*did you mean 'wandb'\?"):
        config("logging.sinks=[wandv]")
    cfg = config("logging.sinks=[wandb, prometheus]")
    found = base.importlib.util.find_spec
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    (problem,) = check_sinks(cfg)
    assert problem == ("logging.sinks: wandb needs wandb, which is not installed: pip install 'treepo-mega[wandb]'")
    with pytest.raises(SinkError, match="which is not installed"):
        open_sink("wandb", run_in(Path("unused")))


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_without_a_login_nobody_is_asked_for_a_key(tmp_path, monkeypatch, name):
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "SWANLAB_API_KEY", "SWANLAB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(base, "missing_library", lambda name: None)
    with pytest.raises(SinkError, match=rf"{name} finds no login: .*logging\.sinks_offline=true"):
        open_sink(name, run_in(tmp_path, offline=False))
    cfg = config(f"logging.sinks=[{name}]")
    assert check_sinks(cfg) == [], "a plan on a laptop needs none"
    (problem,) = check_sinks(cfg, starting=True)
    assert problem.startswith(f"logging.sinks: {name} finds no login")
    assert check_sinks(config(f"logging.sinks=[{name}]", "logging.sinks_offline=true"), starting=True) == []
    monkeypatch.setenv(f"{name.upper()}_API_KEY", "a key")
    assert check_sinks(cfg, starting=True) == []


def test_every_name_of_the_configuration_is_built_in():
    annotation = str(type(config().logging).model_fields["sinks"].annotation)
    assert all(f"'{name}'" in annotation for name in [*BUILT_IN, "tensorboard"])


def test_flat_keeps_what_trackers_can_show():
    assert flat({"a": {"b": [1, 2], "c": None}, "d": True}) == {"a.b": "[1, 2]", "d": True}
