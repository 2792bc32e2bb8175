"""Megatron distributed checkpoints: save, resume in any layout, and never leave half of one looking whole.

    <save>/step_000010/            torch_dist files of megatron.core.dist_checkpointing
    <save>/step_000010/manifest.json   written last and fsynced: step, layout, sizes and SHA-256 of the files

A checkpoint is written under `.step_N.partial` and renamed once its manifest is on disk, so a directory named
`step_N` is complete or was tampered with (`directories.find_latest` compares sizes and digests). Weights and
optimizer state are saved by global tensor, so another TP x PP x DP layout can load them.

Before anything is loaded, the ranks read the files once, each its share, and compare their SHA-256: a flipped bit is
named, not trained on. Then names and shapes of the stored tensors are held against the model's, and the vocabulary's
size against the one it was saved with: rows of padding may differ, and Megatron by itself would let any rows differ.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from treepo_mega.checkpoint.description import read_description
from treepo_mega.checkpoint.error import CheckpointError
from treepo_mega.checkpoint.iterations import MANIFEST
from treepo_mega.checkpoint.refused import writes_told
from treepo_mega.errors import nearest
from treepo_mega.runtime import dist
from treepo_mega.runtime.device import has_cuda
from treepo_mega.runtime.files import atomic_file
from treepo_mega.runtime.kin import own_writer_process
from treepo_mega.runtime.megatron_versions import complete_checkpoint

TRAINER_STATE = "trainer_state"
MAIN_STATE = "main_state"
"""What rank 0 alone knew when it was saved; every rank reads it."""


class ModelChunk(Protocol):
    """What saving and loading need of a chunk of a model; `actor.model.PolicyModel` has it."""

    @property
    def unpadded_vocab_size(self) -> int:
        """Rows of the embedding that stand for a token."""

    def sharded_state_dict(self, *, metadata: dict[str, Any]) -> dict[str, Any]:
        """Megatron's sharded tensors by their global names."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool) -> Any:
        """Fill the parameters, in place."""


def sharded_weights(models: Sequence[ModelChunk], metadata: dict[str, Any]) -> dict[str, Any]:
    """Sharded state of all chunks of this rank; keys are global names, so the chunk count may differ on load."""
    return {f"model{i}": model.sharded_state_dict(metadata=metadata) for i, model in enumerate(models)}


def sharding() -> dict[str, Any]:
    """Megatron's metadata of a sharded state."""
    return {
        # Megatron 0.16's dp_reshardable loads only under another DP size; this one under any TP, PP and DP.
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True),
    }


