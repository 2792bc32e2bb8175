"""What a distributed checkpoint says of itself, read without running anything.

    description = read_description(directory)
    description.tensors                     # name -> global shape
    description.check_files()               # raises when a file is missing or cut short

PyTorch keeps the description of a checkpoint as a pickle, `.metadata`, and reads it with `pickle.load`. A pickle may
call any function while it is read. Here only what PyTorch's own writers put there may be named. Anything else is
refused, before PyTorch opens the file. The tensors themselves are read by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from treepo_mega.checkpoint.error import CheckpointError

DESCRIPTION = ".metadata"
_NAMED: dict[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
            *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    # Megatron keeps the plans of all ranks, by which the next save is planned faster.
    "torch.distributed.checkpoint.planner": frozenset({"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch": frozenset({"Size", "device"}),
    "pathlib": frozenset({"PosixPath"}),
    "pathlib._local": frozenset({"PosixPath"}),
    "collections": frozenset({"OrderedDict"}),
    "builtins": frozenset({"set", "frozenset"}),
}
"""Module -> what a description may name of it, beside the types of tensors' elements."""


class _Refused(Exception):
    """A description names something else than PyTorch's own writers do."""


class _Reader(pickle.Unpickler):
    """An unpickler that builds descriptions alone."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function `name`; raises _Refused for one that no description has."""
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name not in _NAMED.get(module, ()):
            raise _Refused(f"{module}.{name}")
        return super().find_class(module, name)


@dataclass(frozen=True, slots=True)
class Description:
    """See the module docstring. `tensors`: name -> global shape."""

    directory: Path
    tensors: dict[str, list[int]]
    files: dict[str, int]
    """File -> bytes that it must have at least."""

    def check_files(self) -> None:
        """Raise CheckpointError for a file that is missing or shorter than what lies in it."""
        for name, size in sorted(self.files.items()):
            file = self.directory / name
            found = file.stat().st_size if file.is_file() else None
            if found is None or found < size:
                there = "nothing" if found is None else str(found)
                raise CheckpointError(
                    f"{file}: expected at least {size} bytes, found {there}: the checkpoint is incomplete "
                    "(an unfinished copy?); copy it again, or use another one"
                )


def read_description(directory: Path) -> Description:
    """Read `directory`/.metadata. Raises CheckpointError: missing, damaged, or made to run something."""
    path = directory / DESCRIPTION
    try:
        found = _Reader(io.BytesIO(path.read_bytes())).load()
        tensors = {
            name: list(stored.size)
            for name, stored in found.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        files: dict[str, int] = {}
        for place in found.storage_data.values():
            name = str(place.relative_path)
            if Path(name).name != name:
                raise _Refused(f"the file {name}, outside of the checkpoint")
            files[name] = max(files.get(name, 0), place.offset + place.length)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file: not a torch_dist checkpoint, or its writing was cut short; use another one"
        ) from None
    except _Refused as refused:
        raise CheckpointError(
            f"{path}: names {refused}, which the description of no checkpoint needs: reading it could run a "
            "program. Nothing of it was read; take the checkpoint from a source that you trust"
        ) from None
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, LookupError) as error:
        raise CheckpointError(
            f"{path}: not the description of a checkpoint ({type(error).__name__}: {error}); use another one"
        ) from None
    return Description(directory, tensors, files)
