"""Two ranks of test_megatron_lm.py: `megatron_lm_worker.py DIRECTORY`, whose folders of models are there.

Writes checkpoints as Megatron-LM's training does: its plain GPTModel, and arguments, optimizer and random states
beside it. Loads them in other layouts, over weights that were made unusable. Rank 0 writes what happened to
results.json.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnBackend

from tests.checkpoint.training_worker import begin, difference, steps, weights
from treepo_mega.actor.model import PolicyModel, transformer_config
from treepo_mega.actor.update import Actor
from treepo_mega.checkpoint.mcore import CheckpointError
from treepo_mega.checkpoint.megatron_lm import load_initial_weights
from treepo_mega.config import Config
from treepo_mega.modelspec.mcore_layout import padded_vocab
from treepo_mega.runtime import dist
from treepo_mega.runtime.megatron_versions import complete_checkpoint

TOKENS = [5, 17, 3, 80, 41, 2, 2, 9, 66, 30, 12]
LOADS = {
    "hf": ("tp2", ["tp2", "pp2", "vpp2", "dp2"]),
    "untied": ("pp2", ["tp2"]),
    "experts": ("experts_ep2", ["experts_tp2", "experts_pp2"]),
}
"""Folder of a model: the layout that writes, and those that load."""


def plain_model(cfg: Config, actor: Actor, like: PolicyModel) -> GPTModel:
    """Megatron's own model of this stage with the weights of `like`."""
    spec = actor.spec
    config = transformer_config(cfg, spec)
    layer = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, qk_layernorm=spec.qk_norm)
    if spec.num_experts:
        # As Megatron-LM's layers of Transformer Engine have it, which models with experts are trained with.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    # Megatron's torch norm refuses sequence parallelism, which means nothing to a checkpoint.
    config.sequence_parallel = False
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer,
        vocab_size=padded_vocab(spec, 8, cfg.parallel.tensor_model_parallel_size),
        max_sequence_length=256,
        pre_process=ps.is_pipeline_first_stage(),
        post_process=ps.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=spec.tie_word_embeddings,
        position_embedding_type="rope",
    )
    told = model.load_state_dict(like.state_dict(), strict=False)
    assert not [name for name in (*told.missing_keys, *told.unexpected_keys) if not name.endswith("_extra_state")]
    return model


def arguments(cfg: Config, actor: Actor) -> Namespace:
    """What Megatron-LM's command line would have said, and some of what else it keeps there."""
    spec = actor.spec
    tp = cfg.parallel.tensor_model_parallel_size
    return Namespace(
        num_layers=spec.num_layers, hidden_size=spec.hidden_size, num_attention_heads=spec.num_attention_heads,
        group_query_attention=True, num_query_groups=spec.num_key_value_heads, kv_channels=spec.head_dim,
        ffn_hidden_size=spec.expert_intermediate_size or spec.intermediate_size, norm_epsilon=spec.rms_norm_eps,
        normalization="RMSNorm", swiglu=True, position_embedding_type="rope", rotary_base=int(spec.rope_theta),
        rotary_percent=1.0, rotary_interleaved=False, add_qkv_bias=spec.qkv_bias, qk_layernorm=spec.qk_norm,
        untie_embeddings_and_output_weights=not spec.tie_word_embeddings, use_rope_scaling=False,
        num_experts=spec.num_experts or None, moe_router_topk=spec.experts_per_token or 2,
        make_vocab_size_divisible_by=8, tensor_model_parallel_size=tp, padded_vocab_size=padded_vocab(spec, 8, tp),
        params_dtype=torch.float32, attention_backend=AttnBackend.auto, iteration=100, load=None,
    )  # fmt: skip


