"""Does Megatron compute what transformers computes? Logits of one prompt, from both.

The probe runs in fp32 for either params_dtype: bf16 weights are exact in fp32, so the two implementations can
be held to the same tolerance (1e-4 on the largest logit difference) instead of one that bf16 rounding of
activations would need, under which a wrong rotary base or a swapped projection could hide.

transformers gets its weights by their names, straight from the files, not through the map that is on trial; and one
layer at a time, so that a model larger than the host's memory can be probed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from megatron.core import parallel_state as ps
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from treepo_mega.actor.attention import PACKS, PackLayout
from treepo_mega.actor.forward import count_multiple
from treepo_mega.actor.model import PolicyModel, build_model
from treepo_mega.checkpoint.hf import HfReader
from treepo_mega.config import Config
from treepo_mega.modelspec.mcore_layout import EMBEDDING, FINAL_NORM, LM_HEAD, ModelSpec
from treepo_mega.runtime import dist
from treepo_mega.runtime.device import device
from treepo_mega.tree.pack import Trajectory, plan_step

PROBE_TOKENS = 33
LAYER_TOLERANCE = 1e-3
"""A layer diverges when its output differs by more than this share of its largest element."""
_DIRECTIONS = 16
_EMBED, _NORM = EMBEDDING.removesuffix(".weight"), FINAL_NORM.removesuffix(".weight")


class LayerOutputs:
    """Fingerprints of the hidden states behind the embedding, every layer and the final norm: projections on a few
    fixed directions, [T, 16] each. `found`: HF module name -> fingerprint.

    Small enough to be sent between ranks for any model, and any wrong element shows in them.
    """

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def hook(self, module: nn.Module, name: str) -> Any:
        """Watch `module`, whose output is [T, 1, K] or [1, T, K] and which HF calls `name`."""

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            # A layer of megatron-core 0.16 returns (hidden, context); one of transformers 5 returns the tensor alone.
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden.reshape(-1, hidden.shape[-1]).float().cpu()
            # A CPU generator of its own: all ranks and both models draw the same directions, and no global state moves.
            generator = torch.Generator().manual_seed(0)
            self.found[name] = hidden @ torch.randn(hidden.shape[1], _DIRECTIONS, generator=generator)

        return module.register_forward_hook(keep)

    def watch_megatron(self, model: Any) -> list[Any]:
        """Hooks on what a Megatron chunk holds of the places that `watch_transformers` watches."""
        # Megatron counts layers from 1 over all pipeline stages, transformers from 0.
        hooks = [self.hook(layer, f"model.layers.{layer.layer_number - 1}") for layer in model.decoder.layers]
        if model.pre_process:
            hooks.append(self.hook(model.embedding, _EMBED))
        if model.post_process:
            hooks.append(self.hook(model.decoder.final_layernorm, _NORM))
        return hooks

    def first_difference(self, other: LayerOutputs) -> str:
        """The first module, in the order of the model, whose outputs differ; or ""."""
        layers = [f"model.layers.{i}" for i in range(len(other.found))]
        for name in (_EMBED, *layers, _NORM):
            if name in self.found and name in other.found:
                far = (self.found[name] - other.found[name]).abs().max()
                if not far <= LAYER_TOLERANCE * other.found[name].abs().max():
                    return name
        return ""


def probe_tokens(spec: ModelSpec) -> list[int]:
    """Fixed pseudo-random token ids [<= 33], with the first and the last of the vocabulary among them."""
    length = min(PROBE_TOKENS, spec.max_position_embeddings or PROBE_TOKENS)
    if spec.rope_type == "longrope":
        # The probed model has the short factors, which transformers leaves beyond this length.
        length = min(length, spec.rope_scaling["original_max_position_embeddings"])
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
    one = Trajectory(0, list(tokens), 1, 0.0, [0.0] * (len(tokens) - 1))
    (pack,) = plan_step([one], dp_size=1, dp_rank=0, max_tokens=len(tokens), multiple=1).packs
    layout = PackLayout.build(pack, device())

    def step(_: Any, model: Any) -> tuple[Tensor, Any]:
        return model(ids, position, PACKS.add(layout)), partial(_full_logits, unwrap_model(model), vocab_size)

    chunks = list(models)
    for model in chunks:
        model.eval()
    many = len(chunks) > 1
    try:
        data = get_forward_backward_func()(
            forward_step_func=step,
            # The interleaved schedule indexes its iterators by chunk, even if no chunk reads data.
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
    # The padding is the end of the whole vocabulary, hence of the last TP ranks: it is cut after the gather.
    return {"logits": torch.cat(parts, dim=1)[:, :vocab_size].cpu()}


def transformers_logits(
    reader: HfReader, spec: ModelSpec, tokens: Sequence[int], params_dtype: torch.dtype, outputs: LayerOutputs
) -> tuple[Tensor, int]:
    """(logits [T, V] in fp32 from weights rounded to params_dtype, number of parameters), by transformers.

    `outputs` is told what every layer gives. At most one layer's weights are held at a time.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(reader.directory, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    body = model.model
    body.rotary_emb = type(body.rotary_emb)(config)  # its buffers are computed, not stored
    count = sum(p.numel() for p in model.parameters())
    head = _EMBED if spec.tie_word_embeddings else LM_HEAD.removesuffix(".weight")
    layers = {f"model.layers.{i}": layer for i, layer in enumerate(body.layers)}
    for name, module in {_EMBED: body.embed_tokens, **layers, _NORM: body.norm}.items():
        _filled_on_demand(module, name, reader, params_dtype)
        outputs.hook(module, name)
    _filled_on_demand(model.lm_head, head, reader, params_dtype)
    with torch.no_grad():
        return model(torch.tensor([list(tokens)]), use_cache=False).logits[0], count


