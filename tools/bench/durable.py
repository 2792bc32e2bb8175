"""What does a kill amid a rollout cost, with and without durable rollouts?

    python tools/bench/durable.py [--quick] [--heavy] [--ranks 1]

A recipe of one long rollout is killed (SIGKILL of every process) once a share of its trees is on disk. Then the same
run directory goes on twice, in turns which goes first: as it is, and without what `rollout.durable` kept there. The
second is also the run that was never killed: no step had ended before. Seconds are those of the rollout: *lost* is what
the rollout took until the kill and after it, less what an uninterrupted one takes. --quick: one kill. --heavy: one
kill of a rollout of 600 trees with 32 leaves each, which takes minutes.

Tokens sampled twice are those of trees that were finished at the kill; with durable rollouts there are none. What was
in flight is sampled again by both.

Last line, JSON: {"kills": [{"share", "trees", "trees_on_disk", "tokens", "tokens_twice_with", "tokens_twice_without",
"seconds_until_kill", "seconds_after_with", "seconds_after_without", "seconds_lost_with", "seconds_lost_without",
"bit_equal"}], "bit_equal": n, "tree": {"bytes_per_token", "cpu_ms", "share_of_rollout"}}. Exit status 1 unless all are
bit-equal. `tree`: what keeping one costs, and of the uninterrupted rollout's seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from resume import difference
from runs import ROOT, kill, run, start, tail

sys.path.insert(0, str(ROOT))

from treepo_mega.journal import folder
from treepo_mega.journal.contents import to_record, to_tree
from treepo_mega.journal.file import FRAME, RecordFile, read_records
from treepo_mega.monitor.status import status_path

SHARES = (0.25, 0.5, 0.75, 0.95)
HEAVY_SHARES = (0.75,)
DEADLINE_S = 900


def overrides(ranks: int, prompts: int, leaves: int) -> list[str]:
    """One step whose rollout is nearly all of it; few paths run at once, so that trees end one after the other."""
    return [
        "train.num_rollouts=1",
        f"rollout.rollout_batch_size={prompts}",
        f"rollout.n_samples_per_prompt={leaves}",
        "rollout.dynamic_sampling=false",
        "rollout.engine.max_num_seqs=32",
        "train.max_tokens_per_gpu=8192",
        "logging.status_interval_s=0.05",
        f"parallel.tensor_model_parallel_size={ranks}",
    ]


def on_disk(run_dir: Path) -> list[dict[str, Any]]:
    """The records of the step so far."""
    return [record for path in folder.files_of(run_dir, 0) for record in read_records(path).records]


def count_on_disk(run_dir: Path) -> int:
    """How many they are, by their frames alone: reading them all would take the core that samples."""
    count = 0
    for path in folder.files_of(run_dir, 0):
        size = path.stat().st_size
        with path.open("rb") as file:
            while len(frame := file.read(FRAME.size)) == FRAME.size:
                end = file.seek(FRAME.unpack(frame)[1], os.SEEK_CUR)
                count += end <= size
        # The first record is the header.
        count -= count > 0
    return count


def kill_at(run_dir: Path, ranks: int, keys: list[str], trees: int) -> float:
    """Start the run and kill it when so many trees are on disk; seconds since its rollout began."""
    run_dir.mkdir()
    log = run_dir / "log.txt"
    process = start(ranks, run_dir, keys, log)
    deadline = time.monotonic() + DEADLINE_S
    while count_on_disk(run_dir) < trees:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{trees} trees did not come within {DEADLINE_S} s:\n{tail(log)}")
        time.sleep(0.02)
    killed_at = time.time()
    status = json.loads(status_path(run_dir, 0).read_text(encoding="utf-8"))
    kill(process)
    if status["phase"] != "rollout":
        raise RuntimeError(f"the kill came in the phase {status['phase']!r}, and not in the rollout")
    return killed_at - float(status["since"])


def measure(where: Path, ranks: int, prompts: int, leaves: int, share: float, number: int) -> dict[str, Any]:
    """A kill at a share of the trees, and both ways to go on."""
    keys = overrides(ranks, prompts, leaves)
    killed = where / f"killed_{number}"
    until = kill_at(killed, ranks, keys, round(share * prompts))
    kept = len(on_disk(killed))
    found: dict[bool, list[dict[str, Any]]] = {}
    for durable in ((True, False), (False, True))[number % 2]:
        going_on = where / f"{'with' if durable else 'without'}_{number}"
        shutil.copytree(killed, going_on)
        if not durable:
            shutil.rmtree(going_on / folder.FOLDER)
        found[durable] = run(ranks, going_on, keys, f"the run that goes on, durable {durable}")
    (whole,) = found[False]
    (restored,) = found[True]
    seconds = {durable: float(rows[0]["timing_s/rollout"]) for durable, rows in found.items()}
    finished = restored["rollout/tokens_restored"]
    return {
        "share": share,
        "trees": prompts,
        "trees_on_disk": kept,
        "tokens": whole["rollout/generated_tokens"],
        "tokens_twice_with": 0.0 if restored["rollout/trees_restored"] == kept else finished,
        "tokens_twice_without": finished,
        "seconds_until_kill": round(until, 2),
        "seconds_after_with": round(seconds[True], 2),
        "seconds_after_without": round(seconds[False], 2),
        "seconds_lost_with": round(until + seconds[True] - seconds[False], 2),
        "seconds_lost_without": round(until, 2),
        "bit_equal": difference(found[False], found[True]) is None,
    }


def cost_of_keeping(run_dir: Path, rollout_s: float, prompts: int, ranks: int) -> dict[str, float]:
    """Write the trees of a killed run once more: bytes a token, CPU a tree, and the share of a rollout's seconds."""
    trees = [(record["row"], to_tree(record["tree"])) for record in on_disk(run_dir)]
    tokens = sum(len(node.tokens) for _, tree in trees for node in tree.nodes)
    with tempfile.TemporaryDirectory() as tmp, RecordFile.create(Path(tmp) / "again", {}) as file:
        begun = time.process_time()
        size = sum(file.append({"row": row, "tree": to_record(tree)}) for row, tree in trees)
        cpu_s = (time.process_time() - begun) / len(trees)
    return {
        "bytes_per_token": round(size / tokens, 1),
        "cpu_ms": round(1000 * cpu_s, 2),
        "share_of_rollout": round(cpu_s * prompts / ranks / rollout_s, 4),
    }


