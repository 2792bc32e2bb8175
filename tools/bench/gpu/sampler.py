"""The engine that the benches of this folder share: `tools/bench/rollout.py`'s, with a model of the card's size."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from tools.bench import rollout
from tools.bench.gpu import card
from treepo_mega.monitor.progress import quieten_libraries
from treepo_mega.runtime.device import device, has_cuda

LARGE = rollout.MODEL | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128,
}  # fmt: skip
TINY = rollout.MODEL | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32,
}  # fmt: skip


@functools.cache
def bench(size: card.Size) -> tuple[rollout.Bench, int]:
    """(an engine with random weights in bf16 and prompts, bytes of its weights); one for every caller of this process.

    Whoever asks for it ends its process with `card.leave`.
    """
    quieten_libraries()
    # Kept to the end: the generator reads the configuration in it.
    card.LEFT_BEHIND.append(tempfile.TemporaryDirectory())
    directory = Path(card.LEFT_BEHIND[-1].name)
    with torch.device(device()):
        parameters = rollout.make_model(directory, "bf16", size.choose(LARGE, LARGE, TINY))
    if has_cuda():
        torch.cuda.empty_cache()
    graphs = "full_decode_only" if has_cuda() else "none"
    engine = {"cuda_graphs": graphs, "gpu_memory_utilization": 0.5, "kv_cache_memory_mb": 64}
    made = rollout.Bench(directory, "bf16", size.choose(64, 16, 2), **engine)
    return made, parameters * torch.bfloat16.itemsize
