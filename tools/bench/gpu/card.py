"""What the benches of this folder share: the card and its bounds, timing, the command line, the last line.

A bound is measured on the card itself, minutes before what is compared with it: the rate of a large matrix product in
the same dtype, and the rates of plain copies within the device and to and from pinned host memory. A share of 1 would
be as fast as that.

    --quick    fewer and smaller shapes; minutes become seconds
    --check    tiny shapes on the device that is there, a CPU too: whether the script runs and agrees, not how fast

Exit status: 0; 1 when a result disagrees with its reference; 2 without a GPU (unless --check), in one sentence.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from treepo_mega.runtime.device import device, has_cuda

NO_GPU = 2
DISAGREES = 1
MIB = 1 << 20


@dataclass(frozen=True)
class Size:
    """What the command line asks for: `check` is the smallest, then `quick`, then neither."""

    quick: bool
    check: bool

    def choose(self, full: Any, quick: Any, check: Any) -> Any:
        """One of three values."""
        return check if self.check else quick if self.quick else full

    @property
    def repeats(self) -> int:
        """Times that a work is measured."""
        return int(self.choose(10, 5, 1))


def arguments(doc: str | None, given: Sequence[str] | None = None) -> Size:
    """The command line. Ends the process with NO_GPU where a figure would mean nothing."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller shapes")
    parser.add_argument("--check", action="store_true", help="tiny shapes, on a CPU too; figures mean nothing")
    args = parser.parse_args(given)
    if not has_cuda() and not args.check:
        print(
            f"{parser.prog} measures a GPU, and torch {torch.__version__} sees none; --check runs it on the CPU",
            file=sys.stderr,
        )
        raise SystemExit(NO_GPU)
    return Size(args.quick, args.check)


def synchronize() -> None:
    """Wait for the device; a CPU has nothing to wait for."""
    if has_cuda():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], repeats: int) -> float:
    """Median wall seconds of `work`, after one call that does not count."""
    work()
    found = []
    for _ in range(repeats):
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """Device memory by which `work` grew at most, as torch's allocator counts it; None on a CPU."""
    if not has_cuda():
        work()
        return None
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def product_rate(dtype: torch.dtype, size: Size) -> float:
    """Floating-point operations a second of a square matrix product in `dtype`: the bound of what multiplies."""
    side = size.choose(8192, 8192, 64)
    left, right = (torch.randn(side, side, device=device()).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: left @ right, size.repeats)


@dataclass(frozen=True)
class CopyRates:
    """Bytes a second of plain copies; each byte counts once."""

    within: float
    to_host: float
    from_host: float


def copy_rates(size: Size) -> CopyRates:
    """Of one large copy within the device, to pinned host memory and back. On a CPU all three are host memory."""
    length = size.choose(1024 * MIB, 256 * MIB, MIB)
    here, there = (torch.zeros(length, dtype=torch.uint8, device=device()) for _ in range(2))
    host = torch.zeros(length, dtype=torch.uint8, pin_memory=has_cuda())
    pairs = ((there, here), (host, here), (here, host))
    return CopyRates(*(length / seconds_of(lambda to=to, src=src: to.copy_(src), size.repeats) for to, src in pairs))


def card_name() -> str:
    """The device in one phrase."""
    return torch.cuda.get_device_name() if has_cuda() else "cpu"


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """`columns`: key of a row -> its format. Missing values are dashes.

    >>> print(table([{"way": "a", "share": 0.5}, {"way": "b"}], {"way": "s", "share": ".2f"}))
    way  share
    a     0.50
    b        -
    """
    cells = [
        [format(row[key], form) if row.get(key) is not None else "-" for key, form in columns.items()] for row in rows
    ]
    widths = [max(len(key), *(len(line[place]) for line in cells)) for place, key in enumerate(columns)]
    lines = [list(columns), *cells]
    texts = [form.endswith("s") for form in columns.values()]
    return "\n".join(
        "  ".join(cell.ljust(w) if text else cell.rjust(w) for cell, w, text in zip(line, widths, texts, strict=True))
        for line in lines
    )


LEFT_BEHIND: list[tempfile.TemporaryDirectory[str]] = []
"""Directories that an engine reads until the process ends."""


def leave(status: int) -> NoReturn:
    """End a process that may hold an engine: without its destructor, which would tear down process groups."""
    for directory in LEFT_BEHIND:
        directory.cleanup()
    sys.stdout.flush()
    os._exit(status)


def finish(name: str, size: Size, shares: Mapping[str, float | None], wrong: Sequence[str], **more: Any) -> int:
    """Print the last line; the exit status. `shares`: name -> figure over its bound; `wrong`: what disagrees."""
    for sentence in wrong:
        print(f"{name}: {sentence}", file=sys.stderr)
    shares = {key: None if value is None else round(value, 4) for key, value in shares.items()}
    out = {"bench": name, "device": card_name(), "check": size.check, "shares": shares, "wrong": list(wrong), **more}
    print(json.dumps(out), flush=True)
    return DISAGREES if wrong else 0