def main() -> int:
    """Kill, go on both ways, compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one kill, 24 prompts")
    parser.add_argument("--heavy", action="store_true", help="one kill, 600 prompts of 32 leaves")
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel ranks, each with an engine")
    args = parser.parse_args()
    prompts = 24 if args.quick else 600 if args.heavy else 96
    leaves = 32 if args.heavy else 16
    shares = (0.6,) if args.quick else HEAVY_SHARES if args.heavy else SHARES
    kills = []
    with tempfile.TemporaryDirectory() as tmp:
        for number, share in enumerate(shares):
            one = measure(Path(tmp), args.ranks, prompts, leaves, share, number)
            kills.append(one)
            print(
                f"killed after {one['seconds_until_kill']} s with {one['trees_on_disk']} of {prompts} trees on disk: "
                f"sampled twice {one['tokens_twice_with']:.0f} tokens with durable rollouts, "
                f"{one['tokens_twice_without']:.0f} of {one['tokens']:.0f} without; lost "
                f"{one['seconds_lost_with']} s and {one['seconds_lost_without']} s; "
                f"{'bit-equal' if one['bit_equal'] else 'NOT EQUAL'}",
                flush=True,
            )
        tree = cost_of_keeping(Path(tmp) / "killed_0", kills[0]["seconds_after_without"], prompts, args.ranks)
    print(
        f"keeping a tree: {tree['bytes_per_token']} bytes a token, {tree['cpu_ms']} ms of CPU, "
        f"{tree['share_of_rollout']:.1%} of the rollout"
    )
    equal = sum(one["bit_equal"] for one in kills)
    print(json.dumps({"kills": kills, "bit_equal": equal, "tree": tree}))
    return 0 if equal == len(kills) else 1


if __name__ == "__main__":
    sys.exit(main())
