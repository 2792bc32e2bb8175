"""Gauges of a stand-in of NVML and of this host; what a failing one costs; and that names are those of pynvml."""

from __future__ import annotations

import ast
import inspect
import threading
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from tools.bench import telemetry as telemetry_bench
from treepo_mega.config.run import LoggingConfig
from treepo_mega.monitor import nvml as module
from treepo_mega.monitor.nvml import gpu_gauges
from treepo_mega.monitor.registry import check_known
from treepo_mega.monitor.telemetry import COUNTERS, LEVELS, Gauge, Telemetry, figures, host_gauges

GPU = [name for name in (*LEVELS, *COUNTERS) if name.startswith("gpu/")]


class StandIn:
    """Two cards by pynvml's names, in NVML's units; constants are pynvml's own."""

    def __init__(self) -> None:
        self.energy_mj = 5_000_000
        self.reasons = 0
        self.broken: set[str] = set()

    def __getattr__(self, name: str):
        value = getattr(pynvml, name)
        assert not callable(value) or isinstance(value, type), f"{name} has no stand-in"
        return value

    def nvmlInit(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-b": 1}[uuid]

    def nvmlDeviceGetUtilizationRates(self, card: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=[20, 80][card], memory=0)

    def nvmlDeviceGetMemoryInfo(self, card: int) -> SimpleNamespace:
        return SimpleNamespace(used=(card + 1) * 2**30)

    def nvmlDeviceGetPowerUsage(self, card: int) -> int:
        return [300_000, 700_000][card]

    def nvmlDeviceGetTotalEnergyConsumption(self, card: int) -> int:
        if "energy" in self.broken:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return self.energy_mj

    def nvmlDeviceGetClockInfo(self, card: int, kind: int) -> int:
        assert kind == pynvml.NVML_CLOCK_SM
        return 1980

    def nvmlDeviceGetTemperature(self, card: int, sensor: int) -> int:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return 60 + card

    def nvmlDeviceGetCurrentClocksEventReasons(self, card: int) -> int:
        return self.reasons if card else pynvml.nvmlClocksThrottleReasonGpuIdle

    def nvmlDeviceGetTotalEccErrors(self, card: int, kind: int, counter: int) -> int:
        assert (kind, counter) == (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
        return 3

    def nvmlDeviceGetFieldValues(self, card: int, wanted: list) -> list[SimpleNamespace]:
        status = pynvml.NVML_ERROR_NOT_SUPPORTED if "links" in self.broken and card else pynvml.NVML_SUCCESS
        return [SimpleNamespace(nvmlReturn=status, value=SimpleNamespace(ullVal=1000)) for _ in wanted]


@pytest.fixture
def quiet() -> Telemetry:
    """Without a thread: the test samples."""
    telemetry = Telemetry(1.0, [])
    yield telemetry
    telemetry.close()


def test_every_name_is_one_of_pynvml():
    tree = ast.parse(inspect.getsource(module))
    asked = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nvml"
    }
    assert len(asked) > 20
    assert not [name for name in asked if not hasattr(pynvml, name)]


def test_gauges_of_two_cards_in_the_units_of_the_metrics(quiet):
    cards = StandIn()
    quiet._gauges = gpu_gauges(cards)
    assert [gauge.name for gauge in quiet._gauges if gauge.name not in GPU] == []
    quiet.sample()
    quiet.take()
    cards.energy_mj += 2_000_000
    cards.reasons = pynvml.nvmlClocksThrottleReasonSwPowerCap
    quiet.sample()
    found = figures(*quiet.take())
    for name in found:
        check_known(name)
    assert (found["gpu/utilization_mean"], found["gpu/utilization_max"]) == (0.5, 0.8)
    assert (found["gpu/power_w_mean"], found["gpu/power_w_max"]) == (500, 700)
    assert (found["gpu/memory_used_gib_mean"], found["gpu/memory_used_gib_max"]) == (1.5, 2)
    assert found["gpu/throttled_share_mean"] == 0.5, "one card is at its power limit; an idle one is not slowed down"
    assert found["gpu/energy_kj"] == 2 * 2, "what both used since the last step"
    assert found["gpu/ecc_errors"] == found["gpu/nvlink_gb"] == 0, "counters that stood still"


def test_visible_cards_are_chosen_as_cuda_chooses_them():
    power = next(gauge for gauge in gpu_gauges(StandIn(), "1") if gauge.name == "gpu/power_w")
    assert power.read() == [700]
    power = next(gauge for gauge in gpu_gauges(StandIn(), "GPU-b, 0") if gauge.name == "gpu/power_w")
    assert power.read() == [700, 300]


def test_a_failing_counter_is_said_once_and_left_out(quiet, caplog):
    cards = StandIn()
    cards.broken = {"energy", "links"}
    quiet._gauges = gpu_gauges(cards)
    for _ in range(3):
        quiet.sample()
    found = figures(*quiet.take())
    assert not {"gpu/energy_kj", "gpu/nvlink_gb", "gpu/pcie_gb"} & set(found)
    assert found["gpu/power_w_mean"] == 500 and found["host/telemetry_samples"] == 3
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3 and sum("gpu/energy_kj is left out: NVMLError" in line for line in told) == 1


def test_the_host_is_sampled_by_a_thread_that_ends():
    seen = threading.Event()
    telemetry = Telemetry(0.01, [*host_gauges(), Gauge("host/cpu_share", lambda: [seen.set() or 0.5])])
    assert seen.wait(20)
    telemetry.close()
    assert telemetry._thread is not None and not telemetry._thread.is_alive()
    sums, maxima = telemetry.take()
    found = figures(sums, maxima)
    for name in found:
        check_known(name)
    assert 0 < found["host/rss_gib_max"] * 2**30 <= psutil.virtual_memory().total
    assert found["host/telemetry_samples"] >= 1 and found["host/telemetry_s"] > 0
    again, _ = telemetry.take()
    assert set(again) == set(sums) and again["host/telemetry_samples"] == 0, "ranks sum up under the same names"


def test_off_means_no_thread():
    telemetry = Telemetry(0, host_gauges())
    assert telemetry._thread is None and telemetry.pop() == {}


def test_the_bench_measures_looks_and_steps(tmp_path):
    """Both ways run; what they find is judged by a person on a quiet machine, not here."""
    seconds = telemetry_bench.cpu_seconds(lambda: sum(range(20_000)), 3)
    assert 0 < seconds < 1
    settings = LoggingConfig(telemetry_interval_s=0.01, status_interval_s=0.01)
    found = telemetry_bench.ratios(1, 0.02, tmp_path, settings)
    assert set(found) == {"step_ratio_wall", "step_ratio_cpu"} and min(found.values()) > 0
