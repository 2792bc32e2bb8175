"""Seconds of the hand-over of memory: trainer's state to the host and back, the engine's sleep and wake by level.

    python tools/bench/gpu/memory.py [--quick] [--check]

The trainer's part (`sync/handover.py`: DeviceMemory) offloads and restores gradients (dropped), optimizer state and
parameters. Its rates stand beside those of plain copies to and from pinned memory, which are the bound. The first
offload also takes the pinned memory, which later ones use again.

The engine's part needs vLLM: sleep, wake of the weights and wake of the KV cache, at level 1 (weights to the host and
back) and at level 2 (dropped). The bound of level 1 is a copy of the weights; level 2 has none but the driver's calls.

On a CPU (--check) the trainer's part copies host memory and vLLM's sleep moves nothing.

Last line, JSON: {"bench", "device", "check", "shares": {"offload optimizer", "restore optimizer", ..., "sleep 1",
"wake 1": bound seconds / seconds}, "wrong", "parts": [{"part", "bytes", "first_s", "offload_s", "restore_s"}],
"engine": [{"level", "sleep_s", "wake_weights_s", "wake_kv_s", "freed_bytes"}] or null without vLLM, "pinned_bytes"}.
Offloaded tensors are compared by bits after they came back.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tools.bench.gpu import card
from treepo_mega.runtime.device import device
from treepo_mega.sync.handover import PARTS, DeviceMemory

LEVELS = (1, 2)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, what it returns) of one call."""
    card.synchronize()
    begin = time.perf_counter()
    out = work()
    card.synchronize()
    return time.perf_counter() - begin, out


def trainer_tensors(size: card.Size) -> dict[str, list[Tensor]]:
    """Gradients and optimizer state in fp32, parameters in bf16, in the proportions of a rank with ZeRO-1 over four."""
    unit = size.choose(1024 * card.MIB, 256 * card.MIB, card.MIB)
    draw = torch.Generator(device=device()).manual_seed(0)

    def values(length: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(length // dtype.itemsize, dtype=dtype, device=device()).uniform_(generator=draw)

    return {
        "grads": [values(4 * unit, torch.float32)],
        "optimizer": [values(unit, torch.float32) for _ in range(3)],
        "params": [values(2 * unit, torch.bfloat16)],
    }


def trainer(size: card.Size) -> tuple[list[dict[str, Any]], int, list[str]]:
    """(a row for each part, pinned bytes, what did not come back)."""
    tensors = trainer_tensors(size)
    before = {part: [tensor.clone() for tensor in tensors[part]] for part in ("optimizer", "params")}
    memory = DeviceMemory(tensors.__getitem__)
    rows = []
    for part in PARTS:
        first, length = timed(lambda part=part: memory.offload(part))
        memory.restore(part)
        rounds = []
        for _ in range(size.repeats):
            out, _ = timed(lambda part=part: memory.offload(part))
            back, _ = timed(lambda part=part: memory.restore(part))
            rounds.append((out, back))
        offload, restore = (sorted(column)[len(column) // 2] for column in zip(*rounds, strict=True))
        rows.append({"part": part, "bytes": length, "first_s": first, "offload_s": offload, "restore_s": restore})
    wrong = [
        f"{part} did not come back as they were"
        for part, kept in before.items()
        if not all(torch.equal(now, then) for now, then in zip(tensors[part], kept, strict=True))
    ]
    return rows, memory.host.taken, wrong


def engine(size: card.Size) -> tuple[list[dict[str, Any]] | None, int]:
    """(a row for each level, bytes of the weights); None without vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return None, 0
    from tools.bench.gpu import sampler

    bench, weight_bytes = sampler.bench(size)
    rows = []
    for level in LEVELS:
        memory = DeviceMemory(lambda part: [], bench.engine, level)
        for _ in range(2):
            sleep, freed = timed(memory.sleep)
            weights, _ = timed(lambda memory=memory: memory.wake("weights"))
            cache, _ = timed(lambda memory=memory: memory.wake("kv_cache"))
        # The second round counts: the first takes pinned memory.
        rows.append(
            {"level": level, "sleep_s": sleep, "wake_weights_s": weights, "wake_kv_s": cache, "freed_bytes": freed}
        )
    return rows, weight_bytes


def shares_of(
    parts: list[dict[str, Any]], levels: list[dict[str, Any]] | None, weight_bytes: int, rates: card.CopyRates
) -> dict[str, float | None]:
    """Bound over measured seconds of all that copies."""
    out: dict[str, float | None] = {}
    for row in parts:
        if row["part"] != "grads":
            out[f"offload {row['part']}"] = row["bytes"] / rates.to_host / row["offload_s"]
            out[f"restore {row['part']}"] = row["bytes"] / rates.from_host / row["restore_s"]
    for row in levels or []:
        if row["level"] == 1:
            out["sleep 1"] = weight_bytes / rates.to_host / row["sleep_s"]
            out["wake 1"] = weight_bytes / rates.from_host / row["wake_weights_s"]
    return out


def main(given: list[str] | None = None) -> int:
    """Measure and print; the exit status."""
    size = card.arguments(__doc__, given)
    rates = card.copy_rates(size)
    parts, pinned, wrong = trainer(size)
    levels, weight_bytes = engine(size)
    print(f"{card.card_name()}: {rates.to_host / 1e9:.1f} GB/s to the host, {rates.from_host / 1e9:.1f} back")
    seconds = ".5f"
    columns = {"part": "s", "bytes": ",d", "first_s": seconds, "offload_s": seconds, "restore_s": seconds}
    print(card.table(parts, columns))
    if levels is None:
        print("engine: vLLM is not installed")
    else:
        names = ("sleep_s", "wake_weights_s", "wake_kv_s")
        print(card.table(levels, {"level": "d", **dict.fromkeys(names, seconds), "freed_bytes": ",d"}))
    shares = shares_of(parts, levels, weight_bytes, rates)
    return card.finish("memory", size, shares, wrong, parts=parts, engine=levels, pinned_bytes=pinned)


if __name__ == "__main__":
    card.leave(main())
