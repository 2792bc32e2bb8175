"""The newest value of every metric, for Prometheus to scrape: an endpoint on rank 0 in its text format.

    curl http://127.0.0.1:9400/metrics

`train/loss` is `treepo_train_loss{run="NAME"}`, with the registry's meaning and unit as help. The library's server runs
in a thread of its own and has the numbers of the last step that was logged.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily

from treepo_mega.monitor.registry import check_known
from treepo_mega.monitor.sinks.base import Run, SinkError

PREFIX = "treepo_"


def prometheus_name(metric: str) -> str:
    """A metric's name in Prometheus' alphabet.

    >>> prometheus_name("grad-norm"), prometheus_name("train/log_ratio_share_0.01")
    ('treepo_grad_norm', 'treepo_train_log_ratio_share_0_01')
    """
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", metric)


class Prometheus:
    """The endpoint. It is also the collector that the library asks for families of metrics."""

    def __init__(self, run: Run) -> None:
        self._name = run.name
        self._lock = threading.Lock()
        self._newest: dict[str, float] = {}
        self._step = 0
        self._time = 0.0
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(run.port, run.address, registry)
        except OSError as error:
            raise SinkError(
                f"logging.prometheus_port {run.port} on logging.prometheus_address {run.address!r} cannot be opened: "
                f"{error}; name another port, or 0 for any free one"
            ) from None
        self.port: int = self._server.server_port

    def start(self) -> None:
        """Nothing: the endpoint is open already."""

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """As `Sink.log`."""
        with self._lock:
            self._newest |= {name: math.nan if value is None else value for name, value in metrics.items()}
            self._step = step
            self._time = time.time()

    def collect(self) -> Iterator[Any]:
        """Families of the newest values, for the library."""
        with self._lock:
            newest = dict(self._newest)
            step = self._step
            when = self._time
        yield self._family("step", "steps that are done", step)
        yield self._family("last_log_time_seconds", "when the last metrics were logged, Unix time", when)
        for name, value in newest.items():
            try:
                known = check_known(name)
            except KeyError:
                # A number of a user's own code; it has no page.
                yield self._family(name, "not documented", value)
            else:
                yield self._family(name, f"{known.meaning} [{known.unit}]; healthy: {known.healthy}", value)

    def _family(self, name: str, meaning: str, value: float) -> Any:
        family = GaugeMetricFamily(prometheus_name(name), meaning, labels=["run"])
        family.add_metric([self._name], value)
        return family

    def close(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=2)
