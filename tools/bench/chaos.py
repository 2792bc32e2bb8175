"""Runs that are killed at random moments, again and again: does each end as one that nothing happened to?

    python tools/bench/chaos.py [--quick] [--kills 100] [--seed 1] [--results docs/results/chaos.jsonl] [...]

A run has six short steps with everything in them: trees that are carried over, a reference, passes for old logprobs, a
checkpoint every second step. It is killed by SIGKILL several times before it may end: at a random moment of a phase
(start-up, rollout, reward, exchange, advantage, old_logprobs, ref_logprobs, update, reshard, checkpoint), one rank, all
ranks, the launcher, or the launcher and all ranks. After a kill everything that the run started has to end by itself;
then the same command starts again. Layouts take turns: TP 2, DP 2, one rank.

At the end every metric of every step, the trees of every step and the exported weights must be bit-equal to those of a
run of the same layout that was left alone; only what depends on time is left out. A kill counts as bit-equal when this
holds for its run. A checkpoint is lost when one that was there at the kill is not what the next start resumes from. A
prompt is lost (twice) when the killed run trained it less (more) often than the other one.

Ranks are forked from a process that has imported everything (warm_launcher.py), so that a kill costs seconds;
--torchrun starts them by the real torchrun. --slow-rewards: grading goes on after sampling, so that a kill wanted in
the reward phase meets it and not the exchange behind it; give such runs a --work of their own. --phases and --who: kill
in these phases alone, and these processes. Results are added to the file of --results, one line a kill. --quick: one
run with two kills.

Last line, JSON: {"kills": n, "bit_equal": n, "checkpoints_lost": n, "prompts_lost": n, "prompts_twice": n,
"left_running": n, "by_phase": {phase: kills}}. Exit status 1 when anything was lost, left, or differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from resume import difference
from runs import metrics, tail
from treepo_mega.monitor.registry import depends_on_time
from warm_launcher import ROOT, WarmServer

RANK = Path(__file__).with_name("chaos_rank.py")
SLOW = "tools/bench/slow_reward.py"
STEPS = 6
MARKER = "TREEPO_CHAOS_RUN"
"""Environment variable by which processes of a run are found."""
GONE_S = 150.0
"""Everything has to be gone so long after a kill: the run's own deadlines are 60 s, torchrun's grace is 30 s."""
RUN_S = 400.0
"""Deadline of a run, or of the part of it before a kill."""
RECIPE = [
    f"train.num_rollouts={STEPS}",
    "rollout.rollout_batch_size=4",
    "rollout.n_samples_per_prompt=4",
    "rollout.partial_rollout=24",
    *("rollout.oversample=1", "rollout.surplus=drop"),
    "train.prefix_sharing=tree",
    "train.num_steps_per_rollout=1",
    "train.lr_warmup_iters=0",
    "train.max_tokens_per_gpu=1024",
    "algo.kl_loss_coef=0.01",
    "algo.old_logprobs=recompute",
    "checkpoint.save_interval=2",
    "data.train=[{path: 'examples/tiny_reasoner/train.jsonl@[0:64]'}]",
    "data.eval=[]",
    "eval.interval=0",
    "eval.at_start=false",
    "eval.at_end=false",
    "eval.greedy=false",
    "logging.tensorboard=false",
    "logging.trees_interval=1",
    "logging.trees_prompts=null",
    "rollout.timeout_s=60",
    "distributed.timeout_s=60",
]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp2": (2, ["parallel.tensor_model_parallel_size=2"]),
    "dp2": (2, []),
    "one": (1, []),
}
"""Name to ranks and overrides."""
PHASES = (
    *("start-up", "rollout", "reward", "exchange", "advantage"),
    *("old_logprobs", "ref_logprobs", "update", "reshard", "checkpoint"),
)
WHO = ("rank", "all", "launcher", "node")
KILLS_A_RUN = 5


class Launch(Protocol):
    """A launcher and its ranks."""

    pid: int

    def poll(self) -> int | None:
        """The exit status; None while it runs."""


@dataclass
class Kill:
    """One kill: what was wanted, and what came of it."""

    run: int
    layout: str
    by: str
    who: str
    rank: int
    wanted: str
    phase: str = ""
    step: int = 0
    gone_s: float = 0.0
    newest: int = 0
    resumed: int = 0
    checkpoint_lost: bool = False
    left_running: int = 0
    bit_equal: bool = False


class Runs:
    """Starts runs of the recipe, warm or by torchrun, and waits for their ends."""

    def __init__(self, warm: WarmServer | None, more: list[str]) -> None:
        """`more`: overrides beside RECIPE."""
        self._warm = warm
        self._more = more
        self.by = "torchrun" if warm is None else "warm"

    def start(self, layout: str, run_dir: Path, kill: dict[str, Any] | None = None) -> Launch:
        """The run of `layout` in `run_dir`, begun or resumed, with a kill."""
        ranks, overrides = LAYOUTS[layout]
        arguments = ["train", "examples/tiny_cpu.yaml", *RECIPE, *self._more, *overrides]
        arguments.append(f"logging.run_dir={run_dir}")
        run_dir.mkdir(parents=True, exist_ok=True)
        environment = {MARKER: str(run_dir), "TREEPO_CHAOS": json.dumps(kill), "PYTHONUNBUFFERED": "1"}
        log = run_dir / "log.txt"
        if self._warm is not None:
            return self._warm.launch(ranks, RANK, arguments, log=log, environment=environment)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        env = {**os.environ, **environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with log.open("ab") as out:
            return subprocess.Popen(
                [*torchrun, str(RANK), *arguments], cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True
            )


def processes_of(run_dir: Path) -> list[int]:
    """Ids of the processes of a run: those that have its log open, or its directory in their environment."""
    log = str(run_dir / "log.txt")
    wanted = f"{MARKER}={run_dir}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may end while it is looked at. A forked rank has the environment of the server it was forked from.
        with contextlib.suppress(OSError):
            marked = wanted in (folder / "environ").read_bytes().split(b"\0")
            if marked or any(os.readlink(link) == log for link in (folder / "fd").iterdir()):
                found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]


def wait_until_gone(run_dir: Path) -> tuple[float, int]:
    """(seconds until all processes of a run had ended, how many had not at the deadline and were killed)."""
    began = time.monotonic()
    while left := processes_of(run_dir):
        if time.monotonic() - began > GONE_S:
            for pid in left:
                with contextlib.suppress(OSError):
                    print(f"left: {pid} {Path(f'/proc/{pid}/cmdline').read_bytes()[:200]!r}", flush=True)
                    os.kill(pid, 9)
            return time.monotonic() - began, len(left)
        time.sleep(0.1)
    return time.monotonic() - began, 0


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest whole checkpoint, 0 for none."""
    found = [int(path.parent.name.removeprefix("step_")) for path in run_dir.glob("checkpoints/step_*/manifest.json")]
    return max(found, default=0)


