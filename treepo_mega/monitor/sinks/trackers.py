"""W&B, MLflow, SwanLab and trackio, each by its own library, which is imported when the sink connects.

Each library's own environment variables hold (WANDB_ENTITY, MLFLOW_TRACKING_URI, SWANLAB_API_HOST, TRACKIO_DIR, ...).
`logging.sinks_offline` makes W&B and SwanLab write below the run directory alone. MLflow and trackio do so unless
their variables name another place. A number that was not finite is left out: trackers draw no gap for it.
"""

from __future__ import annotations

import netrc
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treepo_mega.monitor.sinks.base import Run, SinkError

PARAMETER_CHARACTERS = 500
"""Of a configuration value in MLflow, whose stores refuse longer ones."""


def finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Metrics without those that were not finite."""
    return {name: value for name, value in metrics.items() if value is not None}


def missing_login(name: str, *, offline: bool) -> str | None:
    """What to do before the tracker `name` can be used; None for one that needs no login, or has it."""
    # Without a login these libraries ask for a key on the terminal, and the run would wait for the answer.
    known = {
        "wandb": lambda: _in_netrc("wandb"),
        "swanlab": lambda: (Path.home() / ".swanlab" / ".netrc").is_file(),
    }
    if name not in known or offline:
        return None
    upper = name.upper()
    mode = os.environ.get(f"{upper}_MODE")
    if mode in ("offline", "local", "dryrun", "disabled") or os.environ.get(f"{upper}_API_KEY") or known[name]():
        return None
    return (
        f"logging.sinks: {name} finds no login: run `{name} login`, set {upper}_API_KEY, or set "
        "logging.sinks_offline=true and sync later"
    )


class Wandb:
    """Weights & Biases. Offline runs lie in RUN_DIR/wandb, for `wandb sync`."""

    def __init__(self, run: Run) -> None:
        self.run = run
        if problem := missing_login("wandb", offline=run.offline):
            raise SinkError(problem)
        self._tracker: Any = None

    def start(self) -> None:
        """Begin the run, or go on with it."""
        import wandb

        self._tracker = wandb.init(
            project=self.run.project,
            name=self.run.name,
            id=self.run.identity,
            resume="allow",
            dir=str(self.run.directory),
            config=dict(self.run.config),
            mode="offline" if self.run.offline else None,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """As `Sink.log`."""
        self._tracker.log(finite(metrics), step=step)

    def close(self) -> None:
        """As `Sink.close`."""
        if self._tracker is not None:
            self._tracker.finish()


class Mlflow:
    """MLflow, on the server that MLFLOW_TRACKING_URI names, else in RUN_DIR/mlflow/mlflow.db."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._client: Any = None
        self._id = ""

    def start(self) -> None:
        """Begin the run, or go on with the one of the same identity."""
        # A local store makes its tables at the first use, and says so in a dozen lines.
        os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        folder = self.run.directory / "mlflow"
        folder.mkdir(parents=True, exist_ok=True)
        named = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=named or f"sqlite:///{folder.resolve()}/mlflow.db")
        found = self._client.get_experiment_by_name(self.run.project)
        artifacts = None if named else (folder / "artifacts").resolve().as_uri()
        experiment = (
            found.experiment_id
            if found is not None
            else self._client.create_experiment(self.run.project, artifact_location=artifacts)
        )
        mine = f"tags.treepo_identity = '{self.run.identity}'"
        earlier = self._client.search_runs([experiment], mine, max_results=1) if self.run.resumed else []
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"treepo_identity": self.run.identity}
        self._id = self._client.create_run(experiment, run_name=self.run.name, tags=tags).info.run_id
        items = [Param(key, str(value)[:PARAMETER_CHARACTERS]) for key, value in self.run.config.items()]
        # A batch holds 100 parameters.
        for first in range(0, len(items), 100):
            self._client.log_batch(self._id, params=items[first : first + 100])

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """As `Sink.log`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id, metrics=[Metric(name, value, now, step) for name, value in finite(metrics).items()]
        )

    def close(self) -> None:
        """As `Sink.close`."""
        if self._id:
            self._client.set_terminated(self._id)


class Swanlab:
    """SwanLab. Offline runs lie in RUN_DIR/swanlab, for `swanlab sync`."""

    def __init__(self, run: Run) -> None:
        self.run = run
        if problem := missing_login("swanlab", offline=run.offline):
            raise SinkError(problem)
        self._tracker: Any = None

    def start(self) -> None:
        """Begin the run, or go on with it."""
        import swanlab

        folder = self.run.directory / "swanlab"
        folder.mkdir(parents=True, exist_ok=True)
        # An offline run has no identity elsewhere: what a resume writes becomes a second one.
        again = {} if self.run.offline else {"id": self.run.identity, "resume": "allow"}
        mode = {"mode": "offline"} if self.run.offline else {}
        self._tracker = swanlab.init(
            project=self.run.project, name=self.run.name, log_dir=str(folder), config=dict(self.run.config),
            **mode, **again,
        )  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """As `Sink.log`."""
        self._tracker.log(finite(metrics), step=step)

    def close(self) -> None:
        """As `Sink.close`."""
        if self._tracker is not None:
            self._tracker.finish()


class Trackio:
    """trackio: a database in TRACKIO_DIR, else in RUN_DIR/trackio; TRACKIO_SPACE_ID sends it to a Space as well."""

    def __init__(self, run: Run) -> None:
        self.run = run
        # Read by the library when it is imported.
        os.environ.setdefault("TRACKIO_DIR", str((run.directory / "trackio").resolve()))
        self._tracker: Any = None

    def start(self) -> None:
        """Begin the run, or go on with it."""
        import trackio

        self._tracker = trackio.init(
            project=self.run.project,
            name=f"{self.run.name}-{self.run.identity}",
            resume="allow",
            config=dict(self.run.config),
            space_id=os.environ.get("TRACKIO_SPACE_ID"),
            embed=False,
            # The telemetry reads them already, and these are in its names.
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """As `Sink.log`."""
        self._tracker.log(finite(metrics), step=step)

    def close(self) -> None:
        """As `Sink.close`."""
        if self._tracker is not None:
            self._tracker.finish()


def _in_netrc(word: str) -> bool:
    """Whether a host with `word` in its name has a login in the user's netrc file."""
    try:
        return any(word in host for host in netrc.netrc(os.environ.get("NETRC")).hosts)
    except (OSError, netrc.NetrcParseError):
        return False
