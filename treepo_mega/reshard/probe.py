"""Does Megatron compute what transformers computes? Logits of one prompt, from both.

The probe runs in fp32 for either params_dtype: bf16 weights are exact in fp32, so the two implementations can
be held to the same tolerance (1e-4 on the largest logit difference) instead of one that bf16 rounding of
activations would need, under which a wrong rotary base or a swapped projection could hide.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor

from treepo_mega.actor.attention import PACKS, PackLayout
from treepo_mega.actor.forward import count_multiple
from treepo_mega.actor.model import PolicyModel, build_model
from treepo_mega.config import Config
from treepo_mega.reshard.layout import ModelSpec
from treepo_mega.runtime import cpu_megatron, dist
from treepo_mega.runtime.device import device

cpu_megatron.install()

from megatron.core import parallel_state as ps  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402

PROBE_TOKENS = 33
LOGITS_TOLERANCE = 1e-4
"""Largest absolute logit difference allowed, fp32 arithmetic."""


def probe_tokens(spec: ModelSpec) -> list[int]:
    """Fixed pseudo-random token ids [<= 33], with the first and the last of the vocabulary among them."""
    length = min(PROBE_TOKENS, spec.max_position_embeddings or PROBE_TOKENS)
    middle = np.random.default_rng(0).integers(0, spec.vocab_size, max(0, length - 2))
    return [0, *middle.tolist(), spec.vocab_size - 1][:length]


@torch.no_grad()
def megatron_logits(
    cfg: Config, models: Sequence[PolicyModel], tokens: Sequence[int], vocab_size: int
) -> Tensor | None:
    """Logits [T, vocab_size], fp32 on the CPU, on last-stage ranks; None elsewhere. Collective over model parallel.

    Needs sequence_parallel off.
    """
    ids = torch.tensor([tokens], device=device())
    position = torch.arange(len(tokens), device=device())[None]
    ends = np.full(len(tokens), len(tokens), np.int64)
    layout = PackLayout.build(len(tokens), [(0, len(tokens))], ends, device())

    def step(_: Any, model: Any) -> tuple[Tensor, Any]:
        return model(ids, position, PACKS.add(layout)), partial(_full_logits, unwrap_model(model), vocab_size)

    chunks = list(models)
    for model in chunks:
        model.eval()
    many = len(chunks) > 1
    try:
        data = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[None] * len(chunks) if many else None,
            model=chunks if many else chunks[0],
            num_microbatches=count_multiple(cfg),
            seq_length=len(tokens),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    finally:
        PACKS.clear()
    return data[0]["logits"] if data else None


def _full_logits(model: PolicyModel, vocab_size: int, hidden: Tensor, non_loss_data: bool = True) -> dict[str, Tensor]:
    """Megatron's loss callback: this rank's logits, gathered over TP, without the vocabulary's padding."""
    local = F.linear(hidden[:, 0], model.head_weight()).float().contiguous()
    group = ps.get_tensor_model_parallel_group()
    parts = [torch.empty_like(local) for _ in range(torch_dist.get_world_size(group))]
    torch_dist.all_gather(parts, local, group=group)
    return {"logits": torch.cat(parts, dim=1)[:, :vocab_size].cpu()}


def transformers_logits(hf_dir: str | Path, tokens: Sequence[int], params_dtype: torch.dtype) -> tuple[Tensor, int]:
    """(logits [T, V] in fp32 from weights rounded to params_dtype, number of parameters), by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        for p in model.parameters():  # parameters only: rounding the rotary buffers would change the model
            p.copy_(p.to(params_dtype))
        logits = model(torch.tensor([list(tokens)])).logits[0]
    return logits, sum(p.numel() for p in model.parameters())


def compare_with_transformers(
    cfg: Config, models: Sequence[PolicyModel], spec: ModelSpec, hf_dir: str | Path
) -> tuple[float, int]:
    """(largest absolute logit difference, parameters that transformers counts), the same on every rank.

    One rank (last stage, TP rank 0, replica 0) runs transformers. Collective over all ranks. A difference that
    is not a number counts as infinite.
    """
    exact = list(models)
    if cfg.model.params_dtype != "fp32":
        wide = cfg.model_copy(update={"model": cfg.model.model_copy(update={"params_dtype": "fp32"})})
        exact = build_model(wide, hf_dir)
        with torch.no_grad():
            for target, source in zip(exact, models, strict=True):
                for p, q in zip(target.parameters(), source.parameters(), strict=True):
                    p.copy_(q)
    tokens = probe_tokens(spec)
    logits = megatron_logits(cfg, exact, tokens, spec.vocab_size)
    found = {"difference": 0.0, "parameters": 0.0}
    checker = ps.get_tensor_model_parallel_rank() == 0 and ps.get_data_parallel_rank(with_context_parallel=True) == 0
    if logits is not None and checker:
        expected, count = transformers_logits(hf_dir, tokens, next(models[0].parameters()).dtype)
        difference = (logits - expected).abs().max().item()
        found = {"difference": difference if np.isfinite(difference) else float("inf"), "parameters": float(count)}
    found = dist.max_over_ranks(found)
    return found["difference"], int(found["parameters"])
