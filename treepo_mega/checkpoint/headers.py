"""What the weight files of a Hugging Face checkpoint hold, from their headers alone: no torch, no tensor is read.

    stored = stored_tensors(directory)           # tensor name -> Stored(file, dtype, shape); checks every file
    total = check_against(directory, stored, spec)             # names, shapes and types; bytes of all tensors

A dry run asks this on a laptop, and `hf.HfReader` before it reads. Each kind of incomplete directory has a message of
its own: no index, missing shards, an adapter without its base model, pickles only, a Git LFS pointer, a cut file.

Shards without an index are taken when they can only be meant one way: every number of one series is there, and no
tensor lies in two files. The index is then built in memory.

A safetensors file is 8 bytes with the length of a JSON header, the header, and the tensors' bytes up to its end.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from treepo_mega.errors import TreepoError, nearest
from treepo_mega.modelspec.mcore_layout import EMBEDDING, LM_HEAD, ModelSpec, hf_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types of safetensors that weights may have, and their bytes."""
DERIVED = ".rotary_emb.inv_freq"
"""End of the names of buffers that old Llama files carry and that are computed, not read."""
LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself refuses longer ones."""

_SHARD = re.compile(r"(?P<series>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_ADAPTER = ("adapter_config.json", "adapter_model*.safetensors", "adapter_model*.bin")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LFS_POINTER = b"version https://git-lfs"


class HfCheckpointError(TreepoError):
    """A checkpoint on disk cannot be used; the message names file, tensor, what was expected and what was found."""


class NoWeightsError(HfCheckpointError):
    """The directory holds no weights at all, in any format."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies and what its file's header says of it."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(directory: str | Path) -> dict[str, Stored]:
    """Every tensor that the index, the single file or a whole series of shards holds, by name.

    Raises HfCheckpointError for weights that are missing, damaged or of another kind; NoWeightsError where none lie.
    """
    directory = Path(directory)
    if (directory / INDEX).is_file():
        return _by_index(directory)
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    shards = [found for path in directory.glob("*.safetensors") if (found := _SHARD.fullmatch(path.name))]
    if shards := [shard for shard in shards if not shard["series"].startswith("adapter_model")]:
        return _by_series(directory, shards)
    raise _without_weights(directory)


