"""Keep of a run what another machine can be held against: its metrics without those that depend on time.

    python tools/keep_reference.py runs/demo docs/results/reference/demo
    treepo-mega report runs/demo --baseline docs/results/reference/demo

The reference runs of docs/evidence.md were written by it. Numbers have six digits. Exit status 2 without metrics.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

# Runs from a checkout, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from treepo_mega.monitor.metrics import read_metrics
from treepo_mega.monitor.registry import depends_on_time

METRICS = "metrics.jsonl"


def kept(row: dict[str, Any]) -> dict[str, Any]:
    """A step's metrics that any machine would have.

    >>> kept({"step": 3, "eval/accuracy": 0.12345678, "timing_s/step": 2.0, "reshard/mode": None})
    {'step': 3, 'eval/accuracy': 0.123457, 'reshard/mode': None}
    """
    named = {name: value for name, value in row.items() if name != "time" and not depends_on_time(name)}
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in named.items()}


def main(argv: list[str] | None = None) -> int:
    """Write the reference; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, help="a run directory")
    p.add_argument("out", type=Path, help="a directory to write to")
    args = p.parse_args(argv)
    if not (args.run / METRICS).is_file():
        print(f"{args.run}: no {METRICS} there; expected the directory of a run (logging.run_dir)", file=sys.stderr)
        return 2
    rows = [kept(row) for row in read_metrics(args.run / METRICS)]
    args.out.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (args.out / METRICS).write_text(text, encoding="utf-8")
    print(f"{args.out / METRICS}: {len(rows)} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
