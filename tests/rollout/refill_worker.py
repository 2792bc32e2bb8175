"""One rank of test_refill.py: steps of a collector on fake engines, in each layout that the ranks allow.

`refill_worker.py WHERE STEPS KEYS whole|killed`. KEYS: a list of settings. State is kept under WHERE after each step,
and a later start goes on from it, and from the trees that the step after it had finished (WHERE/<place>.<tp>.run).
Rank 0 writes what each made to WHERE/<place in KEYS>.<tp>.json. `killed`: all ranks die amid the very last step.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed
from torch.distributed import ProcessGroup

from tests.rollout.fakes import FakeEngine, fake_collector, fake_config, load, said, state_of
from treepo_mega.journal import folder
from treepo_mega.rollout.collect import Collector
from treepo_mega.rollout.durable import Durable
from treepo_mega.runtime import dist
from treepo_mega.tree.elsewhere import is_here


def kill_once_a_tree_is_kept(engine: FakeEngine, run_dir: Path, step: int) -> None:
    """SIGKILL for this rank in the first engine step by which some rank has a tree of the step on disk."""

    def look() -> None:
        if folder.files_of(run_dir, step):
            os.kill(os.getpid(), signal.SIGKILL)
        engine.at_step = (engine.steps + 1, look)

    look()


class Lockstep:
    """Where the ranks of an engine meet in each step, as they do in a real one's collectives."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def wait(self) -> None:
        torch.distributed.barrier(self.group)


def check_waiting(collector: Collector, tp: int, resumed: bool) -> None:
    """What waits for another step is on the ranks of its engine, and where it was read from a checkpoint, on all."""
    speaker = dist.rank() // tp * tp
    for job in collector.carried:
        assert (job.state is not None) == (job.home in (None, speaker))
        assert resumed or job.home is not None
    for tree in collector.surplus:
        held = {is_here(node.tokens) for node in tree.nodes}
        assert held == {tree.home in (None, speaker)}
        assert resumed or tree.home is not None


def main(where: Path, steps: int, settings: list[dict[str, Any]], how: str) -> None:
    """See the module docstring."""
    torch.distributed.init_process_group("gloo")
    rank, ranks = dist.rank(), dist.world_size()
    for (place, keys), tp in itertools.product(enumerate(settings), (2, 1)):
        engines = [torch.distributed.new_group(range(first, first + tp)) for first in range(0, ranks, tp)]
        run_dir = str(where / f"{place}.{tp}.run")
        cfg = fake_config(**keys, engine={"tensor_parallel_size": tp}).replace({"logging.run_dir": run_dir})
        # Ranks of one engine draw the same order of ends, and each engine another one.
        collector = fake_collector(cfg, seed=ranks * 10 + rank // tp, share=0.3)
        engine = collector.generator.engine
        assert isinstance(engine, FakeEngine)
        engine.lockstep = Lockstep(engines[rank // tp]) if tp > 1 else None
        state, made = where / f"{place}.{tp}.state.json", where / f"{place}.{tp}.json"
        lines: list[Any] = json.loads(made.read_text()) if made.exists() else []
        resumed = state.exists()
        if resumed:
            load(collector, state.read_text())
        collector.durable = Durable(cfg, origin="", first_step=len(lines), afresh=False, say=print)
        restored: list[float] = []
        for step in range(len(lines), steps):
            if how == "killed" and (place, tp, step) == (len(settings) - 1, 1, steps - 1):
                kill_once_a_tree_is_kept(engine, Path(run_dir), step)
            forest = collector.collect(step)
            restored.append(forest.metrics["rollout/trees_restored"])
            lines += said([forest])
            check_waiting(collector, tp, resumed)
            saved = state_of(collector)
            if rank == 0:
                state.write_text(saved)
                made.write_text(json.dumps(lines))
                (where / f"{place}.{tp}.restored.json").write_text(json.dumps(restored))
            dist.barrier("the state", 60)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4])
