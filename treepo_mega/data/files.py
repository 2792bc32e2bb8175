"""From what people write as a path to files and rows: globs, directories of shards, slices, Hub data sets.

    for part in find_parts("~/data/*.parquet@[0:1000]"):   # one part a file
        part.name, list(part.rows())

A slice takes rows of all files of its path together, in the order of their names; each row keeps its number in its own
file, so that the prompts of a single file are called the same however it is found.

What could be two things is refused: a directory or glob that mixes train and test files, or kinds of file, or a
directory whose files stand in several subdirectories. A list of paths says plainly what is meant.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from treepo_mega.config.source import expand_path
from treepo_mega.data.rows import COMPRESSIONS, FORMATS, PromptError, Row, count_rows, file_format, file_stem, read_file
from treepo_mega.errors import nearest

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
}
"""Words in file and directory names that say which split a file is of."""

_SLICE = re.compile(r"(?P<path>.+)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one file (or of another table): the name that prompt ids begin with, and a reader of the rows.

    `read(start, stop)` yields the rows of that range.
    """

    name: str
    where: str
    read: Callable[[int, int | None], Iterator[Row]]
    start: int = 0
    stop: int | None = None

    def rows(self, most: int | None = None) -> Iterator[Row]:
        """The rows, or the first `most` of them."""
        stop = self.stop
        if most is not None:
            stop = self.start + most if stop is None else min(stop, self.start + most)
        return self.read(self.start, stop)


def split_slice(spec: str) -> tuple[str, int | None, int | None]:
    """(path, a, b) of `path` or `path@[a:b]`. Raises PromptError for a malformed slice.

    >>> split_slice("a.jsonl@[5:]"), split_slice("a.jsonl")
    (('a.jsonl', 5, None), ('a.jsonl', None, None))
    """
    match = _SLICE.fullmatch(spec)
    if match is None:
        if "@[" in spec:
            raise PromptError(
                f"{spec}: malformed slice; expected path@[a:b] with integers a and b, either may be empty"
            )
        return spec, None, None
    start, stop = (int(match[k]) if match[k] not in ("", "-") else None for k in ("start", "stop"))
    return match["path"], start, stop


def find_parts(spec: str) -> list[Part]:
    """The files behind `path` or `path@[a:b]`, each with the rows of it that are meant; at least one.

    Raises PromptError for what is not there, what could mean two things, and a slice without rows.
    """
    text, start, stop = split_slice(spec)
    parts = [Part(file_stem(path), str(path), _reader(path)) for path in find_files(text)]
    # Bound as a default: a free variable would be the last path in every function.
    sizes = [lambda path=Path(part.where): count_rows(path) for part in parts]
    return sliced(parts, sizes, start, stop, spec)


def _reader(path: Path) -> Callable[[int, int | None], Iterator[Row]]:
    return lambda start, stop: read_file(path, start, stop)


def sliced(
    parts: Sequence[Part], sizes: Sequence[Callable[[], int]], start: int | None, stop: int | None, spec: str
) -> list[Part]:
    """`parts` cut to the rows [start:stop) of all of them together; a part's size is asked for only if needed."""
    if start is None and stop is None:
        return list(parts)
    begin = start or 0
    # One file, no bound from the end: nothing is counted, because counting reads a .gz to its end.
    if len(parts) == 1 and begin >= 0 and (stop is None or stop >= 0):
        ranges = [(begin, stop)]
    else:
        counts = [size() for size in sizes]
        begin, end, _ = slice(start, stop).indices(sum(counts))
        ranges = []
        offset = 0
        for count in counts:
            ranges.append((max(begin - offset, 0), min(end - offset, count)))
            offset += count
    cut = [
        Part(part.name, part.where, part.read, first, last)
        for part, (first, last) in zip(parts, ranges, strict=True)
        if last is None or first < last
    ]
    if not cut:
        raise PromptError(f"{spec}: the slice has no rows")
    return cut


