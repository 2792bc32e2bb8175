"""What a GPU shows beyond kernels: collectives over NCCL, memory that is really given back, whole steps of training.

A training step is the shortest way through all of an engine's states: built while the trainer's state is away, put to
sleep, woken by tag, refitted, compared by the canary, branched, reset. Figures go into the report of `make test-gpu`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ranks import CLI, run_ranks
from treepo_mega.monitor.metrics import read_metrics
from treepo_mega.monitor.nvml import gpu_gauges
from treepo_mega.monitor.telemetry import Telemetry, figures
from treepo_mega.runtime.device import free_memory_bytes, has_cuda
from treepo_mega.runtime.staging import Staging
from treepo_mega.sync.handover import DeviceMemory

WORKER = Path(__file__).with_name("collective_worker.py")
DEVICES = torch.cuda.device_count() if has_cuda() else 0
MIB = 1 << 20
Record = Callable[[str, object], None]

pytestmark = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")


@needs_cuda
def test_one_rank_over_nccl():
    run_ranks(1, WORKER, timeout=120)


@pytest.mark.skipif(DEVICES < 2, reason=f"needs 2 CUDA devices, {DEVICES} are here")
def test_a_rank_without_operations_holds_up_nobody():
    run_ranks(DEVICES, WORKER, timeout=180)


@needs_cuda
def test_offloaded_memory_is_free_for_others_and_comes_back_unchanged(record_property: Record):
    """Three rounds: what one leaves behind would show in the next."""
    size = 64 * MIB
    parts = {
        "grads": [torch.ones(size // 4, device="cuda")],
        "optimizer": [torch.randn(size // 4, device="cuda"), torch.randn(999, device="cuda")],
        "params": [torch.randn(size // 2, device="cuda").bfloat16()],
    }
    before = {part: [tensor.cpu() for tensor in tensors] for part, tensors in parts.items()}
    memory = DeviceMemory(parts.__getitem__)
    freed = []
    for _ in range(3):
        torch.cuda.empty_cache()
        start = free_memory_bytes()
        given = sum(memory.offload(part) for part in parts)
        freed.append(free_memory_bytes() - start)
        assert given >= 3 * size
        assert freed[-1] >= 0.95 * given, "CUDA itself counts it as free"
        assert sum(memory.restore(part) for part in parts) == given
    for part in ("optimizer", "params"):
        assert all(torch.equal(now.cpu(), then) for now, then in zip(parts[part], before[part], strict=True))
    assert not parts["grads"][0].any()
    record_property("MiB free for others", freed[-1] // MIB)


@needs_cuda
def test_arrays_arrive_whole_behind_a_busy_device_and_the_host_does_not_wait(record_property: Record):
    """Work is queued first, so that the device reads the buffers late; each buffer is used many times."""
    stage = Staging(torch.device("cuda", torch.cuda.current_device()), 1 << 16)
    arrays = [np.random.default_rng(number).integers(0, 1 << 30, 5000) for number in range(200)]
    stage.copy(arrays[0])
    busy = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    for _ in range(20):
        busy @ busy
    done.record()
    first = stage.copy(arrays[1][:100])
    assert not done.query(), "the copy waited for what the device was given before it"
    copies = [stage.copy(values, torch.int32) for values in arrays]
    assert all(held.is_pinned() for held in stage._buffers)
    assert torch.equal(first.cpu(), torch.from_numpy(arrays[1][:100]))
    for values, copied in zip(arrays, copies, strict=True):
        assert torch.equal(copied.cpu(), torch.from_numpy(values).int())
    record_property("arrays", len(copies))


@needs_cuda
def test_nvml_counts_what_a_busy_device_does(record_property: Record):
    """Every counter that the driver gives is in its unit's range, and a sample costs little."""
    import pynvml

    telemetry = Telemetry(60.0, gpu_gauges(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES")))
    busy = torch.randn(8192, 8192, device="cuda")
    for _ in range(200):
        busy @ busy
    torch.cuda.synchronize()
    for _ in range(10):
        telemetry.sample()
    telemetry.close()
    found = figures(*telemetry.take())
    assert 20 < found["gpu/power_w_max"] < 2000 and 10 < found["gpu/temperature_c_max"] < 110
    assert found["gpu/memory_used_gib_max"] > busy.nbytes / 2**30 and found["gpu/sm_clock_mhz_max"] > 100
    cost = found["host/telemetry_s"] / found["host/telemetry_samples"]
    assert cost < 0.01, "0.5 % of an interval of 2 s"
    record_property("ms a sample", 1e3 * cost)
    record_property("metrics", len(found))


def trained(directory: Path, ranks: int, *overrides: str) -> dict[int, dict[str, float]]:
    """Metrics by step of two training steps in bf16 on `ranks` devices."""
    recipe = (
        *("model.params_dtype=bf16", "rollout.rollout_batch_size=4", "rollout.n_samples_per_prompt=8"),
        *("rollout.dynamic_sampling=false", "rollout.oversample=1", "rollout.surplus=drop"),
        *("train.num_rollouts=2", "train.num_steps_per_rollout=1"),
        *("train.lr_warmup_iters=0", "eval.at_start=false", "eval.at_end=false", "checkpoint.save_hf=false"),
        *("checkpoint.save_interval=1", "logging.tensorboard=false", f"logging.run_dir={directory}"),
    )
    run_ranks(ranks, CLI, "train", "examples/tiny_cpu.yaml", *recipe, *overrides, timeout=280)
    return {int(row["step"]): row for row in read_metrics(directory / "metrics.jsonl")}


def check_steps(rows: dict[int, dict[str, float]], record_property: Record) -> None:
    """Both steps are there, on policy; the canary was within its limit, else the run would have ended."""
    steps = [rows[step] for step in (1, 2)]
    assert all(row["tree/leaves"] == 32 for row in steps)
    assert all(row["reshard/canary_failures"] == 0 for row in steps)
    # bf16 on both sides: 0.4 nats is the worst that was seen on a CPU.
    assert all(row["rollout/logprob_abs_diff_max"] <= 1.0 for row in steps)
    for name in ("reshard/canary_abs_diff", "rollout/logprob_abs_diff_max", "reshard/seconds", "perf/step_s"):
        record_property(name, f"{steps[-1][name]:.3g}")


@needs_cuda
@pytest.mark.parametrize("level", [2, 1])
def test_two_steps_on_one_gpu_without_graphs(tmp_path, level, record_property):
    rows = trained(tmp_path / "run", 1, f"rollout.engine.sleep_level={level}")
    check_steps(rows, record_property)


@needs_cuda
@pytest.mark.parametrize("graphs", ["full_decode_only", "full_and_piecewise"])
def test_two_steps_on_one_gpu_with_graphs(tmp_path, graphs, record_property):
    check_steps(trained(tmp_path / "run", 1, f"rollout.engine.cuda_graphs={graphs}"), record_property)


@pytest.mark.skipif(DEVICES < 2, reason=f"needs 2 CUDA devices, {DEVICES} are here")
def test_two_steps_of_tp_2_into_an_engine_over_two_gpus(tmp_path, record_property):
    layout = ("parallel.tensor_model_parallel_size=2", "rollout.engine.tensor_parallel_size=2")
    check_steps(trained(tmp_path / "run", 2, *layout), record_property)


@pytest.mark.skipif(DEVICES < 4, reason=f"needs 4 CUDA devices, {DEVICES} are here")
def test_two_steps_of_tp_2_pp_2_into_engines_over_two_gpus(tmp_path, record_property):
    layout = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2")
    check_steps(trained(tmp_path / "run", 4, *layout, "rollout.engine.tensor_parallel_size=2"), record_property)
