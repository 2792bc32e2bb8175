"""Checkpoints from Hugging Face to Megatron and back, verified. The commands are in tools/convert_*.py.

    SAVE/                      a Megatron torch_dist checkpoint (weights only) with its manifest.json
    SAVE/hf/                   config.json, generation_config.json, tokenizer: the way back needs nothing else
    SAVE/conversion.json       params_dtype, sizes, what the verification found

HF -> Megatron: each rank reads its own slices of the safetensors files. Verification reads the *saved*
checkpoint back over weights that were first made unusable, gathers them, and demands that names, shapes, the number of
parameters and every bit agree with the source (rounded to params_dtype), and that the logits of a probe prompt
agree with transformers (`probe.py`). Only then does SAVE appear, by a rename.

Megatron -> HF: any TP x PP reads any checkpoint (also of a training run, with --hf); whole tensors go to the rank that
writes them, and all ranks write shards at the same time (`export.py`).

Megatron -> Megatron: load in the new layout, save, read back, compare; no HF files are involved but config.json.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from treepo_mega.actor.checkpoint import CheckpointError, check_complete, load_model_weights, save_model_weights
from treepo_mega.actor.model import DTYPES, PolicyModel, build_model
from treepo_mega.config import Config, ConfigError, parse_config, read_hf_config
from treepo_mega.reshard.export import export_hf
from treepo_mega.reshard.gather import HfGather, load_from_hf, local_params
from treepo_mega.reshard.hf import HfReader, copy_companions, publish, require_absent
from treepo_mega.reshard.layout import ModelSpec, hf_shapes
from treepo_mega.reshard.probe import LOGITS_TOLERANCE, compare_with_transformers
from treepo_mega.runtime import dist

COMPANIONS, NOTE = "hf", "conversion.json"


class ConversionError(ValueError):
    """The converted weights are not the source's; nothing was left behind."""


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
        models = build_model(cfg, hf_dir)
        load_from_hf(models, spec, cfg, hf_dir, reader=reader)
        staging = save.parent / f".{save.name}.converting"
        save_model_weights([*models], staging, cfg.distributed.timeout_s)
        note = _note(cfg, spec, verified=verify)
        try:
            if verify:
                note |= _verify(cfg, models, spec, reader, staging, tolerance)
        except ConversionError:
            if dist.is_main():
                shutil.rmtree(staging)
            raise
    note["seconds"] = round(time.perf_counter() - started, 2)
    if dist.is_main():
        _publish(staging, save, note, hf_dir)
    dist.barrier(f"publishing {save}", cfg.distributed.timeout_s)
    return note


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


def parameter_count(spec: ModelSpec) -> int:
    """Elements of all HF tensors; a tied output matrix counts once."""
    return sum(torch.Size(shape).numel() for shape in hf_shapes(spec).values())


def _verify(
    cfg: Config, models: list[PolicyModel], spec: ModelSpec, reader: HfReader, saved: Path, tolerance: float
) -> dict[str, Any]:
    """Read `saved` back and hold it against the source; the findings, or ConversionError on every rank."""
    with torch.no_grad():
        for model in models:
            for p in model.parameters():
                p.fill_(float("nan"))
    load_model_weights([*models], saved)
    dtype = DTYPES[cfg.model.params_dtype]
    elements, wrong = 0, []
    for name, tensor in HfGather.of(cfg, spec, dtype=dtype)([local_params(m) for m in models]):
        elements += tensor.numel()
        if dist.is_main():  # one reader is enough, and rank 0 is the one that reports
            source = reader.read(name, tuple((0, n) for n in tensor.shape), dtype)
            if not torch.equal(tensor.cpu(), source):
                wrong.append(name)
    bad = int(dist.max_over_ranks({"wrong": float(len(wrong))})["wrong"])
    if bad:
        order = {name: i for i, name in enumerate(hf_shapes(spec))}
        wrong.sort(key=order.__getitem__)  # the first one is in the first layer that diverges
        names = f", first {', '.join(wrong[:4])}" if wrong else " (named by rank 0)"
        raise ConversionError(f"{bad} tensors of the Megatron checkpoint differ from the source{names}")
    difference, counted, diverging = compare_with_transformers(cfg, models, spec, reader.directory)
    if not elements == counted == parameter_count(spec):
        raise ConversionError(
            f"parameters: {parameter_count(spec)} by config.json, {elements} in the checkpoint, "
            f"{counted} in transformers"
        )
    if not difference <= tolerance:
        raise ConversionError(
            f"logits of the probe prompt differ from transformers by {difference:.3g}; allowed {tolerance:.3g}; the "
            f"first layer that diverges is {diverging or 'none: final norm or output layer'}"
        )
    return {"max_logit_difference": difference, "logit_tolerance": tolerance}


