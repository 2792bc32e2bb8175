"""What a sink is: somewhere that the metrics of each step go beside metrics.jsonl, by a library of its own.

`BUILT_IN` names them for `logging.sinks`. A class is imported only when its name is used, and its library when it
connects: none of them is needed for a run that does not ask for it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from treepo_mega.config import Config
from treepo_mega.errors import TreepoError


class SinkError(TreepoError):
    """A sink cannot be used: its library is missing, nobody is logged in, or its port is taken."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a tracker shows of a run. `identity` is the same before and after a resume, and of no other run."""

    directory: Path
    project: str
    name: str
    identity: str
    resumed: bool
    offline: bool
    config: Mapping[str, Any] = field(default_factory=dict)
    """Flat: key with dots to a number, a bool or text."""
    address: str = "127.0.0.1"
    port: int = 0
    """Of the Prometheus endpoint; 0: any free one."""


class Sink(Protocol):
    """Takes metrics. All methods are called by one thread, but for the constructor, which must be quick."""

    def __init__(self, run: Run) -> None:
        """Raise SinkError for what people can mend before the run begins."""

    def start(self) -> None:
        """Connect; this may take its time."""

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """The metrics of `step`, or more of them; None is a number that was not finite."""

    def close(self) -> None:
        """Write what is left."""


@dataclass(frozen=True, slots=True)
class Known:
    """A built-in sink: where its class is, and what it needs installed."""

    module: str
    name: str
    library: str
    extra: str
    """Of this package, which installs the library; "": it is always there."""


BUILT_IN = {
    "wandb": Known("treepo_mega.monitor.sinks.trackers", "Wandb", "wandb", "wandb"),
    "mlflow": Known("treepo_mega.monitor.sinks.trackers", "Mlflow", "mlflow", "mlflow"),
    "swanlab": Known("treepo_mega.monitor.sinks.trackers", "Swanlab", "swanlab", "swanlab"),
    "trackio": Known("treepo_mega.monitor.sinks.trackers", "Trackio", "trackio", "trackio"),
    "prometheus": Known("treepo_mega.monitor.sinks.prometheus", "Prometheus", "prometheus_client", ""),
}
"""By their names in `logging.sinks`. `tensorboard` is one more, which `MetricsLogger` writes itself."""


def missing_library(name: str) -> str | None:
    """What to install for the built-in sink `name`; None when it is there."""
    known = BUILT_IN[name]
    if importlib.util.find_spec(known.library) is not None:
        return None
    how = f"treepo-mega[{known.extra}]" if known.extra else known.library
    return f"logging.sinks: {name} needs {known.library}, which is not installed: pip install '{how}'"


def check_sinks(cfg: Config, *, starting: bool = False) -> list[str]:
    """One problem for every built-in sink of `cfg` whose library is missing, or its login when the run begins now.

    No tracker's library is imported.
    """
    from treepo_mega.monitor.sinks.trackers import missing_login

    named = dict.fromkeys(name for name in cfg.logging.sinks if name in BUILT_IN)
    problems = [problem for name in named if (problem := missing_library(name))]
    if starting:
        offline = cfg.logging.sinks_offline
        problems += [problem for name in named if (problem := missing_login(name, offline=offline))]
    return problems


def open_sink(name: str, run: Run) -> Sink:
    """The built-in sink `name`. Raises SinkError for what people can mend."""
    if problem := missing_library(name):
        raise SinkError(problem)
    known = BUILT_IN[name]
    sink: Sink = getattr(importlib.import_module(known.module), known.name)(run)
    return sink


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | bool | str]:
    """Nested keys joined by dots, as trackers and TensorBoard's hparams want them; lists as text, None left out.

    >>> flat({"train": {"lr": 1e-6, "load": None}, "sinks": ["wandb"]})
    {'train.lr': 1e-06, 'sinks': "['wandb']"}
    """
    out: dict[str, float | bool | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            out[f"{prefix}{key}"] = value
        elif isinstance(value, Sequence):
            out[f"{prefix}{key}"] = str(list(value))
    return out
