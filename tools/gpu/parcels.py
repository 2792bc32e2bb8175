"""Carry files to a machine without network, in parts of at most 60 MiB with checksums.

    python tools/gpu/parcels.py pack parcels/ wheels/*.whl                      files by path
    python tools/gpu/parcels.py pack parcels/ --from wheels/ torch==2.13.0      wheels by name and version
    python tools/gpu/parcels.py join parcels/ wheels/                           there: verify and put together

The parts are one stream, the files one after the other, cut every `--part-mib`. `manifest.json` beside them has size
and SHA-256 of each part and of each file, and its own. `join` looks at every part before it writes anything. It
names each one that is damaged, missing or a repetition of another. Memory stays at one block, whatever the sizes.
Standard library only, and no import of this project: the file may be copied to the other machine alone.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

MIB = 1 << 20
PART_MIB = 60.0
BLOCK = MIB
FORMAT = 1
MANIFEST = "manifest.json"
WHEEL = re.compile(r"(?P<name>[^-]+)-(?P<version>[^-]+)(-\d[^-]*)?-[^-]+-[^-]+-[^-]+\.whl")


class ParcelError(Exception):
    """Packing or joining cannot go on; the message names the file or part and says what to do."""


def normalised(name: str) -> str:
    """A distribution's name as indexes compare it.

    >>> normalised("Megatron_Core")
    'megatron-core'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def find_wheel(folder: Path, wanted: str) -> Path:
    """The one wheel of `NAME==VERSION` in `folder`; a build's suffix such as `+cu130` may be left out."""
    name, _, version = wanted.partition("==")
    if not name or not version:
        raise ParcelError(f"{wanted!r}: expected NAME==VERSION, such as torch==2.13.0")
    if not folder.is_dir():
        raise ParcelError(f"{folder}: no such folder")
    found: list[Path] = []
    known: set[str] = set()
    for path in sorted(folder.glob("*.whl")):
        if (match := WHEEL.fullmatch(path.name)) is None:
            continue
        known.add(f"{normalised(match['name'])}=={match['version']}")
        same_version = version in (match["version"], match["version"].partition("+")[0])
        if normalised(match["name"]) == normalised(name) and same_version:
            found.append(path)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ParcelError(f"{wanted}: {len(found)} wheels in {folder}: {names}; give the path of the right one")
    if not found:
        close = difflib.get_close_matches(f"{normalised(name)}=={version}", sorted(known), n=1, cutoff=0.4)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ParcelError(f"{wanted}: no such wheel in {folder}, which has {len(known)} others{hint}")
    return found[0]


def blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a block at a time."""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    for block in blocks(path):
        digest.update(block)
    return digest.hexdigest()


def seal(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own `seal`."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class Cutter:
    """Writes a stream into numbered parts of at most `limit` bytes each."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.parts: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, block: bytes) -> None:
        """Append to the stream; a full part is closed and the next one begins."""
        view = memoryview(block)
        while view:
            if self._file is None:
                self._file = (self.folder / f"part-{len(self.parts) + 1:04d}.parcel").open("xb")
            piece = view[: self.limit - self._size]
            self._file.write(piece)
            self._digest.update(piece)
            self._size += len(piece)
            view = view[len(piece) :]
            if self._size == self.limit:
                self.close()

    def close(self) -> None:
        """End the part that is open, if one is."""
        if self._file is None:
            return
        name = Path(self._file.name).name
        self._file.close()
        self.parts.append({"name": name, "size": self._size, "sha256": self._digest.hexdigest()})
        self._file = None
        self._digest = hashlib.sha256()
        self._size = 0


