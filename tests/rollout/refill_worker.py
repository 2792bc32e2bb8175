"""One rank of test_refill.py: steps of a collector on fake engines, in each layout that the ranks allow.

`refill_worker.py WHERE STEPS KEYS whole|killed`. State is kept under WHERE after each step, and a later start goes on
from it. Rank 0 writes what each layout made to WHERE/<tp>.json. `killed`: all ranks die amid the very last step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed
from torch.distributed import ProcessGroup

from tests.rollout.fakes import FakeEngine, fake_collector, fake_config, load, said, state_of
from treepo_mega.runtime import dist


class Lockstep:
    """Where the ranks of an engine meet in each step, as they do in a real one's collectives."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def wait(self) -> None:
        torch.distributed.barrier(self.group)


def main(where: Path, steps: int, keys: dict[str, Any], how: str) -> None:
    """See the module docstring."""
    torch.distributed.init_process_group("gloo")
    rank, ranks = dist.rank(), dist.world_size()
    for tp in (2, 1):
        engines = [torch.distributed.new_group(range(first, first + tp)) for first in range(0, ranks, tp)]
        cfg = fake_config(**keys, engine={"tensor_parallel_size": tp})
        # Ranks of one engine draw the same order of ends, and each engine another one.
        collector = fake_collector(cfg, seed=ranks * 10 + rank // tp, share=0.3)
        engine = collector.generator.engine
        assert isinstance(engine, FakeEngine)
        engine.lockstep = Lockstep(engines[rank // tp]) if tp > 1 else None
        state, made = where / f"{tp}.state.json", where / f"{tp}.json"
        lines: list[Any] = json.loads(made.read_text()) if made.exists() else []
        if state.exists():
            load(collector, state.read_text())
        for step in range(len(lines), steps):
            if how == "killed" and (tp, step) == (1, steps - 1):
                engine.at_step = (engine.steps + 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
            lines += said([collector.collect(step)])
            if rank == 0:
                state.write_text(state_of(collector))
                made.write_text(json.dumps(lines))
            dist.barrier("the state", 60)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4])
