"""New weights for a real engine in a test: the whole map, written in place as a reshard does."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from safetensors.torch import load_file

from treepo_mega.engine.engine import Engine
from treepo_mega.modelspec.mcore_layout import ModelSpec
from treepo_mega.modelspec.vllm_layout import vllm_layout


def write_weights(
    engine: Engine,
    directory: Path,
    *,
    tp: int = 1,
    tp_rank: int = 0,
    expert_parallel: bool = False,
    without: Collection[str] = (),
) -> None:
    """Write the single-file checkpoint at `directory` into `engine`, but for the engine's parameters in `without`."""
    tensors = load_file(directory / "model.safetensors")
    layout = vllm_layout(ModelSpec.from_hf(directory), tp, tp_rank, expert_parallel=expert_parallel)
    target = engine.weight_target()
    target.init_weight_transfer(layout)

    def move() -> None:
        target.start_weight_update()
        try:
            for name, param in layout.items():
                if name in without:
                    continue
                buffer = target.buffer(0, name)
                for block in param.blocks:
                    buffer[block.local_index] = tensors[block.hf_name][block.hf_index]
                target.update_weight(0, name)
            target.finish_weight_update()
        except BaseException:
            target.abort_weight_update()
            raise

    engine.update_weights_by(move)
