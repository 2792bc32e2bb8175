"""What a cluster can do: its data sheet, and every efficiency that a plan assumes, each with its source. Pure.

    gpu = gpu_of("H100")
    rates = Rates()                          # the assumptions below
    rates.replace(train=0.31)                # one of them measured (`calibrate.py`)

Nothing else in `plan/` holds a number about hardware. A figure of the data sheet is what the product can do; a rate is
the share of it that a plan expects. Peaks of products are those of `monitor/flops.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from treepo_mega.errors import TreepoError, nearest
from treepo_mega.monitor.flops import TERA, peak_flops

GIB = 2**30


class HardwareError(TreepoError):
    """A device that is not known, or a speed that cannot be; the message names the nearest that is."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device and its links: GB/s (decimal) of one device in one direction; `memory_gib` as its driver counts it."""

    name: str
    device: str
    """By which `monitor/flops.py` knows its peaks."""
    memory_gib: float | None
    """None: the memory is the host's, and no plan is refused for it."""
    hbm_gb_s: float
    node_gb_s: float
    network_gb_s: float
    host_gb_s: float
    source: str

    def flops(self, kind: str) -> float:
        """Peak FLOP/s of products whose operands are fp32, bf16 or fp8."""
        if self.device == "cpu":
            return CPU_FLOPS
        # A device without FP8 products computes them in bf16.
        return peak_flops(self.device, kind) or peak_flops(self.device, "bf16") or TERA

    @property
    def is_cpu(self) -> bool:
        """Whether a rank is a process on a CPU."""
        return self.device == "cpu"


CPU_FLOPS = 60e9
"""FLOP/s of one core: 2 units of 8 fp32 products a cycle at 1.9 GHz. A plan for a CPU wants --calibrate."""

GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            Gpu(
                "H100", "NVIDIA H100 80GB HBM3", 79.6, 3350, 450, 50, 55, "data sheet of H100 SXM5; NVLink 4; 400 Gb/s"
            ),
            Gpu("H200", "NVIDIA H200", 139.8, 4800, 450, 50, 55, "data sheet of H200 SXM; NVLink 4; 400 Gb/s"),
            Gpu("B200", "NVIDIA B200", 178.0, 8000, 900, 50, 55, "data sheet of HGX B200; NVLink 5; 400 Gb/s"),
            Gpu(
                "A100", "NVIDIA A100-SXM4-80GB", 79.2, 2039, 300, 25, 25, "data sheet of A100 80GB; NVLink 3; 200 Gb/s"
            ),
            Gpu("CPU", "cpu", None, 10, 5, 1, 5, "no data sheet: one core of a server, an order of magnitude"),
        )
    }
)
"""By name. `host_gb_s` is PCIe 5 (PCIe 4 for A100) less its protocol; the network is one adapter a device."""


def gpu_of(name: str) -> Gpu:
    """The device called `name`, in any case. Raises HardwareError with the nearest name."""
    if name.upper() not in GPUS:
        raise HardwareError(f"GPU {name!r} is not known{nearest(name.upper(), GPUS)}; known: {', '.join(GPUS)}")
    return GPUS[name.upper()]


def _assumed(value: float, source: str) -> float:
    field: float = dataclasses.field(default=value, metadata={"source": source})
    return field


