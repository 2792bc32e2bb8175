"""Initial weights from a checkpoint that Megatron-LM wrote (`--ckpt-format torch_dist`), in any layout.

    DIR/latest_checkpointed_iteration.txt      "100", or "release"
    DIR/iter_0000100/                          .metadata, metadata.json, *.distcp, common.pt

    load_initial_weights(models, spec, path)   # DIR or DIR/iter_0000100, or a checkpoint of this project

The tensors have the names of `GPTModel.sharded_state_dict`, so Megatron's own resharding fits them to this layout.
Optimizer, random states and Transformer Engine's extra states are not read.

Nothing of the checkpoint is run: the description is read by `description.py`, tensors and Megatron's arguments by
`torch.load(weights_only=True)`. The arguments are held against the model's configuration, since a base of rotary angles
or a number of heads does not show in any shape. The files have no checksums: only sizes are checked.
"""

from __future__ import annotations

import pickle
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from treepo_mega.checkpoint.description import read_description
from treepo_mega.checkpoint.error import CheckpointError
from treepo_mega.checkpoint.iterations import find_iteration, is_megatron_lm
from treepo_mega.checkpoint.mcore import (
    ModelChunk,
    check_complete,
    check_tensors,
    load_model_weights,
    sharded_weights,
    sharding,
)
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.runtime import dist

COMMON = "common.pt"
PREFIXES = ("", "model.", "module.")
"""Before the names of all tensors; which one, the embedding's name says."""


def check_initial(path: str | Path) -> Path:
    """The directory that `path` means, once it looks whole. Reads no tensor and needs no process group.

    Raises CheckpointError: missing, incomplete, or of a format that cannot be loaded.
    """
    path = Path(path)
    if not is_megatron_lm(path):
        check_complete(path)
        return path
    return find_iteration(path)


def load_initial_weights(models: Sequence[ModelChunk], spec: ModelSpec, path: str | Path) -> None:
    """Fill `models` in place from a checkpoint of this project or of Megatron-LM. Collective over all ranks.

    Raises CheckpointError, the same on every rank and before anything is loaded.
    """
    path = Path(path)
    if is_megatron_lm(path):
        load_megatron_lm(models, spec, _agreed(path))
    else:
        load_model_weights(models, path)


def _agreed(path: Path) -> Path:
    """The iteration that rank 0 finds, checked: a training that goes on there may add one meanwhile."""
    found = problem = ""
    if dist.is_main():
        try:
            found = str(check_initial(path))
        except CheckpointError as error:
            problem = str(error)
    found, problem = dist.gather_objects([found, problem])[0]
    if problem:
        raise CheckpointError(problem)
    return Path(found)


def load_megatron_lm(models: Sequence[ModelChunk], spec: ModelSpec, directory: Path) -> None:
    """Fill `models` in place from one iteration. Collective over all ranks; raises CheckpointError on all of them."""
    problem = ""
    note = ""
    try:
        description = read_description(directory)
        description.check_files()
        if dist.is_main():
            note = _check_arguments(directory, spec)
    except CheckpointError as error:
        problem = str(error)
    # Nodes may see different files: what one refuses, all refuse.
    if problems := [each for each in dist.gather_objects(problem) if each]:
        raise CheckpointError(problems[0])
    prefix = next((each for each in PREFIXES if f"{each}embedding.word_embeddings.weight" in description.tensors), "")
    stored = {name.removeprefix(prefix): shape for name, shape in description.tensors.items()}
    metadata = sharding()
    # Layers of different kinds are not stacked into one tensor.
    metadata["non_homogeneous_layers"] = any(re.match(r"decoder\.layers\.\d+\.", name) for name in stored)
    wanted = sharded_weights(models, metadata)
    check_tensors(stored, directory, {}, wanted, models)
    tensors, kept, factories = load_preprocess(wanted)
    # Extra states are pickles, and are of FP8 recipes: a run begins with its own.
    _, tensors = extract_matching_values(tensors, lambda value: isinstance(value, ShardedObject))
    add_prefix_for_sharding(tensors, prefix)
    # Megatron's `load` around it would also read common.pt, which another version may have filled with other classes.
    loaded = apply_factory_merges(TorchDistLoadShardedStrategy().load(tensors, directory), factories)
    for index, model in enumerate(models):
        name = f"model{index}"
        told = model.load_state_dict({**kept.get(name, {}), **loaded[name]}, strict=False)
        wrong = [each for each in (*told.missing_keys, *told.unexpected_keys) if not each.endswith("_extra_state")]
        if wrong:
            raise RuntimeError(f"{directory}: Megatron's load and the model disagree over {wrong}")
    if dist.is_main():
        print(f"initial weights of Megatron-LM: {directory}{note}", flush=True)


def _check_arguments(directory: Path, spec: ModelSpec) -> str:
    """Hold Megatron-LM's arguments against the model's configuration; a note for people.

    Raises CheckpointError with all that differs.
    """
    arguments = _arguments(directory)
    if arguments is None:
        return f" (no arguments to compare in its {COMMON}: config.json alone says heads, norms and rotary angles)"
    wrong = [
        f"{name} {getattr(arguments, name)}, here {value}"
        for name, value in _expected(arguments, spec).items()
        if getattr(arguments, name, None) is not None and not _equal(getattr(arguments, name), value)
    ]
    if wrong:
        raise CheckpointError(
            f"{directory}: trained with other settings than config.json of model.hf_checkpoint says: {'; '.join(wrong)}"
        )
    return ""


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(found, int | float):
        return abs(found - expected) <= 1e-6 * abs(expected)
    return bool(found == expected)


def _expected(arguments: Namespace, spec: ModelSpec) -> dict[str, Any]:
    """The arguments of Megatron-LM by which it would build the model of `spec`."""
    expected: dict[str, Any] = {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "kv_channels": spec.head_dim,
        "norm_epsilon": spec.rms_norm_eps,
        "normalization": "RMSNorm",
        "swiglu": True,
        "position_embedding_type": "rope",
        "rotary_base": spec.rope_theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "add_qkv_bias": spec.qkv_bias,
        "qk_layernorm": spec.qk_norm,
        "untie_embeddings_and_output_weights": not spec.tie_word_embeddings,
        "use_rope_scaling": spec.rope_type == "llama3",
    }
    # Without it every head has keys and values of its own, whatever num_query_groups says.
    if getattr(arguments, "group_query_attention", False):
        expected["num_query_groups"] = spec.num_key_value_heads
    elif spec.num_key_value_heads != spec.num_attention_heads:
        expected["group_query_attention"] = True
    if spec.num_experts:
        expected |= {"num_experts": spec.num_experts, "moe_router_topk": spec.experts_per_token}
    else:
        expected["ffn_hidden_size"] = spec.intermediate_size
    multiple = getattr(arguments, "make_vocab_size_divisible_by", None)
    if multiple:
        multiple *= getattr(arguments, "tensor_model_parallel_size", None) or 1
        expected["padded_vocab_size"] = -(-spec.vocab_size // multiple) * multiple
    return expected


def _arguments(directory: Path) -> Namespace | None:
    """Megatron-LM's arguments, of classes that Megatron calls safe; None where there are none, or others in them."""
    from megatron.core.safe_globals import SAFE_GLOBALS

    try:
        with torch.serialization.safe_globals([*SAFE_GLOBALS]):
            common = torch.load(directory / COMMON, map_location="cpu", weights_only=True)
    # RuntimeError: not a file of torch.save.
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError):
        return None
    found = common.get("args") if isinstance(common, dict) else None
    return found if isinstance(found, Namespace) else None
