"""All benches of this folder in one process, which shares one engine.

    python tools/bench/gpu/every.py [NAME ...] [--quick] [--check]        NAME: head attention refit memory decode

Last line, JSON: {NAME: the last line of that bench}. The exit status is the largest of theirs.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tools.bench.gpu import card
from treepo_mega.errors import TreepoError, nearest

BENCHES = ("head", "attention", "refit", "memory", "decode")
"""In the order of the packages that they need; each is imported when its turn comes."""


class NameOfBenchError(TreepoError):
    """No bench has this name; the message has the nearest."""


def main(given: list[str]) -> int:
    """Run what is named; the exit status."""
    names = [word for word in given if not word.startswith("-")]
    options = [word for word in given if word.startswith("-")]
    for name in names:
        if name not in BENCHES:
            raise NameOfBenchError(f"{name}: expected some of {', '.join(BENCHES)}{nearest(name, BENCHES)}")
    lines = {}
    status = 0
    for name in BENCHES:
        if names and name not in names:
            continue
        bench = importlib.import_module(f"tools.bench.gpu.{name}")
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            status = max(status, bench.main(options))
        *shown, last = said.getvalue().rstrip("\n").split("\n")
        print("\n".join([f"== {name}", *shown]), flush=True)
        lines[name] = json.loads(last)
    print(json.dumps(lines), flush=True)
    return status


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except TreepoError as error:
        print(error, file=sys.stderr)
        status = 2
    card.leave(status)
