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
import difflib
import json
import math
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from treepo_mega.errors import TreepoError
from treepo_mega.modelspec.mcore_layout import EMBEDDING, LM_HEAD, Box, ModelSpec, hf_shapes
from treepo_mega.runtime.files import atomic_directory

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types of safetensors that weights may have, and their bytes."""
_DERIVED = ".rotary_emb.inv_freq"
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


class HfCheckpointError(TreepoError):
    """A checkpoint on disk cannot be used; the message names file, tensor, what was expected and what was found."""


class HfReader:
    """Tensors of a checkpoint directory, by slices. Files are opened when first needed and closed on exit.

    `total_bytes`: of all tensors that `spec` asks for, as stored; `bytes_read`: of the slices handed out so far.

    Raises HfCheckpointError on construction: no safetensors, a missing or truncated shard, and, against
    `spec`, a missing, unexpected, misshapen or non-floating-point tensor. Without a `spec` only the files are checked.
    """

    def __init__(self, directory: str | Path, spec: ModelSpec | None) -> None:
        self.directory = Path(directory)
        self.bytes_read, self.total_bytes = 0, 0
        self._files: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        self._where = self._locate()
        self._tied_head = spec is not None and spec.tie_word_embeddings and LM_HEAD in self._where
        if spec is not None:
            self._check(spec)
            return
        for file in sorted(set(self._where.values())):
            self._open(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        self._files.clear()
        self._stack.close()

    def read(self, name: str, box: Box, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The box `((start, stop), ...)` of tensor `name`, on the CPU, cast to `dtype` (None: as stored)."""
        index = tuple(slice(a, b) for a, b in box)
        part = self._slice(name)[index]
        self.bytes_read += part.nbytes
        if self._tied_head and name == EMBEDDING and not torch.equal(part, self._slice(LM_HEAD)[index]):
            raise HfCheckpointError(
                f"{self.directory}: config.json says tie_word_embeddings, but {LM_HEAD} "
                f"({self._where[LM_HEAD]}) differs from {EMBEDDING} ({self._where[EMBEDDING]})"
            )
        return part if dtype is None else part.to(dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        return tuple(self._slice(name).get_shape())

    def _slice(self, name: str) -> Any:
        return self._open(self._where[name]).get_slice(name)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.directory / file
            if not path.is_file():
                raise HfCheckpointError(f"{path}: no such file, although {INDEX} names it")
            try:
                self._files[file] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as e:
                raise HfCheckpointError(f"{path}: not a readable safetensors file (truncated?): {e}") from e
        return self._files[file]

    def _locate(self) -> dict[str, str]:
        """Tensor name -> file, from the index or the single file."""
        index = self.directory / INDEX
        if index.is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as e:
                raise HfCheckpointError(f"{index}: expected a JSON object with a weight_map: {e!r}") from e
            for name, file in names.items():
                if not isinstance(file, str) or Path(file).name != file:
                    raise HfCheckpointError(f"{index}: {name} lies in {file!r}; expected a file name in this directory")
            return dict(names)
        if (self.directory / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        found = sorted(p.name for p in self.directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".safetensors"))
        raise HfCheckpointError(
            f"{self.directory}: expected {SINGLE} or {INDEX}; found "
            + (", ".join(found) + " (convert to safetensors first)" if found else "no weights")
        )

    def _check(self, spec: ModelSpec) -> None:
        expected = hf_shapes(spec)
        present = {name for name in self._where if not name.endswith(_DERIVED)}
        if spec.tie_word_embeddings:
            present.discard(LM_HEAD)
        if problems := _key_problems(set(expected), present):
            raise HfCheckpointError(f"{self.directory}: " + "; ".join(problems))
        for name, shape in expected.items():
            try:
                view = self._slice(name)
            except SafetensorError as e:
                raise HfCheckpointError(f"{self.directory / self._where[name]}: tensor {name} is missing: {e}") from e
            found, kind = tuple(view.get_shape()), view.get_dtype()
            where = f"{self.directory / self._where[name]}: tensor {name}"
            if found != shape:
                raise HfCheckpointError(f"{where} has shape {list(found)}; config.json asks for {list(shape)}")
            if kind not in _FLOATS:
                raise HfCheckpointError(f"{where} has dtype {kind}; expected one of {', '.join(_FLOATS)}")
            self.total_bytes += math.prod(shape) * _FLOATS[kind]


def check_files(directory: str | Path) -> None:
    """Raises HfCheckpointError unless `directory` has safetensors and each file's header can be read.

    What tensors the files hold is not looked at: `HfReader` compares them with a `ModelSpec`.
    """
    with HfReader(directory, None):
        pass


def _key_problems(expected: set[str], present: set[str], shown: int = 4) -> list[str]:
    """Missing and unexpected tensor names in words, each unexpected one with the nearest missing name."""
    missing, extra, out = sorted(expected - present), sorted(present - expected), []
    if missing:
        more = f" and {len(missing) - shown} more" if len(missing) > shown else ""
        out.append(f"{len(missing)} tensors missing: {', '.join(missing[:shown])}{more}")
    if extra:
        names = []
        for name in extra[:shown]:
            near = difflib.get_close_matches(name, missing or sorted(expected), n=1)
            names.append(f"{name} (nearest expected: {near[0]})" if near else name)
        more = f" and {len(extra) - shown} more" if len(extra) > shown else ""
        out.append(f"{len(extra)} tensors unexpected: {', '.join(names)}{more}")
    return out


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
            raise HfCheckpointError(f"{self.target}: " + "; ".join(_key_problems(missing, set())))
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


def copy_companions(source: str | Path, target: str | Path) -> list[str]:
    """Copy configuration, tokenizer and licence files (no weights) between directories; returns their names."""
    source, target = Path(source), Path(target)
    names = sorted({p.name for pattern in _COMPANIONS for p in source.glob(pattern) if p.is_file()})
    if "config.json" not in names:
        raise HfCheckpointError(f"{source / 'config.json'}: no such file")
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def set_config_dtype(path: Path, dtype: torch.dtype) -> None:
    """Make config.json say the dtype of the weights, touching the file only when it says another."""
    config = json.loads(path.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    name = str(dtype).removeprefix("torch.")
    if config.get(key) != name:
        config[key] = name
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
