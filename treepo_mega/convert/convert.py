"""Checkpoints from Hugging Face to Megatron and back, verified. The command is `treepo-mega convert` (`cli.py`).

    SAVE/                      a Megatron torch_dist checkpoint (weights only) with its manifest.json
    SAVE/hf/                   config.json, generation_config.json, tokenizer: the way back needs nothing else
    SAVE/conversion.json       params_dtype, sizes, what the verification found, memory

HF -> Megatron: each rank reads its own slices of the safetensors files, so that it holds its shard and one slice. The
*saved* checkpoint is read back and held against the source (`verify.py`).

Megatron -> HF: any TP x PP reads any checkpoint (also of a training run, with --hf); whole tensors go to the rank that
writes them, and all ranks write shards at the same time (`export.py`). What was written is held against the model.

Megatron -> Megatron: load in the new layout, save, read back, compare; no HF files are involved but config.json.

The three differ in their `Steps`; `_convert` carries them out. SAVE appears when everything is written and verified.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo_mega.actor.model import DTYPES, PolicyModel, build_model
from treepo_mega.checkpoint.export import write_hf
from treepo_mega.checkpoint.hf import HfReader, copy_companions
from treepo_mega.checkpoint.load import load_from_hf
from treepo_mega.checkpoint.mcore import CheckpointError, write_model_weights
from treepo_mega.checkpoint.megatron_lm import check_initial, load_initial_weights
from treepo_mega.config import Config, ConfigError, parse_config
from treepo_mega.convert import LOGITS_TOLERANCE
from treepo_mega.convert.verify import (
    ConversionError,
    compare,
    differing_from_memory,
    parameter_count,
    read_back,
)
from treepo_mega.modelspec.mcore_layout import ModelSpec, hf_shapes
from treepo_mega.runtime import dist
from treepo_mega.runtime.files import require_absent
from treepo_mega.runtime.host_memory import HostPeak

COMPANIONS, NOTE = "hf", "conversion.json"
MIB = 2**20


def conversion_config(
    hf_dir: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    params_dtype: str | None = None,
    divisible_by: int = 128,
    timeout_s: float = 600,
) -> Config:
    """A configuration that holds just a model and a layout. params_dtype None: what config.json says.

    Raises ConfigError for impossible values and for a source dtype that is neither fp32 nor bf16.
    """
    names = {"float32": "fp32", "bfloat16": "bf16", "fp32": "fp32", "bf16": "bf16"}
    if params_dtype is None:
        stored = ModelSpec.from_hf(hf_dir).stored_dtype or "float32"
        if stored not in names:
            raise ConfigError(
                f"{Path(hf_dir) / 'config.json'}: dtype is {stored!r}; choose --params-dtype fp32 or bf16"
            )
        params_dtype = names[stored]
    return parse_config(
        {
            "model": {
                "hf_checkpoint": str(hf_dir),
                "params_dtype": params_dtype,
                "make_vocab_size_divisible_by": divisible_by,
            },
            "parallel": {
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "virtual_pipeline_model_parallel_size": vpp,
            },
            # A conversion reads no prompts; the smallest lengths keep the model's window from mattering.
            "data": {"train": [{"path": "none"}], "max_prompt_len": 1},
            "rollout": {"max_response_len": 1},
            "distributed": {"timeout_s": timeout_s},
        },
        source="command line",
    )


Models = list[PolicyModel]


@dataclass(frozen=True, slots=True)
class Steps:
    """What tells one conversion from another. Each step is collective over all ranks.

    `load(models)` fills the model; returns the bytes `of` all weights and, if it counts them, those this rank `read`.
    `write(models, directory)` fills an empty directory; returns what else the note says.
    `prove(models, directory)` holds what was written against its source; returns the findings, or raises
    ConversionError.
    `companions`: configuration, tokenizer and the note go beside the weights.
    """

    load: Callable[[Models], dict[str, int]]
    write: Callable[[Models, Path], dict[str, Any]]
    prove: Callable[[Models, Path], dict[str, Any]]
    companions: bool = True


def hf_to_mcore(
    hf_dir: str | Path, save: str | Path, cfg: Config, *, verify: bool = True, tolerance: float = LOGITS_TOLERANCE
) -> dict[str, Any]:
    """Convert the HF checkpoint in `hf_dir` to a Megatron checkpoint `save`; returns what conversion.json holds.

    Collective over all ranks of a `torchrun` that fits `cfg`. Raises HfCheckpointError, ModelSpecError, ConfigError,
    OutputExistsError for bad input and ConversionError when the verification fails; then `save` does not exist.
    """
    spec = ModelSpec.from_hf(hf_dir)
    require_absent(save)
    # Before any process group: bad input needs no cluster to be found.
    with HfReader(hf_dir, spec) as reader:

        def load(models: Models) -> dict[str, int]:
            load_from_hf(models, spec, cfg, hf_dir, reader=reader)
            # Taken here: the verification reads the files once more through the same reader.
            return {"of": reader.total_bytes, "read": reader.bytes_read}

        def prove(models: Models, directory: Path) -> dict[str, Any]:
            read_back(models, directory)
            return compare(cfg, models, spec, reader, tolerance=tolerance)

        return _convert(cfg, spec, hf_dir, save, Steps(load, _writer(cfg), prove), verify=verify)


def mcore_to_mcore(load: str | Path, save: str | Path, cfg: Config) -> dict[str, Any]:
    """Rewrite the weights of checkpoint `load` as `save` in the layout of `cfg`, and verify the copy by bits.

    Collective over all ranks of a `torchrun` that fits `cfg`. Raises ConversionError when what is read back differs;
    then `save` does not exist.
    """

    def prove(models: Models, directory: Path) -> dict[str, Any]:
        if wrong := differing_from_memory(models, directory):
            raise ConversionError(f"{wrong[0]} read back from the new checkpoint differs ({len(wrong)} in all)")
        return {}

    hf_dir = cfg.model.hf_checkpoint
    spec = ModelSpec.from_hf(hf_dir)
    return _convert(cfg, spec, hf_dir, save, Steps(_loader(load, cfg, spec), _writer(cfg), prove), verify=True)


def mcore_to_hf(
    load: str | Path,
    save: str | Path,
    cfg: Config,
    *,
    max_shard_bytes: int = 5 << 30,
    verify: bool = True,
    tolerance: float = LOGITS_TOLERANCE,
) -> dict[str, Any]:
    """Export the Megatron checkpoint `load` as the HF checkpoint `save`; `cfg.model.hf_checkpoint` gives config
    and tokenizer. Collective over all ranks of a `torchrun` that fits `cfg`, whatever layout wrote the checkpoint.

    Raises ConversionError when what was written is not the model's weights; then `save` does not exist.
    """
    hf_dir = cfg.model.hf_checkpoint
    spec = ModelSpec.from_hf(hf_dir)

    def write(models: Models, directory: Path) -> dict[str, Any]:
        dtype = DTYPES[cfg.model.params_dtype]
        return write_hf(models, spec, cfg, directory, like=hf_dir, dtype=dtype, max_shard_bytes=max_shard_bytes)

    def prove(models: Models, directory: Path) -> dict[str, Any]:
        with HfReader(directory, spec) as reader:
            words = {"made": "the export", "source": "the Megatron checkpoint"}
            return compare(cfg, models, spec, reader, tolerance=tolerance, **words)

    steps = Steps(_loader(load, cfg, spec), write, prove, companions=False)
    return _convert(cfg, spec, hf_dir, save, steps, verify=verify)


def _loader(load: str | Path, cfg: Config, spec: ModelSpec) -> Callable[[Models], dict[str, int]]:
    """The step that reads Megatron checkpoint `load`. Raises CheckpointError at once when it is not complete."""
    # Here, not in `fill`: an incomplete checkpoint is found before a process group and a model exist.
    check_initial(load)

    def fill(models: Models) -> dict[str, int]:
        load_initial_weights([*models], spec, load)
        return {"of": parameter_count(spec) * DTYPES[cfg.model.params_dtype].itemsize}

    return fill


def _writer(cfg: Config) -> Callable[[Models, Path], dict[str, Any]]:
    """The step that writes a Megatron checkpoint."""

    def write(models: Models, directory: Path) -> dict[str, Any]:
        write_model_weights([*models], directory, cfg.distributed.timeout_s)
        sizes = cfg.parallel
        return {
            "make_vocab_size_divisible_by": cfg.model.make_vocab_size_divisible_by,
            "written_by": {"tp": sizes.tensor_model_parallel_size, "pp": sizes.pipeline_model_parallel_size},
        }

    return write


def _convert(
    cfg: Config, spec: ModelSpec, hf_dir: str | Path, save: str | Path, steps: Steps, *, verify: bool
) -> dict[str, Any]:
    """Load, write, prove, publish; returns the note. An error on any rank leaves no `save`. Collective over all ranks.

    `hf_dir`: the directory with configuration and tokenizer.
    """
    started = time.perf_counter()
    require_absent(save)
    dist.initialize(cfg, spec)
    with dist.shared_directory(save, cfg.distributed.timeout_s) as directory:
        with HostPeak() as writing:
            models = build_model(cfg, spec)
            memory = steps.load(models)
            written = steps.write(models, directory)
        memory |= {"shard": _bytes(models), "peak": writing.bytes}
        findings: dict[str, Any] = {}
        if verify:
            with HostPeak() as verifying:
                findings = steps.prove(models, directory)
            memory["verify_peak"] = verifying.bytes
        # Every rank makes the note, because `_busiest` is collective; one rank writes it.
        note = {
            "architecture": spec.architecture,
            "params_dtype": cfg.model.params_dtype,
            "tensors": len(hf_shapes(spec)),
            "parameters": parameter_count(spec),
            "verified": verify,
            **findings,
            **written,
            "memory": _busiest(memory),
            "seconds": round(time.perf_counter() - started, 2),
        }
        if steps.companions and dist.is_main():
            (directory / COMPANIONS).mkdir()
            copy_companions(hf_dir, directory / COMPANIONS)
            (directory / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    return note


def _bytes(models: Models) -> int:
    return sum(p.numel() * p.element_size() for m in models for p in m.parameters())


def _busiest(memory: dict[str, int]) -> dict[str, float]:
    """Bytes -> the largest of each over the ranks, MiB, under `<name>_mib`. Collective over all ranks."""
    return {k: round(v, 3) for k, v in dist.max_over_ranks({f"{k}_mib": v / MIB for k, v in memory.items()}).items()}


def companions_of(load: str | Path, hf_dir: str | Path | None) -> Path:
    """The directory with config.json and tokenizer for a checkpoint: `hf_dir`, else the one kept beside it."""
    found = Path(hf_dir) if hf_dir else Path(load) / COMPANIONS
    if not (found / "config.json").is_file():
        hint = "" if hf_dir else "; name the model's HF directory with --hf (a training checkpoint keeps no copy)"
        raise CheckpointError(f"{found / 'config.json'}: no such file{hint}")
    return found


def stored_dtype(load: str | Path) -> str | None:
    """params_dtype that a converted checkpoint was written with; None when it does not say.

    Raises CheckpointError for a note that cannot be read.
    """
    note = Path(load) / NOTE
    if not note.is_file():
        return None
    try:
        return str(json.loads(note.read_text(encoding="utf-8"))["params_dtype"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{note}: expected a JSON object with params_dtype; choose --params-dtype") from None
