"""Checkpoints from Hugging Face to Megatron and back, verified. The commands are in tools/convert_*.py.

    SAVE/                      a Megatron torch_dist checkpoint (weights only) with its manifest.json
    SAVE/hf/                   config.json, generation_config.json, tokenizer: the way back needs nothing else
    SAVE/conversion.json       params_dtype, sizes, what the verification found, memory

HF -> Megatron: each rank reads its own slices of the safetensors files, so that it holds its shard and one slice. The
*saved* checkpoint is read back and held against the source (`verify.py`).

Megatron -> HF: any TP x PP reads any checkpoint (also of a training run, with --hf); whole tensors go to the rank that
writes them, and all ranks write shards at the same time (`export.py`). What was written is held against the model.

Megatron -> Megatron: load in the new layout, save, read back, compare; no HF files are involved but config.json.

SAVE appears by a rename, when everything is written and verified. An error leaves nothing; a killed conversion leaves
a directory whose name begins with a dot, which the next one replaces.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treepo_mega.actor.model import DTYPES, PolicyModel, build_model
from treepo_mega.checkpoint.export import export_hf
from treepo_mega.checkpoint.hf import HfReader, copy_companions, require_absent
from treepo_mega.checkpoint.load import load_from_hf
from treepo_mega.checkpoint.mcore import CheckpointError, check_complete, load_model_weights, save_model_weights
from treepo_mega.config import Config, ConfigError, parse_config, read_hf_config
from treepo_mega.convert.probe import LOGITS_TOLERANCE
from treepo_mega.convert.verify import (
    ConversionError,
    compare,
    differing_from_memory,
    parameter_count,
    read_back,
)
from treepo_mega.modelspec.mcore_layout import ModelSpec, hf_shapes
from treepo_mega.runtime import dist
from treepo_mega.runtime.files import publish_directory
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
    hf = read_hf_config(hf_dir)
    if params_dtype is None:
        stored = hf.get("dtype") or hf.get("torch_dtype") or "float32"
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


@contextlib.contextmanager
def _staged(save: Path) -> Iterator[Path]:
    """Where to write what will be `save`. Any rank's error removes it."""
    staging = save.parent / f".{save.name}.converting"
    try:
        yield staging
    except BaseException:
        for directory in (staging, staging.with_name(staging.name + ".partial")):
            shutil.rmtree(directory, ignore_errors=True)
        raise


def hf_to_mcore(
    hf_dir: str | Path, save: str | Path, cfg: Config, *, verify: bool = True, tolerance: float = LOGITS_TOLERANCE
) -> dict[str, Any]:
    """Convert the HF checkpoint in `hf_dir` to a Megatron checkpoint `save`; returns what conversion.json holds.

    Collective over all ranks of a `torchrun` that fits `cfg`. Raises HfCheckpointError, ModelSpecError, ConfigError
    for bad input and ConversionError when the verification fails; then `save` does not exist.
    """
    started, save = time.perf_counter(), Path(save).absolute()
    spec = ModelSpec.from_hf(hf_dir)
    require_absent(save)
    with HfReader(hf_dir, spec) as reader:  # before any process group: bad input needs no cluster to be found
        dist.initialize(cfg, read_hf_config(hf_dir))
        with _staged(save) as staging:
            with HostPeak() as peak:
                models = build_model(cfg, hf_dir)
                load_from_hf(models, spec, cfg, hf_dir, reader=reader)
                read = reader.bytes_read
                save_model_weights([*models], staging, cfg.distributed.timeout_s)
            note = _note(cfg, spec, verified=verify)
            memory = {
                "read": read,
                "of": reader.total_bytes,
                "shard": _bytes(models),
                "peak": peak.bytes,
            }
            if verify:
                with HostPeak() as peak:
                    read_back(models, staging)
                    note |= compare(cfg, models, spec, reader, tolerance=tolerance)
                memory["verify_peak"] = peak.bytes
            note["memory"] = _busiest(memory)
            _publish(staging, save, note, hf_dir, started, cfg)
    return note


def _bytes(models: list[PolicyModel]) -> int:
    return sum(p.numel() * p.element_size() for m in models for p in m.parameters())


def _busiest(memory: dict[str, int]) -> dict[str, float]:
    """Bytes -> the largest of each over the ranks, MiB, under `<name>_mib`. Collective over all ranks."""
    return {k: round(v, 3) for k, v in dist.max_over_ranks({f"{k}_mib": v / MIB for k, v in memory.items()}).items()}


def _note(cfg: Config, spec: ModelSpec, *, verified: bool) -> dict[str, Any]:
    """What conversion.json says of any new checkpoint."""
    p = cfg.parallel
    return {
        "architecture": spec.architecture,
        "params_dtype": cfg.model.params_dtype,
        "make_vocab_size_divisible_by": cfg.model.make_vocab_size_divisible_by,
        "written_by": {"tp": p.tensor_model_parallel_size, "pp": p.pipeline_model_parallel_size},
        "tensors": len(hf_shapes(spec)),
        "parameters": parameter_count(spec),
        "verified": verified,
    }