@dataclass(frozen=True, slots=True)
class Rates:
    """What a plan assumes beside the data sheet; `sources` says where each comes from. Shares are of the peak."""

    train: float = _assumed(0.40, "share of peak in layers: Megatron-LM reports 0.41-0.48 MFU of pretraining on H100")
    attention: float = _assumed(0.30, "share of peak in tree attention: FlexAttention forward and backward; a guess")
    head: float = _assumed(0.40, "share of peak in the loss head: as `train`; not measured")
    prefill: float = _assumed(0.50, "share of peak in prompts: large products without a backward pass; a guess")
    decode_flops: float = _assumed(0.50, "share of peak in a large batch of decoding: as `prefill`")
    decode_hbm: float = _assumed(0.70, "share of HBM bandwidth in decoding: attention and small products; a guess")
    launch_s: float = _assumed(
        60e-6, "seconds a layer and decode step, eager: 12 launches of 5 us, read in vLLM's layers"
    )
    forward: float = _assumed(1.0, "seconds of a pass without gradients / by `train`: the products are the same")
    pass_s: float = _assumed(1e-9, "seconds of an optimizer step beside its micro-batches: little on a GPU")
    micro_batch_s: float = _assumed(
        1e-9, "seconds a layer and micro-batch of an update whatever its tokens: little on a GPU"
    )
    engine_step_s: float = _assumed(
        0.0, "seconds a layer and engine step beside its tokens, of a measured run; 0: by decode_hbm and launch_s"
    )
    request_s: float = _assumed(1e-9, "seconds of an engine for each request beside its tokens: not known, so none")
    prompt_s: float = _assumed(1e-9, "seconds of a rollout beside its engine, a prompt: not known, so none")
    rollout: float = _assumed(1.0, "seconds of a rollout / by the rates above: what a measured run corrects")
    refit: float = _assumed(1.0, "seconds of a refit / what its links need: what a measured run corrects")
    reward_s: float = _assumed(1e-9, "seconds a trajectory that a step waits for graders: they run beside the engine")
    link: float = _assumed(0.80, "share of a link's nominal speed in large transfers: NCCL's usual bus bandwidth")
    host_copy: float = _assumed(0.80, "share of PCIe's speed in pinned copies: CUDA's bandwidth test")
    storage_gb_s: float = _assumed(2.0, "GB/s that a node writes to a shared file system; a guess: measure yours")
    context_gib: float = _assumed(5.0, "GiB of CUDA, NCCL and cuBLAS outside the allocator: 4-5 in reports of peers")
    allocator: float = _assumed(1.10, "activations with rounding and gaps of torch's allocator / without; a guess")
    engine_gib: float = _assumed(
        4.0, "GiB of an engine beside weights and KV cache: batch, sampler, workspaces; a guess"
    )
    runtime_gib: float = _assumed(1.0, "GiB of a CPU rank and its graders: host/rss_gib of the demo model's runs")
    response: float = _assumed(0.45, "mean response / rollout.max_response_len: a guess; --response-mean says it")
    spread: float = _assumed(0.6, "deviation of log response length: long tails of reasoning models; a guess")
    prompt: float = _assumed(0.25, "mean prompt / data.max_prompt_len: a guess; --prompt-mean says it")
    kept: float = _assumed(0.7, "share of prompts whose rewards differ, with dynamic sampling: a guess")

    def replace(self, **measured: float) -> Rates:
        """A copy with some of them measured. Raises HardwareError for a rate that is not positive."""
        if bad := [name for name, value in measured.items() if not value > 0]:
            raise HardwareError(f"{bad[0]} {measured[bad[0]]}: expected a positive number")
        return dataclasses.replace(self, **measured)

    @classmethod
    def sources(cls) -> dict[str, str]:
        """Name to where its default comes from."""
        return {each.name: str(each.metadata["source"]) for each in fields(cls)}


def check_speeds(gpu: Gpu, reached: float = 1.0) -> None:
    """Raise HardwareError for speeds that contradict each other: a far link that is faster than a near one.

    `reached`: of a nominal speed, the share in which the message states speeds.
    """
    nominal = (("hbm", gpu.hbm_gb_s), ("node", gpu.node_gb_s), ("network", gpu.network_gb_s))
    order = [(name, speed * reached) for name, speed in nominal]
    for name, speed in [*order, ("host", gpu.host_gb_s)]:
        if not speed > 0:
            raise HardwareError(f"{gpu.name}: {name} speed {speed} GB/s: expected a positive number")
    for (near, near_speed), (far, far_speed) in itertools.pairwise(order):
        if far_speed > near_speed:
            raise HardwareError(
                f"{gpu.name}: the {far} link with {far_speed:g} GB/s is faster than {near} with {near_speed:g}: one of "
                "the two is wrong (GB/s of one device in one direction; 400 Gb/s are 50)"
            )
