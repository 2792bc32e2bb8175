"""What a rank reads and pins at its start: an engine that loads the checkpoint against one that a refit fills.

    python tools/bench/start_up.py [--quick]

Two children start one rank each, actor and engine as a training run builds them, on a random model of SmolLM2-135M's
shape in bf16 (--quick: the demo's model). `load`: vLLM reads the checkpoint (`load_format` auto), as `treepo-mega eval`
does. `refit`: it reads nothing (`dummy`), because the first refit writes every weight. Bytes are those of the tensors
and slices that were asked of safetensors files, counted at its API; headers are not counted. The bench fails when an
engine that loads asks for less than the checkpoint, or the other one for anything. Seconds here say little: the file is
in the page cache, and random numbers for `dummy` take a CPU about as long.

The same by plan, per rank of the recipes for GPUs, without a GPU or weights. Read: the actor's slices, plus the whole
checkpoint where the engine loads it, because vLLM reads whole tensors on every rank and keeps its part. Pinned by the
engine: sleep level 1 keeps this rank's weights on the host, level 2 nothing. Pinned for the optimizer: fp32 parameters
and Adam's moments over data-parallel ranks, the mean of these ranks, in blocks as `HostBlocks` takes them and as one
allocation a tensor. Pinned allocations round up to a power of two.

Last line, JSON: {"model", "checkpoint_bytes", "starts": [{"way", "actor_bytes", "engine_bytes", "actor_s",
"engine_s", "engine_cpu_s"}], "recipes": [{"recipe", "ranks", "checkpoint_bytes", "actor_bytes", "load_bytes",
"refit_bytes", "read_by_all_load", "read_by_all_refit", "pinned_engine_1", "pinned_engine_2", "pinned_optimizer",
"pinned_optimizer_one_piece"}]}. Bytes of a rank are the largest over ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from treepo_mega.config import load_config
from treepo_mega.modelspec.mcore_layout import ModelSpec, hf_shapes
from treepo_mega.reshard.sides import engine_side, grid_of, mcore_side
from treepo_mega.sync.handover import HostBlocks

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("load", "refit")
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
RECIPES = (("examples/qwen25_7b_2x8.yaml", 16), ("examples/llama3_70b_16x8.yaml", 128))
BF16, FP32 = 2, 4
COPIES = 3
"""Of each parameter in fp32: itself and Adam's two moments."""


class CountedFile:
    """`safetensors.safe_open`, with the bytes of what is taken out of it."""

    bytes_read = 0

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def __enter__(self) -> CountedFile:
        self._opened.__enter__()
        return self

    def __exit__(self, *error: object) -> Any:
        return self._opened.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def get_tensor(self, name: str) -> Any:
        """A whole tensor."""
        return count(self._opened.get_tensor(name))

    def get_slice(self, name: str) -> CountedSlice:
        """What a part of a tensor is taken from."""
        return CountedSlice(self._opened.get_slice(name))


class CountedSlice:
    """A slice object of safetensors."""

    def __init__(self, whole: Any) -> None:
        self._whole = whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def __getitem__(self, index: Any) -> Any:
        return count(self._whole[index])


def count(tensor: Any) -> Any:
    """The tensor, counted."""
    CountedFile.bytes_read += tensor.nbytes
    return tensor


def count_reads() -> None:
    """From now on; before anything has imported `safe_open` by name."""
    import safetensors
    import safetensors.torch

    late = [name for name in ("vllm", "treepo_mega.checkpoint.hf") if name in sys.modules]
    if late:
        raise RuntimeError(f"{late[0]} was imported before its reads could be counted")
    really = safetensors.safe_open

    def opened(*args: Any, **kwargs: Any) -> CountedFile:
        return CountedFile(really(*args, **kwargs))

    safetensors.safe_open = safetensors.torch.safe_open = opened  # type: ignore[assignment,misc]


def child(way: str, hf: str, dtype: str) -> dict[str, Any]:
    """One rank's actor and engine in this process; bytes and seconds."""
    count_reads()
    from treepo_mega import build
    from treepo_mega.config import parse_config
    from treepo_mega.engine.engine import Engine
    from treepo_mega.runtime import dist

    raw = {
        "model": {"hf_checkpoint": hf, "params_dtype": dtype, "make_vocab_size_divisible_by": 1},
        "data": {"train": [{"reasoning_gym": "chain_sum"}], "max_prompt_len": 64},
        "rollout": {"max_response_len": 64, "segment": {"length": 16}, "engine": {"kv_cache_memory_mb": 64}},
    }
    cfg = parse_config(raw)
    dist.initialize(cfg, ModelSpec.from_hf(hf))
    begin = time.monotonic()
    actor = build.build_actor(cfg)
    actor_s, actor_bytes = time.monotonic() - begin, CountedFile.bytes_read
    begin = time.monotonic()
    cpu = time.process_time()
    if way == "refit":
        kept: Any = build.build_engine(cfg, actor)
    else:
        kept = Engine(hf, cfg, seed=cfg.train.seed)
    engine_s, engine_cpu_s = time.monotonic() - begin, time.process_time() - cpu
    assert kept is not None
    return {
        "way": way,
        "actor_bytes": actor_bytes,
        "engine_bytes": CountedFile.bytes_read - actor_bytes,
        "actor_s": round(actor_s, 2),
        "engine_s": round(engine_s, 2),
        "engine_cpu_s": round(engine_cpu_s, 2),
    }


