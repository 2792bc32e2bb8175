"""Files and directories that appear whole or not at all: written aside, fsynced, then renamed.

    with atomic_file(run / "summary.json") as file:
        json.dump(summary, file)
    with atomic_directory(target) as directory:
        (directory / "part").write_bytes(part)

Ranks that fill a directory together use `dist.shared_directory`, which is `atomic_directory` with barriers. A reader,
or a process that starts after a kill, sees the old content or the new one, never half of either.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from treepo_mega.errors import TreepoError


class OutputExistsError(TreepoError):
    """What is to be made exists already; the message names the path. Output is never merged or overwritten."""


@contextmanager
def atomic_file(path: str | Path) -> Iterator[TextIO]:
    """A UTF-8 text file to write to; it replaces `path` at the end. After an exception `path` is as it was.

    Its directory is made if it is missing. One process at a time may write to the same path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, not in /tmp: a rename is atomic only within one file system.
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            # Without it, a power cut after the rename can leave an empty file under the final name.
            os.fsync(file.fileno())
        partial.replace(target)
    # Also KeyboardInterrupt: a half-written file must not wait for the next writer.
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(target.parent)


@contextmanager
def atomic_directory(
    target: str | Path,
    *,
    replace: bool = False,
    leads: bool = True,
    meet: Callable[[str], None] = lambda what: None,
) -> Iterator[Path]:
    """An empty directory `.NAME.partial` beside `target` to fill; it becomes `target` at the end of the block.

    After an exception it is removed, and `target` is as it was. What a killed process left under the partial name is
    replaced. `replace`: an older `target` stays whole until then, and is deleted. Otherwise `target` must be absent or
    an empty directory, or OutputExistsError is raised.

    Of several processes that fill it together, one `leads`: it makes the directory and renames it. `meet(what)` waits
    for all of them; `what` says for what, in error messages.
    """
    target = Path(target).absolute()
    if not replace:
        require_absent(target)
    partial = target.parent / f".{target.name}.partial"
    try:
        if leads:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        meet(f"preparing {target}")
        yield partial
        meet(f"writing {target}")
        if leads:
            publish(partial, target)
        meet(f"publishing {target}")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def require_absent(target: str | Path) -> None:
    """Raise OutputExistsError if `target` exists and is not an empty directory."""
    target = Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OutputExistsError(f"{target}: exists already; choose another directory or remove it")


def publish(partial: Path, target: Path) -> None:
    """fsync everything in the directory `partial`, then rename it; an older `target` is deleted just before."""
    # Contents before the name: after a power cut, what has the final name is whole.
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    # Only now: an older target is usable until its successor is whole.
    if target.is_dir():
        shutil.rmtree(target)
    partial.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """fsync a file, or the entries of a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
