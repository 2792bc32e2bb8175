"""Names and shapes of a checkpoint's tensors, from the headers of its files."""

from __future__ import annotations

import json
from pathlib import Path

from treepo_mega.engine.stream import EngineError


def checkpoint_shapes(hf_dir: Path, tied: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the checkpoint, from the safetensors headers; no lm_head.weight if tied."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    files = _weight_files(hf_dir)
    for path in files:
        try:
            with safe_open(path, framework="pt") as f:
                shapes |= {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as e:
            raise EngineError(f"{path}: not a readable safetensors file: {e}") from None
    if tied:
        shapes.pop("lm_head.weight", None)
    return {name: s for name, s in shapes.items() if not name.endswith("rotary_emb.inv_freq")}


def _weight_files(hf_dir: Path) -> list[Path]:
    """The checkpoint's safetensors files; with an index, exactly those it names, and each must exist."""
    index = hf_dir / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [hf_dir / n for n in names]
    else:
        files = sorted(hf_dir.glob("*.safetensors"))
    missing = [f.name for f in files if not f.is_file()]
    if missing or not files:
        raise EngineError(f"{hf_dir}: missing weights: {', '.join(missing) or 'no *.safetensors file'}")
    return files
