"""The tokens that end a response, as a Hugging Face checkpoint names them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from treepo_mega.errors import TreepoError
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.text.tokenizer import Tokenizer


class EndTokenError(TreepoError):
    """A checkpoint names no end token and the configuration names none either."""


def find_eos_token_ids(
    hf_dir: str | Path, tokenizer: Tokenizer | None = None, named: Sequence[int] | None = None
) -> list[int]:
    """End-of-sequence ids: `named` (rollout.stop.eos_token_ids), else the checkpoint's.

    Those are the union of generation_config.json, config.json and the tokenizer. Each may hold an int or a list; the
    order is that of first mention. Raises EndTokenError when there is none at all.
    """
    if named is not None:
        return list(named)
    generation = Path(hf_dir) / "generation_config.json"
    first: list[object] = []
    if generation.is_file():
        value = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
        first = value if isinstance(value, list) else [value]
    found = [*first, *ModelSpec.from_hf(hf_dir).eos_token_ids, getattr(tokenizer, "eos_token_id", None)]
    ids = list(dict.fromkeys(i for i in found if isinstance(i, int)))
    if not ids:
        raise EndTokenError(
            f"{hf_dir}: no EOS token in generation_config.json, config.json or the tokenizer; no path could end by "
            "itself. Set rollout.stop.eos_token_ids"
        )
    return ids
