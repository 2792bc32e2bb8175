"""What the machine did during a step: one thread a node (local rank 0) reads gauges of its GPUs and of the host.

    telemetry = Telemetry(interval_s=2.0, gauges=[*gpu_gauges(count), *host_gauges()])
    telemetry.pop()     # {"gpu/power_w_mean": 612.0, "gpu/power_w_max": 701.0, ...}: collective over all ranks

A gauge that fails is said once and left out from then on; nothing is raised into training. A level gives the mean and
the maximum over devices, samples and nodes; a counter gives what it grew by since the last `pop`, all nodes together.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from treepo_mega.runtime import dist

logger = logging.getLogger(__name__)

GIB = 2.0**30
LEVELS = (
    *("gpu/utilization", "gpu/memory_used_gib", "gpu/power_w", "gpu/sm_clock_mhz", "gpu/temperature_c"),
    *("gpu/throttled_share", "host/cpu_share", "host/memory_used_gib", "host/rss_gib", "host/shm_gib"),
)
COUNTERS = (
    *("gpu/energy_kj", "gpu/ecc_errors", "gpu/nvlink_gb", "gpu/pcie_gb", "host/disk_read_gb", "host/disk_written_gb"),
    *("host/network_received_gb", "host/network_sent_gb"),
)
SAMPLES = "host/telemetry_samples"
SECONDS = "host/telemetry_s"


@dataclass(frozen=True, slots=True)
class Gauge:
    """`read` gives one value a device; the name is of `LEVELS` or of `COUNTERS`."""

    name: str
    read: Callable[[], Sequence[float]]


@dataclass(slots=True)
class Seen:
    """The values of a gauge since the last `pop`."""

    total: float = 0.0
    count: int = 0
    largest: float = -math.inf


@dataclass(slots=True)
class _Window:
    levels: dict[str, Seen] = field(default_factory=dict)
    samples: int = 0
    seconds: float = 0.0


class Telemetry:
    """See the module's page. `interval_s` 0 or no gauges: no thread, and this rank adds nothing to `pop`."""

    def __init__(self, interval_s: float, gauges: Sequence[Gauge]) -> None:
        self.enabled = interval_s > 0
        self._gauges = list(gauges) if self.enabled else []
        self._window = _Window()
        self._base: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._interval_s = interval_s
        self._thread: threading.Thread | None = None
        if self._gauges:
            # A daemon: a run that dies of an error must not wait for it.
            self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        self.sample()
        while not self._done.wait(self._interval_s):
            self.sample()

    def sample(self) -> None:
        """Read every gauge once."""
        started = time.perf_counter()
        values: dict[str, Sequence[float]] = {}
        for gauge in list(self._gauges):
            try:
                values[gauge.name] = [float(value) for value in gauge.read()]
            # Drivers and containers fail in ways of their own, and a missing figure is no reason to end a run.
            except Exception as error:
                self._gauges.remove(gauge)
                logger.warning("telemetry: %s is left out: %s: %s", gauge.name, type(error).__name__, error)
        with self._lock:
            for name, of_devices in values.items():
                if name in COUNTERS:
                    self._latest[name] = sum(of_devices)
                    self._base.setdefault(name, self._latest[name])
                    continue
                seen = self._window.levels.setdefault(name, Seen())
                seen.total += sum(of_devices)
                seen.count += len(of_devices)
                seen.largest = max([seen.largest, *of_devices])
            self._window.samples += 1
            self._window.seconds += time.perf_counter() - started

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """(sums, maxima) of this node since the last time, with the same keys whatever it could read."""
        with self._lock:
            window = self._window
            self._window = _Window()
            grown = {name: value - self._base[name] for name, value in self._latest.items()}
            self._base = dict(self._latest)
        sums = {SAMPLES: float(window.samples), SECONDS: window.seconds}
        maxima = {}
        for name in LEVELS:
            seen = window.levels.get(name, Seen())
            sums |= {f"{name}_mean": seen.total, f"{name} count": float(seen.count)}
            maxima[f"{name}_max"] = seen.largest
        for name in COUNTERS:
            # A counter that begins anew, as after a reset of the driver, has not shrunk.
            sums |= {name: max(0.0, grown.get(name, 0.0)), f"{name} count": float(name in grown)}
        return sums, maxima

    def pop(self) -> dict[str, float]:
        """Metrics of all nodes since the last time. Collective over all ranks."""
        if not self.enabled:
            return {}
        sums, maxima = self.take()
        return figures(dist.sum_over_ranks(sums), dist.max_over_ranks(maxima))

    def close(self) -> None:
        """End the thread; a reading that hangs in a driver is not waited for."""
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)


def figures(sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    """Means, maxima and growths of what any node could read."""
    out = {SAMPLES: sums[SAMPLES], SECONDS: sums[SECONDS]}
    for name in LEVELS:
        if count := sums[f"{name} count"]:
            out |= {f"{name}_mean": sums[f"{name}_mean"] / count, f"{name}_max": maxima[f"{name}_max"]}
    return out | {name: sums[name] for name in COUNTERS if sums[f"{name} count"]}


def is_local_main() -> bool:
    """Whether this rank samples for its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def host_gauges() -> list[Gauge]:
    """Of the node: all its processes, but for the resident memory, which is of this process and its children."""
    psutil.cpu_percent()  # The first call has nothing to compare with, and returns 0.
    me = psutil.Process()

    def resident() -> list[float]:
        family = [me, *me.children(recursive=True)]
        return [sum(one.memory_info().rss for one in family if one.is_running()) / GIB]

    return [
        Gauge("host/cpu_share", lambda: [psutil.cpu_percent() / 100]),
        Gauge("host/memory_used_gib", lambda: [psutil.virtual_memory().used / GIB]),
        Gauge("host/rss_gib", resident),
        Gauge("host/shm_gib", lambda: [psutil.disk_usage("/dev/shm").used / GIB]),
        Gauge("host/disk_read_gb", lambda: [_present(psutil.disk_io_counters(), "disks").read_bytes / 1e9]),
        Gauge("host/disk_written_gb", lambda: [_present(psutil.disk_io_counters(), "disks").write_bytes / 1e9]),
        Gauge("host/network_received_gb", lambda: [psutil.net_io_counters().bytes_recv / 1e9]),
        Gauge("host/network_sent_gb", lambda: [psutil.net_io_counters().bytes_sent / 1e9]),
    ]


def _present(counters: Any, what: str) -> Any:
    if counters is None:
        raise OSError(f"the system shows no counters of its {what}")
    return counters
