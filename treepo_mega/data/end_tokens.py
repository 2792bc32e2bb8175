"""What of a Hugging Face checkpoint is read beside the weights themselves: end tokens, tensor names and shapes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treepo_mega.engine.vllm_setup import EngineError


def find_eos_token_ids(hf_dir: str | Path, tokenizer: Any = None, named: Sequence[int] | None = None) -> list[int]:
    """End-of-sequence ids: `named` (rollout.stop.eos_token_ids), else the checkpoint's.

    Those are the union of generation_config.json, config.json and the tokenizer. Each may hold an int or a list; the
    order is that of first mention. Raises EngineError when there is none at all.
    """
    if named is not None:
        return list(named)
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = Path(hf_dir) / name
        if path.is_file():
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            found += value if isinstance(value, list) else [value]
    found.append(getattr(tokenizer, "eos_token_id", None))
    ids = list(dict.fromkeys(i for i in found if isinstance(i, int)))
    if not ids:
        raise EngineError(
            f"{hf_dir}: no EOS token in generation_config.json, config.json or the tokenizer; no path could end by "
            "itself. Set rollout.stop.eos_token_ids"
        )
    return ids


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
