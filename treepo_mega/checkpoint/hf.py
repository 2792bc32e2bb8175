"""Hugging Face checkpoints on disk: read by slices; the names and companions of what an export writes.

    with HfReader(directory, spec) as reader:              # checks the key set and every shape, from the headers
        part = reader.read("model.norm.weight", ((0, 64),), torch.float32)

A rank reads only the slices its parameters need (`safetensors.get_slice`), so loading 70B over 128 ranks
reads each byte about once. `export.py` writes checkpoints.

Traps: old Llama files carry `rotary_emb.inv_freq` buffers, which are derived and skipped. A tied model may
carry an `lm_head.weight` too: it is compared with the embedding where that is read, since transformers would
ignore it and a difference would mean that the configuration lies. Only safetensors: a pickle can run code.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from treepo_mega.checkpoint.headers import (
    HfCheckpointError,
    check_against,
    stored_tensors,
)
from treepo_mega.modelspec.mcore_layout import EMBEDDING, LM_HEAD, Box, ModelSpec

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "*.model",
    "LICENSE*",
)


class HfReader:
    """Tensors of a checkpoint directory, by slices. Files are opened when first needed and closed on exit.

    `total_bytes`: of all tensors, as stored; `bytes_read`: of the slices handed out so far.

    Raises HfCheckpointError on construction for files that are missing, damaged or not those of `spec` (`headers.py`).
    """

    def __init__(self, directory: str | Path, spec: ModelSpec) -> None:
        self.directory = Path(directory)
        self.bytes_read = 0
        self._files: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        self._stored = stored_tensors(self.directory)
        self.total_bytes = check_against(self.directory, self._stored, spec)
        self._tied_head = spec.tie_word_embeddings and LM_HEAD in self._stored

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        self._files.clear()
        self._stack.close()

    def read(self, name: str, box: Box, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The box `((start, stop), ...)` of tensor `name`, on the CPU, cast to `dtype` (None: as stored).

        Raises HfCheckpointError for values that are no finite numbers, and for a tied head that is not the embedding.
        """
        index = tuple(slice(a, b) for a, b in box)
        part = self._slice(name)[index]
        self.bytes_read += part.nbytes
        self._require_finite(name, part, box)
        if self._tied_head and name == EMBEDDING and not torch.equal(part, self._slice(LM_HEAD)[index]):
            raise HfCheckpointError(
                f"{self.directory}: config.json says tie_word_embeddings: true, but {LM_HEAD} "
                f"({self._stored[LM_HEAD].file}) differs from {EMBEDDING} ({self._stored[EMBEDDING].file}); set it to "
                "false if the output layer is its own"
            )
        return part if dtype is None else part.to(dtype)

    def _require_finite(self, name: str, part: torch.Tensor, box: Box) -> None:
        # aminmax passes NaN on and needs no second tensor of this size, unlike isfinite.
        if bool(torch.stack(torch.aminmax(part)).isfinite().all()):
            return
        bad = ~part.isfinite()
        first = [start + int(at) for (start, _), at in zip(box, bad.nonzero()[0], strict=True)]
        raise HfCheckpointError(
            f"{self.directory / self._stored[name].file}: tensor {name} holds {int(part.isnan().sum())} NaN and "
            f"{int(part.isinf().sum())} infinite values, the first at {first}; the file is damaged, or was saved "
            "after its training had failed: use another checkpoint"
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        return self._stored[name].shape

    def _slice(self, name: str) -> Any:
        return self._open(self._stored[name].file).get_slice(name)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.directory / file
            try:
                self._files[file] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as e:
                raise HfCheckpointError(f"{path}: not a readable safetensors file (truncated?): {e}") from e
        return self._files[file]


def check_files(directory: str | Path) -> None:
    """Raises HfCheckpointError unless `directory` has safetensors and each file's header can be read.

    What tensors the files hold is not looked at: `HfReader` compares them with a `ModelSpec`.
    """
    stored_tensors(directory)


def shard_name(i: int, total: int) -> str:
    """File name of shard i of `total`, as transformers writes it."""
    return f"model-{i:05d}-of-{total:05d}.safetensors"


def copy_companions(source: str | Path, target: str | Path, chat_template: str | None = None) -> list[str]:
    """Copy configuration, tokenizer and licence files (no weights) between directories; returns their names.

    `chat_template`: a Jinja file that becomes the copy's template, because the model was trained with it.
    """
    source, target = Path(source), Path(target)
    names = sorted({p.name for pattern in _COMPANIONS for p in source.glob(pattern) if p.is_file()})
    if "config.json" not in names:
        raise HfCheckpointError(f"{source / 'config.json'}: no such file")
    for name in names:
        shutil.copyfile(source / name, target / name)
    if chat_template is not None:
        # transformers prefers this file to a template in tokenizer_config.json.
        shutil.copyfile(chat_template, target / "chat_template.jinja")
    return names


def set_config_dtype(path: Path, dtype: torch.dtype) -> None:
    """Make config.json say the dtype of the weights, touching the file only when it says another."""
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes `dtype`, earlier ones `torch_dtype`: a second key could contradict the first.
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    name = str(dtype).removeprefix("torch.")
    if config.get(key) != name:
        config[key] = name
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
