"""GPU gauges by NVML, through `nvidia-ml-py` (module pynvml), for `monitor/telemetry.py`.

They are of the whole card: of other processes on it, too. NVML numbers cards by their bus and knows nothing of
CUDA_VISIBLE_DEVICES, so that variable is applied here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from treepo_mega.monitor.telemetry import GIB, Gauge, Telemetry, host_gauges, is_local_main
from treepo_mega.runtime.device import has_cuda

logger = logging.getLogger(__name__)

ALL_LINKS = 0xFFFFFFFF
"""NVML's scope for the sum over a card's NVLinks."""


def gpu_gauges(nvml: Any, visible: str | None = None) -> list[Gauge]:
    """Of the cards that `visible` (CUDA_VISIBLE_DEVICES) lets this node use; None: of all.

    `nvml`: the module pynvml. Raises its NVMLError where there is no driver.
    """
    nvml.nvmlInit()
    cards = _cards(nvml, visible)
    slow = (
        nvml.nvmlClocksThrottleReasonSwPowerCap
        | nvml.nvmlClocksThrottleReasonHwSlowdown
        | nvml.nvmlClocksEventReasonSwThermalSlowdown
        | nvml.nvmlClocksThrottleReasonHwThermalSlowdown
        | nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
    )

    def each(read: Callable[[Any], float]) -> Callable[[], Sequence[float]]:
        return lambda: [read(card) for card in cards]

    def fields(*wanted: Any) -> Callable[[Any], float]:
        """A card -> the sum of its NVML fields `wanted`, in their unit; raises NVMLError where one is refused."""

        def read(card: Any) -> float:
            got = nvml.nvmlDeviceGetFieldValues(card, list(wanted))
            if failed := [value.nvmlReturn for value in got if value.nvmlReturn != nvml.NVML_SUCCESS]:
                raise nvml.NVMLError(failed[0])
            return float(sum(value.value.ullVal for value in got))

        return read

    nvlink = fields(
        (nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, ALL_LINKS), (nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, ALL_LINKS)
    )
    pcie = fields(nvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES, nvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES)
    return [
        Gauge("gpu/utilization", each(lambda card: nvml.nvmlDeviceGetUtilizationRates(card).gpu / 100)),
        Gauge("gpu/memory_used_gib", each(lambda card: nvml.nvmlDeviceGetMemoryInfo(card).used / GIB)),
        # NVML counts mW, mJ, and KiB of its links.
        Gauge("gpu/power_w", each(lambda card: nvml.nvmlDeviceGetPowerUsage(card) / 1e3)),
        Gauge("gpu/energy_kj", each(lambda card: nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e6)),
        Gauge("gpu/sm_clock_mhz", each(lambda card: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM))),
        Gauge("gpu/temperature_c", each(lambda card: nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU))),
        Gauge(
            "gpu/throttled_share",
            each(lambda card: float(bool(nvml.nvmlDeviceGetCurrentClocksEventReasons(card) & slow))),
        ),
        Gauge(
            "gpu/ecc_errors",
            each(
                lambda card: nvml.nvmlDeviceGetTotalEccErrors(
                    card, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
                )
            ),
        ),
        Gauge("gpu/nvlink_gb", each(lambda card: nvlink(card) * 1024 / 1e9)),
        Gauge("gpu/pcie_gb", each(lambda card: pcie(card) / 1e9)),
    ]


def open_telemetry(interval_s: float) -> Telemetry:
    """Of this node, sampled by its first rank: GPUs where torch sees some, and the host. 0: none."""
    if not interval_s or not is_local_main():
        return Telemetry(interval_s, [])
    gauges = host_gauges()
    if has_cuda():
        try:
            import pynvml

            gauges += gpu_gauges(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        # No package, no driver or no permission: training needs none of them.
        except Exception as error:
            logger.warning("telemetry: gpu/ metrics are left out: %s: %s", type(error).__name__, error)
    return Telemetry(interval_s, gauges)


def _cards(nvml: Any, visible: str | None) -> list[Any]:
    if visible is None:
        return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return [
        nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
        for name in names
    ]
