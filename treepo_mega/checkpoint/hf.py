"""Hugging Face checkpoints on disk: read by slices, written so that nothing partial looks whole.

    with HfReader(directory, spec) as reader:              # checks the key set and every shape, from the headers
        part = reader.read("model.norm.weight", ((0, 64),), torch.float32)
    with HfWriter(target, like=directory, spec=spec, dtype=torch.bfloat16) as writer:
        for name, tensor in pairs:                         # any order, one at a time
            writer.add(name, tensor)

A rank reads only the slices its parameters need (`safetensors.get_slice`), so loading 70B over 128 ranks
reads each byte about once. Writing fills shards of at most `max_shard_bytes` and holds one shard in memory.

Output is made in `.NAME.partial` beside the target and renamed at the end (`runtime.files.atomic_directory`):
a target that exists is complete. A target that already exists is refused, never merged into.

Traps: old Llama files carry `rotary_emb.inv_freq` buffers, which are derived and skipped. A tied model may
carry an `lm_head.weight` too: it is compared with the embedding where that is read, since transformers would
ignore it and a difference would mean that the configuration lies. Only safetensors: a pickle can run code.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from treepo_mega.checkpoint.headers import (
    INDEX,
    SINGLE,
    HfCheckpointError,
    check_against,
    key_problems,
    stored_tensors,
)
from treepo_mega.modelspec.mcore_layout import EMBEDDING, LM_HEAD, Box, ModelSpec, hf_shapes
from treepo_mega.runtime.files import atomic_directory

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


class HfWriter:
    """Writes a checkpoint that `transformers` loads: shards, index, configuration and tokenizer of `like`.

    Use as a context manager; `target` appears when the block ends without error and every tensor of `spec`
    has been added once. Raises OutputExistsError when `target` exists; HfCheckpointError for a wrong name or shape, and
    at the end for missing tensors.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        like: str | Path,
        spec: ModelSpec,
        dtype: torch.dtype,
        max_shard_bytes: int = 5 << 30,
    ) -> None:
        self.target, self.like = Path(target), Path(like)
        self.bytes_written = 0
        self._expected, self._dtype, self._limit = hf_shapes(spec), dtype, max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._directory = atomic_directory(self.target)

    def __enter__(self) -> Self:
        self._partial = self._directory.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._directory.__exit__(kind, error, trace)
            return
        try:
            self._finish()
        except BaseException as e:
            self._directory.__exit__(type(e), e, e.__traceback__)
            raise
        self._directory.__exit__(None, None, None)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one full tensor (any device); it is cast to the writer's dtype."""
        shape = self._expected.get(name)
        if shape is None or name in self._pending or any(name in s for s in self._shards):
            why = "unexpected" if shape is None else "added twice"
            raise HfCheckpointError(f"{self.target}: tensor {name} {why}")
        if tuple(tensor.shape) != shape:
            raise HfCheckpointError(
                f"{self.target}: tensor {name} has shape {list(tensor.shape)}; expected {list(shape)}"
            )
        value = tensor.detach().to("cpu", self._dtype, copy=True).contiguous()
        size = value.numel() * value.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._pending[name] = value
        self._pending_bytes += size

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        save_file(self._pending, self._partial / shard_name(len(self._shards), 0), metadata={"format": "pt"})
        self.bytes_written += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _finish(self) -> None:
        """Last shard, final names, index, configuration and tokenizer."""
        if self._pending:
            self._flush()
        missing = set(self._expected) - {name for shard in self._shards for name in shard}
        if missing:
            raise HfCheckpointError(f"{self.target}: " + "; ".join(key_problems(missing, set())))
        total, files = len(self._shards), []
        for i in range(1, total + 1):
            files.append(SINGLE if total == 1 else shard_name(i, total))
            (self._partial / shard_name(i, 0)).rename(self._partial / files[-1])
        if total > 1:
            weight_map = {name: file for shard, file in zip(self._shards, files, strict=True) for name in shard}
            index = {"metadata": {"total_size": self.bytes_written}, "weight_map": weight_map}
            (self._partial / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        copy_companions(self.like, self._partial)
        set_config_dtype(self._partial / "config.json", self._dtype)


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
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    name = str(dtype).removeprefix("torch.")
    if config.get(key) != name:
        config[key] = name
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