def trained(run_dir: Path) -> dict[int, list[str]]:
    """Prompts of the trees of each step, by the files that the run wrote."""
    out = {}
    for step in range(1, STEPS + 1):
        path = run_dir / "trees" / f"step_{step:06d}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        out[step] = [str(json.loads(line)["prompt_id"]) for line in lines]
    return out


def contents(run_dir: Path) -> dict[str, str]:
    """SHA-256 of what a run leaves besides metrics: trees of every step and the exported weights."""
    found = {str(path.relative_to(run_dir)): timeless_trees(path) for path in run_dir.glob("trees/step_*.jsonl")}
    found["hf/model.safetensors"] = (run_dir / "hf" / "model.safetensors").read_bytes()
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(found.items())}


def timeless_trees(path: Path) -> bytes:
    """A file of trees without the counts whose metric depends on time: which engine had computed a prefix already."""
    trees = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for tree in trees:
        tree["counts"] = {name: n for name, n in tree["counts"].items() if not depends_on_time(f"rollout/{name}")}
    return json.dumps(trees).encode()


class Chaos:
    """Kills runs and compares them with whole ones, whose directories stay under `work`."""

    def __init__(self, runs: Runs, work: Path, draw: random.Random, phases: list[str], who: list[str]) -> None:
        """`phases`, `who`: of PHASES and WHO, what is drawn from."""
        self._phases = phases
        self._who = who
        self._runs = runs
        self._work = work
        self._draw = draw
        self._seconds: dict[str, dict[str, float]] = {}

    def whole(self, layout: str) -> Path:
        """The run of `layout` that is left alone, run now if it was not yet."""
        run_dir = self._work / f"whole_{layout}"
        if not (run_dir / "done").exists():
            shutil.rmtree(run_dir, ignore_errors=True)
            began = time.monotonic()
            self._finish(self._runs.start(layout, run_dir), run_dir, "the run that is left alone")
            (run_dir / "done").write_text(f"{time.monotonic() - began:.1f}")
        rows = metrics(run_dir)
        times: dict[str, list[float]] = {}
        for row in rows[1:]:
            for name, value in row.items():
                if name.startswith("timing_s/"):
                    times.setdefault(name.removeprefix("timing_s/"), []).append(value)
        self._seconds[layout] = {name: sum(values) / len(values) for name, values in times.items()}
        self._seconds[layout]["exchange"] = self._seconds[layout]["reward"]
        self._seconds[layout]["start-up"] = max(1.0, rows[0]["startup_s/total"] - rows[0]["startup_s/imports"])
        return run_dir

    def _finish(self, launch: Launch, run_dir: Path, what: str) -> int | None:
        deadline = time.monotonic() + RUN_S
        while (status := launch.poll()) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} runs for more than {RUN_S:.0f} s:\n{tail(run_dir / 'log.txt')}")
            time.sleep(0.1)
        if status and what.startswith("the run that is left alone"):
            raise RuntimeError(f"{what} ended with {status}:\n{tail(run_dir / 'log.txt')}")
        return status

    def run(self, number: int, layout: str, kills: int) -> list[Kill]:
        """A run that is killed up to `kills` times, then left to finish; the kills that happened."""
        whole = self.whole(layout)
        run_dir = self._work / f"run_{number}"
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True)
        steps = sorted(self._draw.randint(1, STEPS) for _ in range(kills))
        done: list[Kill] = []
        for step in steps:
            kill = self._kill(number, layout, step, run_dir, done)
            if kill is None:
                break
            done.append(kill)
        log = run_dir / "log.txt"
        for _ in range(2):
            # Once more when the last kill came after the end: a complete run says so and leaves with 0.
            if (run_dir / "hf" / "model.safetensors").exists():
                break
            status = self._finish(self._runs.start(layout, run_dir), run_dir, "the resumed run")
            wait_until_gone(run_dir)
            if status:
                print(f"the resumed run ended with {status}:\n{tail(log, 40)}", flush=True)
                break
        self._note_resumed(done, log)
        found = self._difference(whole, run_dir)
        if found:
            print(f"run {number} ({layout}): {found}; kept in {run_dir}", flush=True)
        for kill in done:
            kill.bit_equal = found is None
        return done

    def _difference(self, whole: Path, run_dir: Path) -> str | None:
        if not (run_dir / "hf" / "model.safetensors").exists():
            return "it did not finish"
        found = difference(metrics(whole), metrics(run_dir))
        if found is None:
            expected, got = contents(whole), contents(run_dir)
            wrong = [name for name in expected if got.get(name) != expected[name]]
            found = f"{wrong[0]} differs" if wrong else None
        return found

    def _kill(self, number: int, layout: str, step: int, run_dir: Path, before: list[Kill]) -> Kill | None:
        """Start the run, kill it, and wait until all of it is gone; None when it ended before."""
        ranks, _ = LAYOUTS[layout]
        # All ranks of one are that rank.
        who = self._draw.choice([each for each in self._who if ranks > 1 or each != "all"] or ["rank"])
        kill = Kill(number, layout, self._runs.by, who, self._draw.randrange(ranks), self._draw.choice(self._phases))
        note = run_dir / f"kill_{len(before)}.json"
        usual = self._seconds[layout].get(kill.wanted, 0.1)
        wanted = {
            "phase": kill.wanted, "step": step, "rank": kill.rank, "who": who, "note": str(note),
            "delay_s": self._draw.random() * usual,
        }  # fmt: skip
        launch = self._runs.start(layout, run_dir, wanted)
        deadline = time.monotonic() + RUN_S
        # Until the kill, or the end of a run in which the phase did not come any more.
        while not note.exists() and launch.poll() is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no kill in {RUN_S:.0f} s: {wanted}\n{tail(run_dir / 'log.txt')}")
            time.sleep(0.02)
        time.sleep(0.05)
        if not note.exists():
            wait_until_gone(run_dir)
            return None
        kill.gone_s, kill.left_running = wait_until_gone(run_dir)
        while launch.poll() is None:
            time.sleep(0.05)
        told = json.loads(note.read_text(encoding="utf-8"))
        kill.phase, kill.step = told["phase"], told["step"]
        kill.newest = newest_checkpoint(run_dir)
        with (run_dir / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"\n--- kill {len(before)}: {asdict(kill)}\n")
        return kill

    def _note_resumed(self, kills: list[Kill], log: Path) -> None:
        """From which step each kill was recovered; a start that was killed before it told leaves that to the next."""
        parts = log.read_text(encoding="utf-8", errors="replace").split("\n--- kill ")[1:]
        for number, kill in enumerate(kills):
            for part in parts[number:]:
                if "resumed from" in part or "this run is complete" in part:
                    line = next(line for line in part.splitlines() if "resumed from" in line or "is complete" in line)
                    kill.resumed = int(line.split("step_")[1][:6])
                    kill.checkpoint_lost = kill.resumed < kill.newest
                    break
                if "step 1/" in part:
                    kill.checkpoint_lost = kill.newest > 0
                    break