def mcore_to_mcore(load: str | Path, save: str | Path, cfg: Config) -> dict[str, Any]:
    """Rewrite the weights of checkpoint `load` as `save` in the layout of `cfg`, and verify the copy by bits.

    Collective over all ranks of a `torchrun` that fits `cfg`. Raises ConversionError when what is read back differs;
    then `save` does not exist.
    """
    started, save, hf_dir = time.perf_counter(), Path(save).absolute(), Path(cfg.model.hf_checkpoint)
    spec = ModelSpec.from_hf(hf_dir)
    check_complete(Path(load))
    require_absent(save)
    dist.initialize(cfg, read_hf_config(hf_dir))
    with _staged(save) as staging:
        with HostPeak() as peak:
            models = build_model(cfg, hf_dir)
            load_model_weights([*models], load)
            save_model_weights([*models], staging, cfg.distributed.timeout_s)
        memory = {"of": _model_bytes(spec, cfg), "shard": _bytes(models), "peak": peak.bytes}
        with HostPeak() as peak:
            wrong = differing_from_memory(models, staging)
        if wrong:
            raise ConversionError(f"{wrong[0]} read back from the new checkpoint differs ({len(wrong)} in all)")
        note = _note(cfg, spec, verified=True)
        note["memory"] = _busiest(memory | {"verify_peak": peak.bytes})
        _publish(staging, save, note, hf_dir, started, cfg)
    return note


def _model_bytes(spec: ModelSpec, cfg: Config) -> int:
    return parameter_count(spec) * DTYPES[cfg.model.params_dtype].itemsize


def _publish(
    staging: Path, save: Path, note: dict[str, Any], companions: str | Path, started: float, cfg: Config
) -> None:
    """Add configuration, tokenizer and note, and make the checkpoint appear. Collective over all ranks."""
    note["seconds"] = round(time.perf_counter() - started, 2)
    if dist.is_main():
        (staging / COMPANIONS).mkdir()
        copy_companions(companions, staging / COMPANIONS)
        (staging / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        publish_directory(staging, save)
    dist.barrier(f"publishing {save}", cfg.distributed.timeout_s)


def companions_of(load: str | Path, hf_dir: str | Path | None) -> Path:
    """The directory with config.json and tokenizer for a checkpoint: `hf_dir`, else the one kept beside it."""
    found = Path(hf_dir) if hf_dir else Path(load) / COMPANIONS
    if not (found / "config.json").is_file():
        hint = "" if hf_dir else "; name the model's HF directory with --hf (a training checkpoint keeps no copy)"
        raise CheckpointError(f"{found / 'config.json'}: no such file{hint}")
    return found


def stored_dtype(load: str | Path) -> str | None:
    """params_dtype that a converted checkpoint was written with; None when it does not say."""
    note = Path(load) / NOTE
    return json.loads(note.read_text(encoding="utf-8"))["params_dtype"] if note.is_file() else None


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
    started, hf_dir = time.perf_counter(), Path(cfg.model.hf_checkpoint)
    spec, dtype = ModelSpec.from_hf(hf_dir), DTYPES[cfg.model.params_dtype]
    check_complete(Path(load))
    require_absent(save)
    dist.initialize(cfg, read_hf_config(hf_dir))
    found: dict[str, Any] = {}
    memory: dict[str, int] = {"of": _model_bytes(spec, cfg)}
    writing = HostPeak()

    def check(written: Path) -> None:
        """Once the export is written, before it appears. Raises ConversionError. Collective over all ranks."""
        writing.stop()
        if verify:
            with HostPeak() as peak, HfReader(written, spec) as reader:
                words = {"made": "the export", "source": "the Megatron checkpoint"}
                found.update(compare(cfg, models, spec, reader, tolerance=tolerance, **words))
            memory["verify_peak"] = peak.bytes

    with writing:
        models = build_model(cfg, hf_dir)
        load_model_weights([*models], load)
        options: dict[str, Any] = {"like": hf_dir, "dtype": dtype, "max_shard_bytes": max_shard_bytes, "check": check}
        written = export_hf(models, spec, cfg, save, **options)
    memory |= {"shard": _bytes(models), "peak": writing.bytes}
    return {
        "architecture": spec.architecture,
        "params_dtype": cfg.model.params_dtype,
        "tensors": len(hf_shapes(spec)),
        "parameters": parameter_count(spec),
        "verified": verify,
        **found,
        **written,
        "memory": _busiest(memory),
        "seconds": round(time.perf_counter() - started, 2),
    }