def _filled_on_demand(module: nn.Module, name: str, reader: HfReader, dtype: torch.dtype) -> None:
    """Let `module`, whose parameters are on no device, read them when it is called and drop them afterwards."""

    def fill(module: nn.Module, _: Any) -> None:
        state = {}
        for key in module.state_dict():
            shape = reader.shape(f"{name}.{key}")
            state[key] = reader.read(f"{name}.{key}", tuple((0, n) for n in shape), dtype).float()
        # Without `assign` the values would be copied into meta tensors, which does nothing.
        module.load_state_dict(state, strict=True, assign=True)

    def drop(module: nn.Module, _: Any, __: Any) -> None:
        module.to("meta")

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop)


def compare_with_transformers(
    cfg: Config, models: Sequence[PolicyModel], spec: ModelSpec, reader: HfReader
) -> tuple[float, int, str]:
    """(largest absolute logit difference, parameters that transformers counts, first layer that diverges or "").

    The same on every rank. One rank (last stage, TP rank 0, replica 0) runs transformers. Collective over all ranks.
    A difference that is not a number counts as infinite.
    """
    exact = list(models)
    if cfg.model.params_dtype != "fp32":
        wide = cfg.model_copy(update={"model": cfg.model.model_copy(update={"params_dtype": "fp32"})})
        exact = build_model(wide, spec)
        with torch.no_grad():
            for target, source in zip(exact, models, strict=True):
                for p, q in zip(target.parameters(), source.parameters(), strict=True):
                    p.copy_(q)
    tokens, ours, theirs = probe_tokens(spec), LayerOutputs(), LayerOutputs()
    hooks = [hook for m in exact for hook in ours.watch_megatron(unwrap_model(m))]
    logits = megatron_logits(cfg, exact, tokens, spec.vocab_size)
    for hook in hooks:
        hook.remove()
    # Each pipeline stage knows its own layers only, so one rank of every stage tells them.
    speaks = ps.get_tensor_model_parallel_rank() == 0 and ps.get_data_parallel_rank(with_context_parallel=True) == 0
    told = dist.gather_objects({n: t.tolist() for n, t in ours.found.items()} if speaks else {})
    found = {"difference": 0.0, "parameters": 0.0}
    diverging = ""
    if logits is not None and speaks:
        expected, count = transformers_logits(reader, spec, tokens, next(models[0].parameters()).dtype, theirs)
        difference = (logits - expected).abs().max().item()
        # An all-reduce may drop a NaN in a maximum; infinity survives it.
        found = {"difference": difference if np.isfinite(difference) else float("inf"), "parameters": float(count)}
        ours.found = {n: torch.tensor(t) for part in told for n, t in part.items()}
        diverging = ours.first_difference(theirs)
    found = dist.max_over_ranks(found)
    # One rank names a layer, all others say "", the smallest string.
    return found["difference"], int(found["parameters"]), max(dist.gather_objects(diverging))