def prompts_lost_and_twice(whole: Path, run_dir: Path) -> tuple[int, int]:
    """Prompts that were trained less often, and more often, than in the run that was left alone."""
    expected = Counter(prompt for prompts in trained(whole).values() for prompt in prompts)
    got = Counter(prompt for prompts in trained(run_dir).values() for prompt in prompts)
    return (expected - got).total(), (got - expected).total()


def main() -> int:
    """Kill, resume, compare; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="one run with two kills")
    p.add_argument("--kills", type=int, default=100, help="at least so many (default: %(default)s)")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--results", type=Path, help="file that gets a line a kill")
    p.add_argument("--torchrun", action="store_true", help="start ranks by torchrun, imports and all")
    p.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    p.add_argument("--who", nargs="+", choices=WHO, default=list(WHO))
    p.add_argument("--slow-rewards", action="store_true", help="graders take 0.1 s an answer, so that kills meet them")
    p.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    p.add_argument("--work", type=Path, help="where runs go and stay (default: a temporary directory)")
    args = p.parse_args()
    wanted = 2 if args.quick else args.kills
    totals: Counter[str] = Counter()
    by_phase: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos")))
        warm = None if args.torchrun else stack.enter_context(WarmServer())
        # An engine that may replace prompts waits for graders itself, in the rollout.
        slow = [f"data.verifier={SLOW}:compute_score", "rollout.dynamic_sampling=false"]
        more = slow if args.slow_rewards else []
        chaos = Chaos(Runs(warm, more), work, random.Random(args.seed), args.phases, args.who)
        number = 0
        while totals["kills"] < wanted:
            layout = args.layouts[number % len(args.layouts)]
            began = time.process_time(), time.monotonic()
            done = chaos.run(number, layout, min(KILLS_A_RUN, wanted))
            lost, twice = prompts_lost_and_twice(work / f"whole_{layout}", work / f"run_{number}")
            totals.update(
                kills=len(done), bit_equal=sum(kill.bit_equal for kill in done), prompts_lost=lost, prompts_twice=twice,
                checkpoints_lost=sum(kill.checkpoint_lost for kill in done),
                left_running=sum(kill.left_running for kill in done),
            )  # fmt: skip
            by_phase.update(kill.phase for kill in done)
            for kill in done:
                print(
                    f"run {kill.run} {kill.layout}: {kill.who} {kill.rank} killed in {kill.phase} of step {kill.step}, "
                    f"all gone after {kill.gone_s:.1f} s, resumed from {kill.resumed}, "
                    f"{'bit-equal' if kill.bit_equal else 'DIFFERENT'}",
                    flush=True,
                )
            if args.results is not None:
                with args.results.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(asdict(kill)) + "\n" for kill in done)
            print(f"{totals['kills']} kills; this run took {time.monotonic() - began[1]:.0f} s", flush=True)
            if all(kill.bit_equal for kill in done):
                shutil.rmtree(work / f"run_{number}")
            number += 1
    names = ("kills", "bit_equal", "checkpoints_lost", "prompts_lost", "prompts_twice", "left_running")
    print(json.dumps({name: totals[name] for name in names} | {"by_phase": dict(sorted(by_phase.items()))}))
    bad = any(totals[name] for name in ("checkpoints_lost", "prompts_lost", "prompts_twice", "left_running"))
    return 1 if bad or totals["bit_equal"] < totals["kills"] else 0


if __name__ == "__main__":
    sys.exit(main())
