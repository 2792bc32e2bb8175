"""Is a converted checkpoint the model it was made from? By bits, by the number of parameters, by logits.

Bits alone would not do: what was loaded through a wrong map and is gathered through the same wrong map comes back
right. So the logits of a probe prompt are compared with those of transformers, which knows nothing of the map
(`probe.py`), and an error names the first layer whose output diverges.

    read_back(models, saved)                                          # the saved checkpoint, over unusable weights
    compare(cfg, models, spec, reader, ...)                           # the model against an HF checkpoint
    verify_checkpoint(hf_dir, mcore_dir, cfg)                         # both, for checkpoints that exist

Everything is collective over all ranks and raises ConversionError on all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from treepo_mega.actor.model import DTYPES, PolicyModel, build_model
from treepo_mega.checkpoint.hf import HfReader
from treepo_mega.checkpoint.load import HfGather, local_params
from treepo_mega.checkpoint.mcore import check_complete, load_model_weights
from treepo_mega.config import Config, read_hf_config
from treepo_mega.convert import LOGITS_TOLERANCE
from treepo_mega.convert.probe import compare_with_transformers
from treepo_mega.errors import TreepoError
from treepo_mega.modelspec.mcore_layout import LM_HEAD, ModelSpec, hf_shapes
from treepo_mega.runtime import dist

GATHER_MIB = 32
"""Receiving buffer of the comparison by bits, on each rank, however many ranks there are."""


class ConversionError(TreepoError):
    """The converted weights are not the source's; nothing was left behind."""


def parameter_count(spec: ModelSpec) -> int:
    """Elements of all HF tensors; a tied output matrix counts once."""
    return sum(torch.Size(shape).numel() for shape in hf_shapes(spec).values())


def read_back(models: list[PolicyModel], saved: Path) -> None:
    """Load `saved` over weights that were first made unusable, so that nothing old can pass for it."""
    with torch.no_grad():
        for model in models:
            for p in model.parameters():
                p.fill_(float("nan"))
    load_model_weights([*models], saved)


def compare(
    cfg: Config,
    models: list[PolicyModel],
    spec: ModelSpec,
    reader: HfReader,
    *,
    tolerance: float = LOGITS_TOLERANCE,
    made: str = "the Megatron checkpoint",
    source: str = "the source",
) -> dict[str, Any]:
    """Hold the model against the HF checkpoint of `reader`; returns the findings. `made`, `source`: for messages."""
    dtype = DTYPES[cfg.model.params_dtype]
    elements, wrong = 0, []
    bucket = GATHER_MIB / (cfg.parallel.tensor_model_parallel_size * cfg.parallel.pipeline_model_parallel_size)
    gather = HfGather.of(cfg, spec, dtype=dtype, bucket_mib=bucket)
    for name, tensor in gather([local_params(m) for m in models]):
        elements += tensor.numel()
        if dist.is_main():  # one reader is enough, and rank 0 is the one that reports
            there = reader.read(name, tuple((0, n) for n in tensor.shape), dtype)
            if not torch.equal(tensor.cpu(), there):
                wrong.append(name)
    order = {name: i for i, name in enumerate(hf_shapes(spec))}
    wrong = sorted(dist.gather_objects(wrong)[0], key=order.__getitem__)  # first: in the first layer that diverges
    if wrong:
        raise ConversionError(f"{len(wrong)} tensors of {made} differ from {source}, first {', '.join(wrong[:4])}")
    difference, counted, diverging = compare_with_transformers(cfg, models, spec, reader)
    if not elements == counted == parameter_count(spec):
        raise ConversionError(
            f"parameters: {parameter_count(spec)} by config.json, {elements} in the checkpoint, "
            f"{counted} in transformers"
        )
    if not difference <= tolerance:
        raise ConversionError(
            f"logits of the probe prompt differ from transformers by {difference:.3g}; allowed {tolerance:.3g}; the "
            f"first layer that diverges is {diverging or LM_HEAD.removesuffix('.weight')}"
        )
    return {"max_logit_difference": difference, "logit_tolerance": tolerance}


def verify_checkpoint(
    hf_dir: str | Path, load: str | Path, cfg: Config, *, tolerance: float = LOGITS_TOLERANCE
) -> dict[str, Any]:
    """Hold the Megatron checkpoint `load` against the HF checkpoint `hf_dir`: bits, number of parameters, logits.

    Returns the findings; raises ConversionError naming the first layer that diverges.
    """
    spec = ModelSpec.from_hf(hf_dir)
    check_complete(Path(load))
    with HfReader(hf_dir, spec) as reader:
        dist.initialize(cfg, read_hf_config(hf_dir))
        models = build_model(cfg, hf_dir)
        read_back(models, Path(load))
        return compare(cfg, models, spec, reader, tolerance=tolerance)


def differing_from_memory(models: list[PolicyModel], saved: Path) -> list[str]:
    """Names, over all ranks, of the parameters that come back from `saved` with other bits."""
    kept = [{n: t.clone() for n, t in local_params(m).items()} for m in models]
    read_back(models, saved)
    wrong = [
        n for m, old in zip(models, kept, strict=True) for n, t in local_params(m).items() if not torch.equal(t, old[n])
    ]
    return [n for told in dist.gather_objects(wrong) for n in told]
