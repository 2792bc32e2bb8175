"""Is a converted checkpoint the model it was made from? By bits, by the number of parameters, by logits.

Bits alone would not do: what was loaded through a wrong map and is put together through the same wrong map comes back
right. So the logits of a probe prompt are compared with those of transformers, which knows nothing of the map
(`probe.py`), and an error names the first layer whose output diverges.

    read_back(models, saved)                                          # the saved checkpoint, over unusable weights
    compare(cfg, models, spec, reader, ...)                           # the model against an HF checkpoint
    verify_checkpoint(hf_dir, mcore_dir, cfg)                         # both, for checkpoints that exist

Everything is collective over all ranks and raises ConversionError on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from treepo_mega.actor.model import DTYPES, PolicyModel, build_model
from treepo_mega.checkpoint.export import WholeTensors
from treepo_mega.checkpoint.headers import HfCheckpointError
from treepo_mega.checkpoint.hf import HfReader
from treepo_mega.checkpoint.load import local_params
from treepo_mega.checkpoint.mcore import check_complete, load_model_weights
from treepo_mega.config import Config
from treepo_mega.convert import LOGITS_TOLERANCE
from treepo_mega.convert.probe import compare_with_transformers
from treepo_mega.errors import TreepoError
from treepo_mega.modelspec.mcore_layout import LM_HEAD, ModelSpec, ParamLayout, hf_shapes
from treepo_mega.reshard.execute import Resharder
from treepo_mega.reshard.sides import files_side, grid_of, mcore_side
from treepo_mega.runtime import dist

BUCKET_BYTES = 16 << 20
"""What a rank sends and receives in one round of the comparison by bits. Two rounds are in flight."""


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
                # NaN equals nothing, itself included: a parameter that the load leaves out can pass no comparison.
                p.fill_(float("nan"))
    load_model_weights([*models], saved)


class FileComparison(WholeTensors):
    """This rank's share of the HF tensors as the destination of a reshard: each is compared by bits, none is kept."""

    def __init__(self, layout: Mapping[str, ParamLayout], reader: HfReader, dtype: torch.dtype) -> None:
        super().__init__(layout, dtype)
        self._reader = reader
        self.elements = 0
        self.differing: list[str] = []
        self.unreadable = ""

    def update_weight(self, chunk: int, name: str) -> None:
        """Compare a whole tensor with the file's."""
        tensor = self._open.pop(name)
        self.elements += tensor.numel()
        try:
            stored = self._reader.read(name, tuple((0, size) for size in tensor.shape), self._dtype)
        except HfCheckpointError as error:
            # Raised here, it would leave the other ranks waiting for this one; `differing_tensors` raises on all.
            self.unreadable = self.unreadable or str(error)
            return
        if not torch.equal(tensor, stored):
            self.differing.append(name)

    def finish_weight_update(self) -> None:
        """Nothing to do."""

    def abort_weight_update(self) -> None:
        """Forget what was under way."""
        self._open.clear()


def differing_tensors(
    cfg: Config, models: list[PolicyModel], spec: ModelSpec, reader: HfReader
) -> tuple[int, list[str]]:
    """(elements compared, names of the HF tensors whose bits differ, in the model's order), the same on all ranks.

    Each rank puts its share of the tensors together and reads only those. Collective over all ranks. Raises
    HfCheckpointError on all of them if one cannot read the files.
    """
    dtype = DTYPES[cfg.model.params_dtype]
    world = dist.world_size()
    files = files_side(spec, world)
    resharder = Resharder.between(
        mcore_side(spec, grid_of(cfg), world),
        files,
        source_dtype=dtype,
        target_dtype=dtype,
        bucket_bytes=BUCKET_BYTES,
        timeout_s=cfg.distributed.timeout_s,
    )
    share = FileComparison(files.of(dist.rank())[0], reader, dtype)
    resharder([local_params(m) for m in models], share)
    elements = 0
    wrong: set[str] = set()
    for compared, differing, unreadable in dist.gather_objects([share.elements, share.differing, share.unreadable]):
        if unreadable:
            raise HfCheckpointError(unreadable)
        elements += compared
        wrong |= set(differing)
    # In the model's order: the first one is in the first layer that diverges.
    return elements, [name for name in hf_shapes(spec) if name in wrong]


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
    elements, wrong = differing_tensors(cfg, models, spec, reader)
    if wrong:
        raise ConversionError(f"{len(wrong)} tensors of {made} differ from {source}, first {', '.join(wrong[:4])}")
    difference, counted, diverging = compare_with_transformers(cfg, models, spec, reader)
    if not elements == counted == parameter_count(spec):
        raise ConversionError(
            f"parameters: {parameter_count(spec)} by config.json, {elements} in the checkpoint, "
            f"{counted} in transformers"
        )
    # Not `difference > tolerance`, which lets NaN pass.
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
        dist.initialize(cfg, spec)
        models = build_model(cfg, spec)
        read_back(models, Path(load))
        return compare(cfg, models, spec, reader, tolerance=tolerance)


def differing_from_memory(models: list[PolicyModel], saved: Path) -> list[str]:
    """Names, over all ranks, of the parameters that come back from `saved` with other bits."""
    # Without copies each tensor would be compared with itself: `read_back` fills the same storage.
    kept = [{n: t.clone() for n, t in local_params(m).items()} for m in models]
    read_back(models, saved)
    wrong = [
        n for m, old in zip(models, kept, strict=True) for n, t in local_params(m).items() if not torch.equal(t, old[n])
    ]
    return [n for told in dist.gather_objects(wrong) for n in told]