def find_files(text: str) -> list[Path]:
    """The prompt files that `text` names: a file, a glob or a directory, with `~` and variables expanded; sorted.

    Raises PromptError when there is none, and for names that could mean two things.
    """
    try:
        path = Path(expand_path(text))
    except ValueError as error:
        raise PromptError(f"{text}: {error}") from None
    if path.is_dir():
        return _in_directory(path)
    if path.is_file():
        if not file_format(path)[0]:
            raise PromptError(f"{path}: unknown kind of file; expected {_kinds()}")
        return [path]
    if glob.has_magic(str(path)):
        return _matching(str(path))
    if path.suffix and not file_format(path)[0] and path.parent.is_dir():
        raise PromptError(f"{path}: unknown kind of file; expected {_kinds()}")
    siblings = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    raise PromptError(f"{path}: no such file{nearest(path.name, siblings, cutoff=0.6)}")


def _kinds() -> str:
    return f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}, perhaps with {' or '.join(COMPRESSIONS)} behind it"


def _in_directory(directory: Path) -> list[Path]:
    """The shards in `directory`, or in the one directory below it that has some."""
    found = sorted(p for p in directory.rglob("*") if p.is_file() and file_format(p)[0] and _is_visible(p, directory))
    if not found:
        raise PromptError(f"{directory}: no prompt file in this directory; expected {_kinds()}")
    direct = [p for p in found if p.parent == directory]
    folders = sorted({str(p.parent) for p in found})
    if not direct and len(folders) > 1:
        raise PromptError(
            f"{directory}: its prompt files stand in {len(folders)} subdirectories ({_few(folders)}); name one of "
            "them, or several as a list"
        )
    return _unmixed(direct or found, str(directory), directory)


def _is_visible(path: Path, directory: Path) -> bool:
    """Whether no part of the path below `directory` is hidden, as caches and partial downloads are."""
    return not any(part.startswith((".", "_")) for part in path.relative_to(directory).parts)


def _matching(pattern: str) -> list[Path]:
    """The prompt files that match a glob (`**` reaches into subdirectories); other files that match are left out."""
    # `glob` gives the file system's order. Ranks on other nodes would hold other prompts under the same number.
    matches = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    found = [path for path in matches if path.is_file() and file_format(path)[0]]
    if not found:
        other = f"; it matches {_few([str(m) for m in matches])}, expected {_kinds()}" if matches else ""
        raise PromptError(f"{pattern}: no prompt file matches this pattern{other}")
    return _unmixed(found, pattern, None)


def _unmixed(files: list[Path], what: str, root: Path | None) -> list[Path]:
    """`files`, refused when they are of several splits or kinds: training on a test split would go unnoticed."""
    by_split: dict[str, Path] = {}
    for path in files:
        # What stands further up does not count: people may keep all their data below /data/test.
        named = str(path.relative_to(root)) if root is not None else str(Path(path.parent.name) / path.name)
        words = [word for word in re.split(r"[^a-z]+", named.casefold()) if word in SPLITS]
        if words:
            # The last word is the file's own: eval_sets/train.jsonl is of the split train.
            by_split.setdefault(SPLITS[words[-1]], path)
    if len(by_split) > 1:
        examples = _few([str(path) for path in by_split.values()])
        raise PromptError(
            f"{what}: files of several splits ({', '.join(sorted(by_split))}): {examples}; name one, such as "
            f"{next(iter(by_split.values())).parent / (next(iter(by_split)) + '*')}, or list the files that you mean"
        )
    by_format = {file_format(path)[0]: path for path in files}
    if len(by_format) > 1:
        raise PromptError(
            f"{what}: several kinds of file ({_few([str(path) for path in by_format.values()])}), which may hold the "
            f"same rows; name one kind, such as {files[0].parent / ('*' + file_format(files[0])[0])}"
        )
    return files


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
