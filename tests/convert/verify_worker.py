"""Run as two ranks (TP 2): the converters' verification, for right weights and for every kind of wrong ones.

    verify_worker.py HF DIRECTORY

Each bug of bugs.py is planted in the map three times: where HF files are read and where they are compared, so
that only the logits can tell; in the export, the same; and where files are read alone, so that bits tell. Prints, after
"FOUND", a JSON object: kind -> case -> error.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from tests.ranks import report_found
from tests.reshard.bugs import BUGS
from treepo_mega.actor.model import build_model
from treepo_mega.checkpoint import export
from treepo_mega.checkpoint import load as loading
from treepo_mega.checkpoint.hf import HfReader
from treepo_mega.checkpoint.load import load_from_hf, local_params
from treepo_mega.convert import verify
from treepo_mega.convert.convert import conversion_config, hf_to_mcore
from treepo_mega.convert.probe import probe_tokens
from treepo_mega.convert.verify import ConversionError, compare, parameter_count
from treepo_mega.modelspec.mcore_layout import ModelSpec
from treepo_mega.reshard.sides import Side
from treepo_mega.runtime import dist

Bug = Callable[[Side], Side]


@contextlib.contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The map with a bug, wherever the converters use it."""
    layouts, side = loading.chunk_layouts, export.mcore_side

    def chunk_layouts(*args, **sizes):
        return list(bug(Side((layouts(*args, **sizes),), np.zeros(1, np.int64))).layouts[0])

    loading.chunk_layouts = chunk_layouts
    export.mcore_side = verify.mcore_side = lambda *args: bug(side(*args))
    try:
        yield
    finally:
        loading.chunk_layouts = layouts
        export.mcore_side = verify.mcore_side = side


def error_of(work: Callable[[], object]) -> str:
    """The ConversionError of `work`, or ""."""
    try:
        work()
    except ConversionError as e:
        return str(e)
    return ""


def main() -> None:
    """All cases."""
    hf_dir, directory = sys.argv[1], Path(sys.argv[2])
    cfg, spec = conversion_config(hf_dir, tp=2, divisible_by=16), ModelSpec.from_hf(hf_dir)
    dist.initialize(cfg, spec)
    models = build_model(cfg, spec)
    reader = HfReader(hf_dir, spec)

    def load() -> None:
        load_from_hf(models, spec, cfg, hf_dir, reader=reader)

    def against_source() -> str:
        return error_of(lambda: compare(cfg, models, spec, reader))

    def write() -> None:
        with dist.shared_directory(directory / "export", 60) as partial:
            export.write_hf(models, spec, cfg, partial, like=hf_dir, dtype=torch.float32)
            with HfReader(partial, spec) as made:
                compare(cfg, models, spec, made, made="the export")

    found: dict[str, dict[str, str]] = {"right": {}, "read": {}, "one-sided": {}, "export": {}, "spoilt": {}}
    load()
    found["right"]["read"] = against_source()
    for name, bug in BUGS.items():
        with planted(bug):
            load()
            found["read"][name] = against_source()
        found["one-sided"][name] = against_source()
        load()
        with planted(bug):
            found["export"][name] = error_of(write)
    with planted(BUGS["two layers swapped"]):
        found["right"]["command"] = error_of(lambda: hf_to_mcore(hf_dir, directory / "mcore", cfg))
    dist.barrier("the errors", 60)
    found["right"]["left"] = ", ".join(p.name for p in directory.iterdir())

    def spoil(name: str, change: Callable[[torch.Tensor], object]) -> str:
        load()
        for p in (p for m in models for n, p in local_params(m).items() if n == name):
            change(p)
        original = verify.differing_tensors
        # As if the bits agreed: what is left to find the mistake are the logits.
        verify.differing_tensors = lambda *_: (parameter_count(spec), [])
        try:
            return against_source()
        finally:
            verify.differing_tensors = original

    found["spoilt"]["norm negated"] = spoil("decoder.layers.0.input_layernorm.weight", lambda p: p.neg_())
    found["spoilt"]["final norm"] = spoil("decoder.final_layernorm.weight", lambda p: p.mul_(1.01))
    seen = {token % 32 for token in probe_tokens(spec)}  # each rank holds 32 rows of the tied embedding
    unseen = next(row for row in range(32) if row not in seen)
    found["spoilt"]["not a number"] = spoil("embedding.word_embeddings.weight", lambda p: p[unseen].fill_(torch.nan))
    load()
    for m in models:
        m.inv_freq = m.inv_freq * 0.9
    found["spoilt"]["rotary base"] = against_source()
    report_found(found)


if __name__ == "__main__":
    main()