def verify_checkpoint(
    hf_dir: str | Path, load: str | Path, cfg: Config, *, tolerance: float = LOGITS_TOLERANCE
) -> dict[str, Any]:
    """Hold the Megatron checkpoint `load` against the HF checkpoint `hf_dir`: bits, number of parameters, logits.

    Returns the findings; raises ConversionError naming the first layer that diverges. Collective over all ranks.
    """
    spec = ModelSpec.from_hf(hf_dir)
    check_complete(Path(load))
    with HfReader(hf_dir, spec) as reader:
        dist.initialize(cfg, read_hf_config(hf_dir))
        return _verify(cfg, build_model(cfg, hf_dir), spec, reader, Path(load), tolerance)


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
    models = build_model(cfg, hf_dir)
    load_model_weights([*models], load)
    staging = save.parent / f".{save.name}.converting"
    save_model_weights([*models], staging, cfg.distributed.timeout_s)
    wrong = _differs_from_memory(models, staging)
    note = _note(cfg, spec, verified=True)
    if wrong:
        if dist.is_main():
            shutil.rmtree(staging)
        raise ConversionError(f"{wrong[0]} read back from the new checkpoint differs ({len(wrong)} in all)")
    note["seconds"] = round(time.perf_counter() - started, 2)
    if dist.is_main():
        _publish(staging, save, note, hf_dir)
    dist.barrier(f"publishing {save}", cfg.distributed.timeout_s)
    return note


def _differs_from_memory(models: list[PolicyModel], saved: Path) -> list[str]:
    """Names, over all ranks, of the parameters that come back from `saved` with other bits."""
    kept = [{n: t.clone() for n, t in local_params(m).items()} for m in models]
    with torch.no_grad():
        for m in models:
            for p in m.parameters():
                p.fill_(float("nan"))
    load_model_weights([*models], saved)
    wrong = [
        n for m, old in zip(models, kept, strict=True) for n, t in local_params(m).items() if not torch.equal(t, old[n])
    ]
    return [n for told in dist.gather_objects(wrong) for n in told]


def _publish(staging: Path, save: Path, note: dict[str, Any], companions: str | Path) -> None:
    """Add configuration, tokenizer and note, and make the checkpoint appear."""
    (staging / COMPANIONS).mkdir()
    copy_companions(companions, staging / COMPANIONS)
    (staging / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    publish(staging, save)


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


def mcore_to_hf(load: str | Path, save: str | Path, cfg: Config, *, max_shard_bytes: int = 5 << 30) -> dict[str, Any]:
    """Export the Megatron checkpoint `load` as the HF checkpoint `save`; `cfg.model.hf_checkpoint` gives config
    and tokenizer. Collective over all ranks of a `torchrun` that fits `cfg`, whatever layout wrote the checkpoint.
    """
    started, hf_dir = time.perf_counter(), Path(cfg.model.hf_checkpoint)
    spec, dtype = ModelSpec.from_hf(hf_dir), DTYPES[cfg.model.params_dtype]
    check_complete(Path(load))
    require_absent(save)
    dist.initialize(cfg, read_hf_config(hf_dir))
    models = build_model(cfg, hf_dir)
    load_model_weights([*models], load)
    written = export_hf(models, spec, cfg, save, like=hf_dir, dtype=dtype, max_shard_bytes=max_shard_bytes)
    return {
        "architecture": spec.architecture,
        "params_dtype": cfg.model.params_dtype,
        "tensors": len(hf_shapes(spec)),
        "parameters": parameter_count(spec),
        **written,
        "seconds": round(time.perf_counter() - started, 2),
    }
