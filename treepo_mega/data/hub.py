"""Data sets of the Hugging Face Hub by their id, through the package `datasets`.

    find_hub_parts("openai/gsm8k@[0:100]", subset="main", split="train")

A path that exists on this machine is never looked up on the Hub. `hf://openai/gsm8k` always means the Hub.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from treepo_mega.config.source import expand_path
from treepo_mega.data.files import Part, sliced, split_slice
from treepo_mega.data.rows import PromptError, Row, file_format

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PREFIX = re.compile(r"hf://(?:datasets/)?")


def hub_id(spec: str) -> str | None:
    """The Hub id that `path` or `path@[a:b]` names, or None for files.

    >>> hub_id("openai/gsm8k@[0:9]"), hub_id("hf://gsm8k"), hub_id("data/train.jsonl")
    ('openai/gsm8k', 'gsm8k', None)
    """
    text, _, _ = split_slice(spec)
    if _PREFIX.match(text):
        return _PREFIX.sub("", text, count=1)
    looks_so = _ID.fullmatch(text) is not None and not file_format(Path(text))[0]
    # `data/trian` below a directory that is there is a mistyped path, not an owner on the Hub.
    return text if looks_so and not Path(expand_path(text)).exists() and not Path(text).parent.exists() else None


def require_datasets(name: str) -> None:
    """Raises PromptError when the package that reads the Hub is not installed; nothing is imported."""
    if importlib.util.find_spec("datasets") is None:
        raise PromptError(
            f"{name}: no such file or directory; to read it from the Hugging Face Hub, install the package: pip "
            f"install datasets. Without it: {_by_hand(name)}"
        )


def find_hub_parts(spec: str, name: str, subset: str | None, split: str) -> list[Part]:
    """The rows of Hub data set `name` that `spec` means, as one part. Downloads what is not in the local cache.

    Raises PromptError when the package is missing or the data set cannot be had, with its own words and what to do.
    """
    require_datasets(name)
    import datasets

    where = f"{name} ({', '.join(filter(None, (subset, split)))})"
    try:
        table: Any = datasets.load_dataset(name, subset, split=split)
    except Exception as error:
        offline = [flag for flag in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(flag, "0") != "0"]
        cause = f"{offline[0]} is set, and it is not in the local cache; unset it, or " if offline else ""
        raise PromptError(
            f"{where}: cannot be read from the Hugging Face Hub: {error}. {cause or 'Set subset and split, or '}"
            f"{_by_hand(name)}"
        ) from None

    def read(start: int, stop: int | None) -> Iterator[Row]:
        for index, values in islice(enumerate(table), start, stop):
            yield Row(f"{where}, row {index}", index, dict(values))

    _, start, stop = split_slice(spec)
    part = Part(name.rpartition("/")[2], where, read)
    return sliced([part], [lambda: len(table)], start, stop, spec)


def _by_hand(name: str) -> str:
    return (
        f"download it where there is a network: hf download --repo-type dataset {name} --local-dir DIR; then path: DIR"
    )