def write(directory: Path, folder: str, layout: str) -> tuple[Config, Actor]:
    """DIRECTORY/lm_FOLDER as Megatron-LM leaves it after 100 iterations."""
    cfg, actor = begin(directory, layout, folder)
    (like,) = actor.models
    # The optimizer has no state before its first step.
    steps(cfg, actor, range(1))
    root = directory / f"lm_{folder}"
    target = root / "iter_0000100"
    if dist.is_main():
        target.mkdir(parents=True)
    dist.barrier("the directory", 60)
    weights_of_model = plain_model(cfg, actor, like).sharded_state_dict()
    if folder == "untied":
        # As wrappers around the model leave it.
        add_prefix_for_sharding(weights_of_model, "module.")
    of_optimizer = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True),
    }
    # The optimizer looks its parameters up in the state of the model that it steps.
    own = like.sharded_state_dict(metadata=of_optimizer)
    state = {
        "args": arguments(cfg, actor),
        "checkpoint_version": 3.0,
        "iteration": 100,
        "model": weights_of_model,
        "optimizer": actor.optimizer.sharded_state_dict(own, is_loading=False, metadata=of_optimizer),
        "opt_param_scheduler": actor.scheduler.state_dict(),
        "rng_state": ShardedObject("rng_state", [{"np": np.zeros(3)}], (dist.world_size(),), (dist.rank(),)),
    }
    dist_checkpointing.save(state, str(target))
    if dist.is_main():
        complete_checkpoint(target)
        (root / "latest_checkpointed_iteration.txt").write_text("100")
    dist.barrier("the checkpoint", 60)
    return cfg, actor


def unusable(actor: Actor) -> None:
    """No weight passes for one that was loaded."""
    with torch.no_grad():
        for model in actor.models:
            for parameter in model.parameters():
                parameter.fill_(float("nan"))


def logprobs(actor: Actor) -> list[float] | None:
    """Of TOKENS, as rank 0 hears them from a last stage."""
    found = actor.sequence_logprobs(TOKENS)
    told = dist.gather_objects(None if found is None else found.tolist())
    return next(each for each in told if each is not None)


def loads(directory: Path, folder: str) -> dict[str, Any]:
    """Per layout: how far weights and logprobs are from those of the run that wrote."""
    layout, others = LOADS[folder]
    cfg, actor = write(directory, folder, layout)
    expected = weights(cfg, actor)
    said = logprobs(actor)
    found: dict[str, Any] = {}
    for other in others:
        cfg, actor = begin(directory, other, folder)
        unusable(actor)
        # Once by the tracker, and by name.
        named = directory / f"lm_{folder}" / ("" if other == others[0] else "iter_0000100")
        load_initial_weights(actor.models, actor.spec, named)
        actor.weights_changed()
        off = np.abs(np.subtract(logprobs(actor), said)).max()
        found[other] = {"weights_off": difference(weights(cfg, actor), expected), "logprobs_off": float(off)}
    return found


def refused(directory: Path, folder: str, of: str, layout: str) -> str:
    """What loading the checkpoint of folder `of` into the model of `folder` says; the same on all ranks."""
    _, actor = begin(directory, layout, folder)
    try:
        load_initial_weights(actor.models, actor.spec, directory / f"lm_{of}")
        said = ""
    except CheckpointError as error:
        said = str(error)
    (told,) = set(dist.gather_objects(said))
    return told


def main() -> None:
    """Everything in one launch."""
    directory = Path(sys.argv[1])
    results: dict[str, Any] = {"loads": {folder: loads(directory, folder) for folder in LOADS}}
    for of, folder, layout in (
        ("hf", "untied", "tp2"),
        ("untied", "hf", "tp2"),
        ("hf", "rotated", "dp2"),
        ("hf", "qwen2", "tp2"),
        ("experts", "fewer", "experts_ep2"),
    ):
        results[f"{of} into {folder}"] = refused(directory, folder, of, layout)
    if dist.is_main():
        (directory / "results.json").write_text(json.dumps(results, indent=1))
    dist.leave()


if __name__ == "__main__":
    main()