def _inner_optimizers(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _uses_torch_adam(optimizer: Any) -> bool:
    return isinstance(getattr(optimizer, "optimizer", None), torch.optim.Adam | torch.optim.AdamW)


def _is_distributed(optimizer: Any) -> bool:
    return hasattr(optimizer, "gbuf_ranges")


def _give_state(o: Any) -> None:
    """Make the state that torch's AdamW makes in its first step."""
    # Loading writes into it, and a run that saves before it ever stepped has something to save. Megatron's own way
    # takes a step, which decays weights.
    for group in o.optimizer.param_groups:
        for param in group["params"]:
            if not o.optimizer.state[param]:
                zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                o.optimizer.state[param] = {"step": torch.tensor(0.0), **zeros}


def _prepare_optimizer_for_load(optimizer: Any) -> None:
    """Give a fresh distributed optimizer over torch's AdamW the state that loading writes into."""
    # Without Transformer Engine and Apex. With either, Megatron does this itself.
    for inner in _inner_optimizers(optimizer):
        if not (_uses_torch_adam(inner) and _is_distributed(inner)):
            continue
        _give_state(inner)
        # What Megatron copies back after loading leaves `step` out, and the optimizer would begin at 0.
        copy_back = inner._set_main_param_and_optimizer_states

        def with_step(
            model_param: Any, tensors: dict[str, Any], inner: Any = inner, copy_back: Any = copy_back
        ) -> None:
            group, order = inner.model_param_group_index_map[model_param]
            state = inner.optimizer.state[inner.optimizer.param_groups[group]["params"][order]]
            copy_back(model_param, {**tensors, "step": tensors.get("step", state["step"])})

        inner._set_main_param_and_optimizer_states = with_step


def _restore_zero_step(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Megatron's unsharded optimizers leave out a `step` of 0 when they save, and miss it when they load."""
    inner = _inner_optimizers(optimizer)
    if len(inner) == 1 and _uses_torch_adam(inner[0]) and not _is_distributed(inner[0]):
        loaded.get("optimizer", loaded)["state"].setdefault("common_step", torch.tensor(0.0))


def _separate_steps(optimizer: Any) -> None:
    """One `step` tensor per parameter again."""
    # After loading, all parameters share one, which then advances once per parameter.
    for inner in _inner_optimizers(optimizer):
        if _uses_torch_adam(inner) and _is_distributed(inner):
            for state in inner.optimizer.state.values():
                state["step"] = state["step"].clone()


def write_model_weights(models: Sequence[ModelChunk], directory: Path, timeout_s: float) -> None:
    """Write weights only (for converters) into an empty directory that the caller publishes. Collective over all
    ranks, within the block of a `dist.shared_directory`."""
    state = sharded_weights(models, sharding())
    _write(state, directory, {"kind": "weights", "vocab_size": _vocab_size(models)}, timeout_s)


def load_model_weights(models: Sequence[ModelChunk], directory: str | Path) -> None:
    """Load weights saved in any layout into `models`, in place. Collective over all ranks.

    Raises CheckpointError, the same on every rank and before anything is loaded, for damaged files and for tensors
    that are not the model's.
    """
    directory = Path(directory)
    state = sharded_weights(models, sharding())
    manifest = check_complete(directory)
    check_digests(directory, manifest)
    check_tensors(read_description(directory).tensors, directory, manifest, state, models)
    loaded = dist_checkpointing.load(state, str(directory))
    for i, model in enumerate(models):
        model.load_state_dict(loaded[f"model{i}"], strict=True)


def save_training(
    directory: Path,
    models: Sequence[ModelChunk],
    optimizer: Any,
    scheduler: Any,
    trainer: dict[str, Any],
    timeout_s: float,
    of_main: dict[str, Any] | None = None,
) -> None:
    """Save weights, optimizer, LR schedule and `trainer` (a JSON-able dict). Collective over all ranks.

    `of_main`: more of it that rank 0 alone has; other ranks' is not looked at. `directory` appears whole; an older
    checkpoint under its name stays until then.
    """
    state, note = training_state(models, optimizer, scheduler, trainer, of_main)
    with dist.shared_directory(directory, timeout_s, replace=True) as partial:
        _write(state, partial, note, timeout_s)


def training_state(
    models: Sequence[ModelChunk],
    optimizer: Any,
    scheduler: Any,
    trainer: dict[str, Any],
    of_main: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `save_training` writes, as Megatron's sharded state, and what its manifest says of it."""
    metadata = sharding()
    for inner in filter(_uses_torch_adam, _inner_optimizers(optimizer)):
        _give_state(inner)
    state = sharded_weights(models, metadata)
    weights = _merged(state)
    state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=False, metadata=metadata)
    # Plain JSON text: Megatron would unpickle anything else on load.
    state[TRAINER_STATE] = json.dumps({"trainer": trainer, "scheduler": scheduler.state_dict()})
    state[MAIN_STATE] = json.dumps(of_main or {})
    return state, {"kind": "training", "step": trainer["step"], "vocab_size": _vocab_size(models)}


def load_training(
    directory: Path, models: Sequence[ModelChunk], optimizer: Any, scheduler: Any, *, known_whole: bool = False
) -> dict[str, Any]:
    """Restore what `save_training` saved, in place; returns its `trainer` dict. Collective over all ranks.

    `known_whole`: the files were just compared with their digests (`find_latest`). Raises as `load_model_weights`.
    """
    manifest = check_complete(directory)
    if not known_whole:
        check_digests(directory, manifest)
    metadata = sharding()
    _prepare_optimizer_for_load(optimizer)
    state = sharded_weights(models, metadata)
    check_tensors(read_description(directory).tensors, directory, manifest, state, models)
    _check_chain(directory, manifest)
    state["optimizer"] = optimizer.sharded_state_dict(_merged(state), is_loading=True, metadata=metadata)
    loaded = dist_checkpointing.load(state, str(directory))
    for i, model in enumerate(models):
        model.load_state_dict(loaded[f"model{i}"], strict=True)
    _restore_zero_step(optimizer, loaded["optimizer"])
    # In fp32 the optimizer's shards are views of the parameters: autograd refuses to write into these.
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
    _separate_steps(optimizer)
    texts = json.loads(loaded[TRAINER_STATE])
    scheduler.load_state_dict(texts["scheduler"])
    # A checkpoint of before rank 0 had trees of its own lacks the second one.
    return texts["trainer"] | json.loads(loaded.get(MAIN_STATE, "{}"))


def _merged(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer looks parameters up in one state dict, or per chunk under model0, model1, ..."""
    chunks = [chunk for name, chunk in state.items() if name.startswith("model")]
    return chunks[0] if len(chunks) == 1 else state


def _write(state: dict[str, Any], directory: Path, note: dict[str, Any], timeout_s: float) -> None:
    """The state's files into an empty directory, then the manifest. Collective over all ranks.

    Raises CheckpointError when the file system refuses: it is full, read-only, or gone.
    """
    own_writer_process()
    with writes_told(directory):
        # Megatron broadcasts what it compares between ranks, and warns where they differ.
        dist_checkpointing.save(state, str(directory), preprocess_common_before_consistancy_check=of_all_ranks)
        if dist.is_main():
            complete_checkpoint(directory)
    seal(directory, note, timeout_s)


def seal(directory: Path, note: dict[str, Any], timeout_s: float) -> None:
    """The manifest of what is in `directory`, with digests. Collective over all ranks."""
    # Every rank lists the directory to find its share: a file that another rank still writes would be missing.
    dist.barrier(f"saving to {directory}", timeout_s)
    digests = _digests(directory, _files(directory))
    if dist.is_main():
        # Last: a directory without a manifest was cut short.
        _write_manifest(directory, note, digests)
    dist.barrier(f"the manifest of {directory}", timeout_s)


def of_all_ranks(common: dict[str, Any]) -> dict[str, Any]:
    """What must be equal on all ranks of a checkpoint's common state."""
    return {name: value for name, value in common.items() if name != MAIN_STATE}


def _files(directory: Path) -> list[str]:
    """All files below `directory`, sorted, by their paths relative to it."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def _digests(directory: Path, names: list[str]) -> dict[str, str]:
    """File -> SHA-256, on every rank; each reads its share of the files. Collective over all ranks."""
    mine = {}
    for name in names[dist.rank() :: dist.world_size()]:
        with (directory / name).open("rb") as file:
            mine[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {name: digest for told in dist.gather_objects(mine) for name, digest in told.items()}


def _write_manifest(directory: Path, note: dict[str, Any], digests: dict[str, str]) -> None:
    files = {name: (directory / name).stat().st_size for name in _files(directory)}
    layout = {
        "tensor_model_parallel_size": ps.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": ps.get_pipeline_model_parallel_world_size(),
        "data_parallel_size": ps.get_data_parallel_world_size(),
        "expert_model_parallel_size": ps.get_expert_model_parallel_world_size(),
        "cuda": has_cuda(),
    }
    with atomic_file(directory / MANIFEST) as file:
        json.dump({**note, "layout": layout, "files": files, "sha256": digests}, file, indent=1)


def check_complete(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there with their sizes; else CheckpointError."""
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no {MANIFEST}: not a checkpoint, or its writing was cut short; use another one"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: not the manifest of a checkpoint; use another one") from None
    for name, size in files.items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            found = file.stat().st_size if file.is_file() else "nothing"
            raise CheckpointError(
                f"{file}: expected {size} bytes, found {found}: the checkpoint is damaged; use another one"
            )
    return manifest


def check_digests(directory: Path, manifest: dict[str, Any]) -> None:
    """Raise CheckpointError, the same on every rank, for a file whose SHA-256 is not the manifest's.

    Each rank reads its share of the files. Manifests without digests (of earlier versions) are not checked.
    Collective over all ranks.
    """
    expected = manifest.get("sha256", {})
    found = _digests(directory, sorted(expected))
    for name, digest in expected.items():
        if found[name] != digest:
            raise CheckpointError(
                f"{directory / name}: SHA-256 is {found[name][:12]}..., {MANIFEST} says {digest[:12]}...: the file "
                "was changed or damaged since it was written; use another checkpoint"
            )


def _vocab_size(models: Sequence[ModelChunk]) -> int:
    """The vocabulary without its padding."""
    return models[0].unpadded_vocab_size


def _sharded(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    """The sharded tensors of a state; a gated MLP's first layer is a factory of two."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from _sharded({"made": value.build()})
        elif isinstance(value, ShardedTensor):
            yield value


def check_tensors(
    described: Mapping[str, list[int]],
    directory: Path,
    manifest: dict[str, Any],
    state: dict[str, Any],
    models: Sequence[ModelChunk],
) -> None:
    """Hold the stored tensors, as `described`, against the model's by name and global shape.

    Layers are stacked in Megatron's global tensors, so another number of layers shows in their first dimension. Only
    the rows that pad a vocabulary may differ. Raises CheckpointError on every rank. Collective over all ranks.
    """
    stored = {
        name: shape
        for name, shape in described.items()
        # With expert parallelism there are two optimizers, chained_0.optimizer and chained_1.optimizer.
        if not re.match(r"(chained_\d+\.)?optimizer\.", name)
    }
    wanted: dict[str, tuple[list[int], bool]] = {}
    here = {tensor.key: (list(tensor.global_shape), tensor.allow_shape_mismatch) for tensor in _sharded(state)}
    # A stage holds its own layers alone: only all ranks together have the model's names.
    for told in dist.gather_objects(here):
        wanted |= told
    _check_experts(directory, stored, {name: shape for name, (shape, _) in wanted.items()})
    vocabulary = _vocab_size(models)
    stored_vocabulary = manifest.get("vocab_size", _vocab_size(models))
    for name, (shape, padded) in wanted.items():
        if name not in stored:
            near = nearest(name, set(stored) - set(wanted) or stored)
            raise CheckpointError(f"{directory}: tensor {name} {shape} is missing{near}")
        # Megatron by itself lets any rows differ where a tensor may be padded; only rows of padding may.
        padding = padded and stored[name][1:] == shape[1:] and stored[name][0] >= vocabulary
        if (stored[name] != shape and not padding) or (padded and vocabulary != stored_vocabulary):
            rows, need = (f" for a vocabulary of {size}" if padded else "" for size in (stored_vocabulary, vocabulary))
            raise CheckpointError(f"{directory}: tensor {name} has shape {stored[name]}{rows}; expected {shape}{need}")
    if extra := sorted(set(stored) - set(wanted)):
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(f"{directory}: tensor {extra[0]} {stored[extra[0]]}{more} is not in the model")


def _check_chain(directory: Path, manifest: dict[str, Any]) -> None:
    """Raise CheckpointError for optimizer state of another chain of optimizers than Megatron builds here."""
    # With expert parallelism experts have an optimizer of their own, and all state is stored under other names.
    stored = manifest.get("layout", {}).get("expert_model_parallel_size", 1)
    here = ps.get_expert_model_parallel_world_size()
    if (stored > 1) != (here > 1):
        raise CheckpointError(
            f"{directory}: optimizer state of expert_model_parallel_size {stored} cannot be loaded with {here}: "
            "both must be 1, or both above 1. Weights alone fit any layout: convert them (treepo-mega convert) "
            "and start from them with model.load"
        )


def _check_experts(directory: Path, stored: Mapping[str, list[int]], wanted: Mapping[str, list[int]]) -> None:
    """Raise CheckpointError for another number of experts than the model's: all of its tensors differ then."""
    counts = [
        # A router's weights are [layers, experts, hidden].
        next((shape[-2] for name, shape in tensors.items() if name.endswith(".router.weight")), 0)
        for tensors in (stored, wanted)
    ]
    if counts[0] != counts[1]:
        raise CheckpointError(
            f"{directory}: the checkpoint has {counts[0]} experts; the model has {counts[1]} (config.json of "
            "model.hf_checkpoint)"
        )