def start(way: str, hf: Path, dtype: str) -> dict[str, Any]:
    """A child's line."""
    print(f"{way}: a rank starts ...", file=sys.stderr, flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--child", way, str(hf), dtype]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{way} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def random_model(directory: Path) -> None:
    """A checkpoint of SmolLM2-135M's shape with random weights in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SMOLLM2, dtype="bfloat16", eos_token_id=2, bos_token_id=1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)


def stored_bytes(directory: Path) -> int:
    """Of all tensors in the checkpoint."""
    from safetensors import safe_open

    total = 0
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                part = file.get_slice(name)
                total += math.prod(part.get_shape()) * {"F32": FP32, "BF16": BF16}[part.get_dtype()]
    return total


def rounded(size: int) -> int:
    """A pinned allocation of `size` bytes."""
    return 1 << (size - 1).bit_length() if size else 0


def in_blocks(size: int) -> int:
    """The pinned allocations of `HostBlocks` for a tensor of `size` bytes."""
    whole, rest = divmod(size, HostBlocks.BLOCK)
    return whole * HostBlocks.BLOCK + rounded(rest)


def of_a_rank(chunks: Iterable[Any], size_of: Callable[[Any], int]) -> int:
    """The sum over the parameters of a rank's chunks."""
    return sum(size_of(param) for params in chunks for param in params.values())


def by_plan(recipe: str, ranks: int) -> dict[str, Any]:
    """A line for a recipe: bytes of a rank, the largest over ranks, and of all ranks together."""
    cfg = load_config(ROOT / recipe)
    spec = ModelSpec.from_hf(ROOT / cfg.model.hf_checkpoint)
    grid = grid_of(cfg)
    actor = mcore_side(spec, grid, ranks)
    engine = engine_side(cfg, spec, ranks)
    whole = BF16 * sum(math.prod(shape) for shape in hf_shapes(spec).values())
    replicas = grid.replicas(ranks)

    def read(param: Any) -> int:
        return BF16 * sum(block.numel for block in param.blocks)

    def pinned(take: Callable[[int], int]) -> Callable[[Any], int]:
        return lambda param: COPIES * take(FP32 * math.prod(param.shape))

    def largest(side: Any, size_of: Callable[[Any], int]) -> int:
        return max(of_a_rank(chunks, size_of) for chunks in side.layouts)

    slices = [of_a_rank(actor.of(rank), read) for rank in range(ranks)]
    return {
        "recipe": recipe,
        "ranks": ranks,
        "checkpoint_bytes": whole,
        "actor_bytes": max(slices),
        "load_bytes": max(slices) + whole,
        "refit_bytes": max(slices),
        "read_by_all_load": sum(slices) + ranks * whole,
        "read_by_all_refit": sum(slices),
        "pinned_engine_1": largest(engine, lambda param: BF16 * math.prod(param.shape)),
        "pinned_engine_2": 0,
        "pinned_optimizer": largest(actor, pinned(in_blocks)) // replicas,
        "pinned_optimizer_one_piece": largest(actor, pinned(rounded)) // replicas,
    }


def check(starts: list[dict[str, Any]], whole: int) -> None:
    """Raises RuntimeError unless each way read what it must."""
    load, refit = starts
    if load["engine_bytes"] < whole:
        raise RuntimeError(
            f"an engine that loads asked for {load['engine_bytes']} bytes of {whole}: not all was counted"
        )
    if refit["engine_bytes"]:
        raise RuntimeError(f"an engine that a refit fills read {refit['engine_bytes']} bytes of the checkpoint")


def show(starts: list[dict[str, Any]], recipes: list[dict[str, Any]], whole: int) -> None:
    """Tables for people."""
    print(f"one rank, checkpoint of {whole / 1e6:.1f} MB; MB read by    actor   engine   engine's start")
    for row in starts:
        sizes = f"{row['actor_bytes'] / 1e6:9.1f}{row['engine_bytes'] / 1e6:9.1f}"
        print(f"  {row['way']:<48}{sizes}{row['engine_s']:10.1f} s, {row['engine_cpu_s']:.1f} of CPU")
    print("\nby plan, GB                        read by a rank      by all ranks   pinned by a rank: engine, optimizer")
    for row in recipes:
        sizes = [row[key] / 1e9 for key in ("load_bytes", "refit_bytes", "read_by_all_load", "read_by_all_refit")]
        pinned = [row[key] / 1e9 for key in ("pinned_engine_1", "pinned_optimizer_one_piece", "pinned_optimizer")]
        print(f"  {row['recipe']:<30}{sizes[0]:8.1f} -> {sizes[1]:5.1f}{sizes[2]:10.0f} -> {sizes[3]:5.0f}", end="")
        print(f"{pinned[0]:9.1f} -> 0,{pinned[1]:6.1f} -> {pinned[2]:.1f}")


def main() -> int:
    """Start the ranks, plan the recipes; the exit status."""
    if sys.argv[1:2] == ["--child"]:
        way, hf, dtype = sys.argv[2:]
        print(json.dumps(child(way, hf, dtype)), flush=True)
        # The engine's destructor would tear down the process group.
        os._exit(0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the demo's model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        hf, dtype = ROOT / "examples/tiny_reasoner", "fp32"
        if not args.quick:
            hf, dtype = Path(scratch), "bf16"
            random_model(hf)
        whole = stored_bytes(hf)
        starts = [start(way, hf, dtype) for way in WAYS]
    check(starts, whole)
    recipes = [by_plan(*recipe) for recipe in RECIPES]
    show(starts, recipes, whole)
    name = "examples/tiny_reasoner" if args.quick else "SmolLM2-135M's shape, random"
    print(json.dumps({"model": name, "checkpoint_bytes": whole, "starts": starts, "recipes": recipes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
