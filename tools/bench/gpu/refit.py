"""Weights from the trainer's layout into the engine's, in GB/s against plain copies on the same card.

    python tools/bench/gpu/refit.py [--quick] [--check]                       one rank: all bytes stay on the card
    torchrun --nproc-per-node N tools/bench/gpu/refit.py                      N ranks: TP N -> TP_v N/2, over NCCL

The resharder of a training run (`reshard/execute.py`) moves random bf16 weights into tensors with the names and shapes
of a vLLM worker's. Its rate is the bytes that a rank's engine holds over the slowest rank's seconds; the bound is the
measured rate of a copy within the card. Between ranks the link is slower than that, and `received` says how much came
over it.

Last line of rank 0, JSON: {"bench", "device", "check", "shares": {"refit": rate over the copy's}, "wrong", "ranks",
"parameters", "seconds", "gb_per_s", "copy_gb_per_s", "engine_bytes", "received_bytes", "buffer_bytes"}. Every weight is
compared by bits with where it came from.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tools.bench.gpu import card
from treepo_mega.modelspec.mcore_layout import ModelSpec, hf_shapes
from treepo_mega.reshard.execute import Resharder, TensorTarget
from treepo_mega.reshard.sides import Grid, mcore_side, vllm_side
from treepo_mega.runtime import dist
from treepo_mega.runtime.device import backend, bind, device

QWEN_7B = {
    "hidden_size": 3584, "num_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
HALF_B = QWEN_7B | {"hidden_size": 896, "num_layers": 24, "num_attention_heads": 16, "head_dim": 64,
                    "intermediate_size": 4864, "tie_word_embeddings": True}  # fmt: skip
TINY = QWEN_7B | {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 8, "head_dim": 8,
                  "intermediate_size": 64, "vocab_size": 128}  # fmt: skip
BUCKET = 64 * card.MIB


def join() -> None:
    """The process group of the launcher, or of this process alone."""
    bind()
    if "WORLD_SIZE" in os.environ:
        torch_dist.init_process_group(backend())
    else:
        torch_dist.init_process_group(backend(), store=torch_dist.HashStore(), rank=0, world_size=1)


class Move:
    """Source and destination of this rank, and what takes the one to the other."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        spec = ModelSpec("LlamaForCausalLM", **sizes)
        world, rank = dist.world_size(), dist.rank()
        source, target = mcore_side(spec, Grid(world, 1), world), vllm_side(spec, max(1, world // 2), world)
        self.resharder = Resharder.between(
            source,
            target,
            source_dtype=torch.bfloat16,
            target_dtype=torch.bfloat16,
            bucket_bytes=BUCKET,
            timeout_s=120,
            device=device(),
        )
        draw = torch.Generator(device=device()).manual_seed(0)
        # The same on all ranks, so that each can check what arrives. One tensor at a time: the whole model is large.
        self.held = [self._empty(chunk) for chunk in source.of(rank)]
        self.got = [self._empty(chunk) for chunk in target.of(rank)]
        self.wanted = target.of(rank)
        self.seeds = {name: seed for seed, name in enumerate(sorted(hf_shapes(spec)))}
        self.shapes = hf_shapes(spec)
        self.draw = draw
        for params, layouts in zip(self.held, source.of(rank), strict=True):
            for name, param in layouts.items():
                for block in param.blocks:
                    params[name][block.local_index] = self.value(block.hf_name)[block.hf_index]
        self.parameters = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        self.stats: Any = None

    @staticmethod
    def _empty(chunk: Any) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(param.shape, dtype=torch.bfloat16, device=device()) for name, param in chunk.items()}

    def value(self, name: str) -> torch.Tensor:
        """A tensor of the model, the same whenever it is asked for."""
        self.draw.manual_seed(self.seeds[name])
        made = torch.empty(self.shapes[name], dtype=torch.bfloat16, device=device())
        return made.uniform_(-1, 1, generator=self.draw)

    def __call__(self) -> None:
        """Move everything once."""
        self.stats = self.resharder(self.held, TensorTarget(self.got))

    def wrong(self) -> list[str]:
        """Names of tensors of the engine's that are not the model's."""
        out = []
        for params, layouts in zip(self.got, self.wanted, strict=True):
            for name, param in layouts.items():
                for block in param.blocks:
                    if not torch.equal(params[name][block.local_index], self.value(block.hf_name)[block.hf_index]):
                        out.append(f"{name} on rank {dist.rank()} is not {block.hf_name}")
        return out

    @property
    def engine_bytes(self) -> int:
        """What this rank's engine holds."""
        return sum(tensor.nbytes for params in self.got for tensor in params.values())


def slowest(work: Any, repeats: int) -> float:
    """Median over repeats of the slowest rank's seconds, after one call that does not count."""
    work()
    found = []
    for _ in range(repeats):
        dist.barrier("a refit", 120)
        card.synchronize()
        begin = time.perf_counter()
        work()
        card.synchronize()
        found.append(dist.max_over_ranks({"s": time.perf_counter() - begin})["s"])
    return statistics.median(found)


def main(given: list[str] | None = None) -> int:
    """Measure and print; the exit status."""
    size = card.arguments(__doc__, given)
    join()
    try:
        rates = card.copy_rates(size)
        move = Move(size.choose(QWEN_7B, HALF_B, TINY))
        seconds = slowest(move, size.repeats)
        wrong = [sentence for part in dist.gather_objects(move.wrong()) for sentence in part]
        rate = move.engine_bytes / seconds
        if not dist.is_main():
            return card.DISAGREES if wrong else 0
        found = {
            "ranks": dist.world_size(),
            "parameters": move.parameters,
            "seconds": seconds,
            "gb_per_s": rate / 1e9,
            "copy_gb_per_s": rates.within / 1e9,
            "engine_bytes": move.engine_bytes,
            "received_bytes": move.stats.bytes_received,
            "buffer_bytes": move.resharder.transport.buffer_bytes,
        }
        columns = {"ranks": "d", "parameters": ",d", "seconds": ".4f", "gb_per_s": ".1f", "copy_gb_per_s": ".1f"}
        print(card.table([found], columns | {"received_bytes": ",d", "buffer_bytes": ",d"}))
        return card.finish("refit", size, {"refit": rate / rates.within}, wrong, **found)
    finally:
        torch_dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