def missing_index_note(directory: str | Path, stored: Mapping[str, Stored]) -> list[str]:
    """A sentence for people where `stored` comes from shards whose index is missing; else nothing."""
    directory = Path(directory)
    if (directory / INDEX).is_file() or (directory / SINGLE).is_file():
        return []
    shards = len({place.file for place in stored.values()})
    return [f"{directory / INDEX} is missing (incomplete download?); its {shards} shards are whole and read without it"]


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file. Raises HfCheckpointError for a file that is cut short or something else."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(max(8, len(_LFS_POINTER)))
            if start.startswith(_LFS_POINTER):
                raise HfCheckpointError(
                    f"{path}: a Git LFS pointer of {size} bytes, not the weights; run `git lfs pull` in {path.parent}"
                )
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else LONGEST_HEADER + 1
            # Before the read: eight damaged bytes can announce up to 2**64 bytes, and Python would try to hold them.
            if length > LONGEST_HEADER or 8 + length > size:
                raise _unreadable(path, f"its {size} bytes do not hold the header that they announce")
            file.seek(8)
            header = json.loads(file.read(length))
            tensors = {
                name: Stored(path.name, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
                for name, entry in header.items()
                if name != "__metadata__"
            }
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name in tensors]
    except OSError as e:
        raise HfCheckpointError(f"{path}: cannot be read: {e.strerror or e}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise _unreadable(path, f"its header is not that of one: {e!r}") from None
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        raise _unreadable(path, f"{size} of {whole} bytes are there")
    # safetensors refuses such a file as well, but only when a rank opens it, long after the start.
    if size > whole:
        raise _unreadable(path, f"{size - whole} bytes follow its last tensor")
    return tensors


def _unreadable(path: Path, why: str) -> HfCheckpointError:
    return HfCheckpointError(
        f"{path}: not a readable safetensors file (truncated?): {why}; copy or download it once more"
    )


def _by_index(directory: Path) -> dict[str, Stored]:
    index = directory / INDEX
    try:
        names = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as e:
        raise HfCheckpointError(f"{index}: expected a JSON object with a weight_map: {e!r}") from e
    for name, file in names.items():
        # A downloaded index must not lead to files outside of its directory.
        if not isinstance(file, str) or Path(file).name != file:
            raise HfCheckpointError(f"{index}: {name} lies in {file!r}; expected a file name in this directory")
    files = sorted(set(names.values()))
    if missing := [file for file in files if not (directory / file).is_file()]:
        more = f", nor are {_some(missing[1:])}" if missing[1:] else ""
        raise HfCheckpointError(
            f"{directory / missing[0]}: no such file, although {INDEX} names it{more} (incomplete download?)"
        )
    headers = {file: read_header(directory / file) for file in files}
    stored = {}
    for name, file in names.items():
        if name not in headers[file]:
            other = next((f", but {f} does" for f in files if name in headers[f]), "")
            raise HfCheckpointError(
                f"{directory / file}: tensor {name} is missing: {INDEX} says that this file holds it{other}; index and "
                "shards are of different checkpoints"
            )
        stored[name] = headers[file][name]
    return stored


def _by_series(directory: Path, shards: list[re.Match[str]]) -> dict[str, Stored]:
    """The index of shards that lie there without one. Raises HfCheckpointError unless they make one whole series."""
    series = sorted({(shard["series"], shard["total"]) for shard in shards})
    if len(series) > 1:
        found = " and ".join(f"{name}-*-of-{total}" for name, total in series)
        raise HfCheckpointError(f"{directory}: {INDEX} is missing, and shards of {found} lie together; keep one series")
    name, total = series[0]
    there = {int(shard["number"]) for shard in shards}
    expected = set(range(1, int(total) + 1))
    if missing := sorted(expected - there):
        files = [f"{name}-{number:05d}-of-{total}.safetensors" for number in missing]
        raise HfCheckpointError(
            f"{directory}: {INDEX} is missing, and so are {len(missing)} of {int(total)} shards: {_some(files)} "
            "(incomplete download?)"
        )
    stored: dict[str, Stored] = {}
    for shard in sorted(shards, key=lambda shard: shard["number"]):
        for tensor, place in read_header(directory / shard.string).items():
            if tensor in stored:
                raise HfCheckpointError(
                    f"{directory}: {INDEX} is missing, and tensor {tensor} lies both in {stored[tensor].file} and in "
                    f"{place.file}; copy the index of this checkpoint beside its shards"
                )
            stored[tensor] = place
    return stored


def adapter_problem(directory: str | Path) -> str | None:
    """Why an adapter's directory is no checkpoint, with the way out; None where no adapter lies, or a model beside it.

    Asked before config.json is looked for, which an adapter does not have.
    """
    directory = Path(directory)
    found = sorted({path.name for pattern in _ADAPTER for path in directory.glob(pattern)})
    models = [path.name for path in directory.glob("*.safetensors") if path.name not in found]
    if not found or models or (directory / INDEX).is_file():
        return None
    base = ""
    try:
        name = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        base = f" of {name}"
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the name is a help for people only
    return (
        f"{directory}: only an adapter{base} lies here ({', '.join(found)}), not a model; merge it into its base model "
        "(peft: merge_and_unload, then save_pretrained) and name the result"
    )


def _without_weights(directory: Path) -> HfCheckpointError:
    """What to say of a directory without model.safetensors, its index, or shards."""
    expected = f"expected {SINGLE} or {INDEX}"
    if adapter := adapter_problem(directory):
        return HfCheckpointError(adapter)
    names = sorted(path.name for path in directory.glob("*") if path.is_file())
    if others := [name for name in names if name.endswith(".safetensors")]:
        return HfCheckpointError(f"{directory}: {expected}; found {_some(others)}; rename a single whole file {SINGLE}")
    if pickles := [name for name in names if name.endswith(_PICKLES) and name != "training_args.bin"]:
        return HfCheckpointError(
            f"{directory}: {expected}; found {_some(pickles)} (convert to safetensors first: loading a pickle can run "
            "code; transformers' from_pretrained, then save_pretrained into a new directory, writes safetensors)"
        )
    if quantised := [name for name in names if name.endswith(".gguf")]:
        return HfCheckpointError(f"{directory}: {expected}; found {_some(quantised)}; GGUF files cannot be trained")
    return NoWeightsError(f"{directory}: {expected}; found no weights")


def check_against(directory: str | Path, stored: Mapping[str, Stored], spec: ModelSpec) -> int:
    """Hold names, shapes and types against config.json's model; returns the bytes of its tensors as stored.

    Raises HfCheckpointError for the first kind of difference, with all names of that kind counted.
    """
    directory = Path(directory)
    expected = hf_shapes(spec)
    present = {name for name in stored if not name.endswith(DERIVED)}
    _check_head(directory, stored, spec)
    _check_experts(directory, stored, spec)
    if spec.tie_word_embeddings:
        present.discard(LM_HEAD)
    if problems := key_problems(set(expected), present):
        raise HfCheckpointError(f"{directory}: " + "; ".join(problems))
    total = 0
    for name, shape in expected.items():
        found = stored[name]
        where = f"{directory / found.file}: tensor {name}"
        if found.shape != shape:
            raise HfCheckpointError(f"{where} has shape {list(found.shape)}; config.json asks for {list(shape)}")
        if found.dtype not in FLOAT_BYTES:
            raise HfCheckpointError(f"{where} has dtype {found.dtype}; expected one of {', '.join(FLOAT_BYTES)}")
        total += math.prod(shape) * FLOAT_BYTES[found.dtype]
    return total


def _check_experts(directory: Path, stored: Mapping[str, Stored], spec: ModelSpec) -> None:
    """The routers choose among as many experts as config.json says: else most tensors would be missing, or too many."""
    router = stored.get(f"model.layers.0.{spec.names['router']}.weight") if spec.num_experts else None
    if router is not None and router.shape and router.shape[0] != spec.num_experts:
        raise HfCheckpointError(
            f"{directory}: config.json says {spec.num_experts} experts, and the routers of the weights choose among "
            f"{router.shape[0]}; config.json belongs to another checkpoint"
        )


def _check_head(directory: Path, stored: Mapping[str, Stored], spec: ModelSpec) -> None:
    """Output layer and embedding are there as tie_word_embeddings says."""
    head, embedding = stored.get(LM_HEAD), stored.get(EMBEDDING)
    if not spec.tie_word_embeddings and head is None and embedding is not None:
        raise HfCheckpointError(
            f"{directory}: {LM_HEAD} is missing, but config.json does not say tie_word_embeddings: true; set it if the "
            f"embedding is also the output layer, else the files are incomplete ({len(stored)} tensors are there)"
        )
    if not spec.tie_word_embeddings or head is None:
        return
    if embedding is None:
        raise HfCheckpointError(
            f"{directory}: config.json says tie_word_embeddings: true, but only {LM_HEAD} is stored, not {EMBEDDING}; "
            f"store the matrix as {EMBEDDING}"
        )
    if head.shape != embedding.shape:
        raise HfCheckpointError(
            f"{directory}: config.json says tie_word_embeddings: true, but {LM_HEAD} {list(head.shape)} is another "
            f"matrix than {EMBEDDING} {list(embedding.shape)}; set it to false if the output layer is its own"
        )


def key_problems(expected: set[str], present: set[str], shown: int = 4) -> list[str]:
    """Missing and unexpected tensor names in words, each unexpected one with the nearest missing name."""
    missing, extra, out = sorted(expected - present), sorted(present - expected), []
    if missing:
        out.append(f"{len(missing)} tensors missing: {_some(missing, shown)}")
    if extra:
        names = [f"{name}{nearest(name, missing or expected)}" for name in extra[:shown]]
        more = f" and {len(extra) - shown} more" if len(extra) > shown else ""
        out.append(f"{len(extra)} tensors unexpected: {', '.join(names)}{more}")
    return out


def _some(names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