def pack(folder: Path, files: Sequence[Path], part_bytes: int = int(PART_MIB * MIB)) -> dict[str, Any]:
    """Write `files` as parts and a manifest into the empty or new `folder`; the manifest."""
    if not files:
        raise ParcelError("nothing to pack: name files, or wheels with --from FOLDER NAME==VERSION")
    if part_bytes < 1:
        raise ParcelError(f"a part of {part_bytes} bytes holds nothing; expected at least 1")
    names = [path.name for path in files]
    for path in files:
        if not path.is_file():
            raise ParcelError(f"{path}: no such file")
        if names.count(path.name) > 1:
            raise ParcelError(f"{path.name}: given {names.count(path.name)} times; names must differ")
    if folder.exists() and any(folder.iterdir()):
        raise ParcelError(f"{folder}: not empty; choose another folder or clear it")
    folder.mkdir(parents=True, exist_ok=True)
    cutter = Cutter(folder, part_bytes)
    entries = []
    for path in files:
        digest = hashlib.sha256()
        size = 0
        for block in blocks(path):
            cutter.write(block)
            digest.update(block)
            size += len(block)
        entries.append({"name": path.name, "size": size, "sha256": digest.hexdigest()})
    cutter.close()
    manifest: dict[str, Any] = {"format": FORMAT, "part_bytes": part_bytes, "files": entries, "parts": cutter.parts}
    manifest["seal"] = seal(manifest)
    # Last: a folder with a manifest is a folder with all of its parts.
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`, whole and unchanged since it was written."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ParcelError(f"{path}: missing; it comes from the same `pack` as the parts")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        whole = manifest["format"] == FORMAT and manifest["seal"] == seal(manifest)
    # UnicodeDecodeError and JSONDecodeError are ValueErrors.
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ParcelError(f"{path}: damaged; send it again")
    return dict(manifest)


def look_at(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What is wrong with the parts in `folder`, one sentence each; nothing when all are there and whole."""
    owner = {part["sha256"]: part["name"] for part in manifest["parts"]}
    expected = {part["name"] for part in manifest["parts"]}
    found = []
    for part in manifest["parts"]:
        path = folder / part["name"]
        if not path.is_file():
            found.append(f"{part['name']}: missing")
            continue
        digest = digest_of(path)
        if digest == part["sha256"]:
            continue
        if digest in owner:
            found.append(f"{part['name']}: a repetition of {owner[digest]}; its own bytes are missing")
        else:
            size = path.stat().st_size
            cut = f", with {size} of {part['size']} bytes" if size != part["size"] else ""
            found.append(f"{part['name']}: damaged{cut}")
    for path in sorted(folder.glob("*.parcel*")):
        if path.name not in expected:
            other = owner.get(digest_of(path))
            found.append(f"{path.name}: a repetition of {other}" if other else f"{path.name}: of another parcel")
    return found


def stream(folder: Path, manifest: dict[str, Any]) -> Iterator[bytes]:
    """The bytes of all parts, in order."""
    for part in manifest["parts"]:
        yield from blocks(folder / part["name"])


def join(folder: Path, target: Path) -> list[Path]:
    """Verify every part in `folder`, write the files into `target`, verify them too; their paths."""
    manifest = read_manifest(folder)
    if wrong := look_at(folder, manifest):
        raise ParcelError("\n".join(f"{folder}: {line}" for line in wrong) + "\nSend the named parts again.")
    target.mkdir(parents=True, exist_ok=True)
    source = stream(folder, manifest)
    rest = b""
    made = []
    for entry in manifest["files"]:
        name = str(entry["name"])
        if Path(name).name != name:
            raise ParcelError(f"{folder / MANIFEST}: {name!r} is no plain file name")
        path = target / name
        if path.exists() and digest_of(path) != entry["sha256"]:
            raise ParcelError(f"{path}: exists and holds something else; remove it, or choose another folder")
        # Written aside and renamed: a kill leaves no half wheel under a wheel's name.
        partial = target / f".{name}.partial"
        digest = hashlib.sha256()
        left = int(entry["size"])
        with partial.open("wb") as file:
            while left:
                rest = rest or next(source)
                piece = rest[:left]
                file.write(piece)
                digest.update(piece)
                rest = rest[len(piece) :]
                left -= len(piece)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != entry["sha256"]:
            partial.unlink()
            raise ParcelError(f"{name}: its bytes changed while they were read; pack it again")
        partial.replace(path)
        made.append(path)
    return made


def chosen(names: Iterable[str], folder: Path | None) -> list[Path]:
    """The files that a command names: paths, or with a folder wheels by NAME==VERSION."""
    out = []
    for name in names:
        if "==" in name and not Path(name).exists():
            if folder is None:
                raise ParcelError(f"{name}: say where the wheel lies with --from FOLDER")
            out.append(find_wheel(folder, name))
        else:
            out.append(Path(name))
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all went well, 2 with a message when it did not."""
    parser = argparse.ArgumentParser(prog="parcels.py", description="Files in parts of limited size, and back.")
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write files as parts and a manifest")
    packing.add_argument("folder", type=Path, help="where the parts go: an empty or new folder")
    packing.add_argument("names", nargs="+", metavar="FILE|NAME==VERSION")
    packing.add_argument("--from", dest="wheels", type=Path, metavar="FOLDER", help="where wheels by name lie")
    packing.add_argument("--part-mib", type=float, default=PART_MIB, help="largest part in MiB (default: %(default)g)")
    joining = commands.add_parser("join", help="verify parts and put the files together")
    joining.add_argument("folder", type=Path, help="where parts and manifest lie")
    joining.add_argument("target", type=Path, help="where the files go")
    options = parser.parse_args(arguments)
    try:
        if options.command == "pack":
            files = chosen(options.names, options.wheels)
            manifest = pack(options.folder, files, int(options.part_mib * MIB))
            total = sum(part["size"] for part in manifest["parts"]) / MIB
            parts = f"{len(manifest['parts'])} parts and {MANIFEST}"
            print(f"{len(files)} files, {total:.1f} MiB, {parts} in {options.folder}")
        else:
            made = join(options.folder, options.target)
            print(f"{len(made)} files in {options.target}, every part and file as it was packed")
    except (ParcelError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
