"""What a tree saves at sampling: our generator against independent samples and against a level-synchronous tree.

    python tools/bench/rollout.py [--quick] [--repeats 1] [--prompts N] [--dtype fp32]

One vLLM engine, one process, one model of 22 M random weights; the three ways alternate, the prefix cache is emptied
before each, and the minimum over the repeats (--repeats, 1 by default) counts. All three give the same leaves and
lengths, with a seed a request:

    tree          this project's generator, `debug.schedule: async`
    level         `debug.schedule: level`, `debug.continue_paths: never`: one blocking call a level for all prompts, as
                  published
    independent   vLLM's n = w with the prefix cache on: w requests a prompt, each as long as one of the tree's leaves

Random weights do not stop like a trained model, so where paths end is scripted: the length of a response is drawn from
a log-normal law cut at the window, one segment at a time from the node's seed, given that the path has come so far.
`full`: every path runs to the window. `trained`: median 0.45 of the window, sigma 0.35 (and 0.25 between prompts).
`long-tailed`: median 0.12, sigma 0.9 (0.8 between prompts). The tokens are sampled by the model all the same.

`steps`: segments end with a step of reasoning (`rollout.segment.end`) instead of after a fixed number of tokens; the
lengths of steps are log-normal too, and nothing is aligned to KV blocks: what a branch shares of a partial block is
copied (`debug.copy_partial_blocks`).

Shapes are depth x segment length as in the paper (28, 14 and 7 segments) with segments of one of the CPU's KV blocks of
32 tokens, w = 16 leaves, binary branching, 8 prompts in flight, and one shape with 16. --quick: 4 x 32 and 3 x 32 with
8 leaves. What is being done is told on stderr.

Why the time saved is less than the tokens saved: an engine step costs a part that no batch shares and a part for each
running request. A table of ms per step over the running batch is measured first; with the batch of every step of a run
it gives the ratio that this engine makes possible, printed beside the measured one (`explained`). A tree begins with
two branches a prompt, so that its first steps run small batches; more prompts in flight fill them.

Last line, JSON: {"shapes": [{"name", "prompts", "token_ratio", "forwarded_over_unique", "time_vs_independent",
"time_vs_level"}], ...}. token_ratio = unique / flat response tokens. forwarded_over_unique = tokens that went through
the model / tokens of the forest, prompts included. time_vs_*: tree's seconds / theirs (below 1: the tree is faster);
cpu_vs_* the same in CPU time, which other load on the machine disturbs less; predicted_vs_independent the same from the
table; running_mean the mean batch of (tree, level, independent). "engine_steps": [{"running", "cpu_ms",
"cpu_ms_per_token"}], the table; "prefill_cpu_ms_per_token": of a prompt's tokens.

With --choices: what each choice of segment border costs in recomputed tokens, with and without copies of partial
blocks, and the two transfer rules compared on leaves, token_ratio, duplicates and speed; one more JSON key, "choices".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rich.console import Console
from rich.progress import Progress as RichProgress

from treepo_mega.config import Config, RolloutConfig, parse_config
from treepo_mega.data.prompts import Prompt
from treepo_mega.engine.engine import Engine
from treepo_mega.engine.stream import Finished, SegmentRequest, SegmentStream
from treepo_mega.monitor.progress import quieten_libraries
from treepo_mega.rollout.generator import Generator
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.node import Tree

VOCABULARY, WINDOW, PROMPT = 8192, 896, 97
EOS = VOCABULARY  # never sampled: written over the last token where the script ends a path
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_hidden_layers": 11,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
PATTERNS = {
    "full": None,
    "trained": (0.45, 0.35, 0.25),
    "long-tailed": (0.12, 0.9, 0.8),
}
"""Median (share of the window), sigma of ln(length) within a prompt, sigma of the medians between prompts."""


STEPS = {"trained": (0.35, 0.5), "long-tailed": (0.15, 1.0)}
"""Length of a step of reasoning where segments end at steps: median (share of the longest), sigma of ln(length)."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    depth: int
    length: int
    pattern: str
    steps: bool = False
    leaves: int = 16
    prompts: int = 8

    @property
    def window(self) -> int:
        """Tokens of the longest response."""
        return self.depth * self.length

    @property
    def name(self) -> str:
        """As it is printed."""
        more = (", steps" if self.steps else "") + (f", {self.prompts} prompts" if self.prompts != 8 else "")
        return f"{self.depth}x{self.length} {self.pattern}{more}"


QUICK = [Case(4, 32, "trained", leaves=8), Case(3, 32, "long-tailed", steps=True, leaves=8)]
CASES = [
    Case(14, 32, "trained"),
    Case(14, 32, "long-tailed"),
    Case(7, 32, "full"),
    Case(7, 32, "trained"),
    Case(7, 32, "trained", prompts=16),
    Case(28, 32, "trained"),
    Case(7, 32, "trained", steps=True),
    Case(7, 32, "long-tailed", steps=True),
]


class Script:
    """Where paths end, from (prompt, node seed, tokens so far) alone: the same for any schedule."""

    def __init__(self, pattern: str, window: int, prompts: Sequence[Prompt], steps: bool = False) -> None:
        self.law, self.steps = PATTERNS[pattern], STEPS[pattern] if steps else None
        self.medians = {}
        if self.law is not None:
            share, _, between = self.law
            for p in prompts:
                z = random.Random(derive_seed("median", p.id)).gauss(0, 1)
                self.medians[tuple(p.tokens)] = share * window * math.exp(between * z)

    def step(self, seed: int, most: int) -> int:
        """Tokens of a segment of at most `most`: all of them, or a step of reasoning."""
        if self.steps is None:
            return most
        share, sigma = self.steps
        z = random.Random(derive_seed(seed, "step")).gauss(0, 1)
        return max(1, min(most, round(share * most * math.exp(sigma * z))))

    def end(self, prompt: tuple[int, ...], far: int, seed: int, most: int) -> int | None:
        """Tokens at which a path ends that has come `far` tokens behind `prompt`, if that is within `most` more."""
        if self.law is None:
            return None
        law, median = statistics.NormalDist(0, self.law[1]), self.medians[prompt]

        def below(tokens: float) -> float:
            return law.cdf(math.log(tokens / median)) if tokens > 0 else 0.0

        so_far = below(far)
        u = so_far + random.Random(derive_seed(seed, "end")).random() * (1 - so_far)
        if u >= below(far + most):
            return None
        total = median * math.exp(law.inv_cdf(min(max(u, 1e-12), 1 - 1e-12)))
        return min(most, max(1, round(total) - far))


@dataclass(frozen=True)
class ScriptedStream:
    """A stream of the engine whose segments end where the script says."""

    engine: ScriptedEngine
    stream: SegmentStream

    def extend(self, name: str, max_tokens: int, min_tokens: int = 1) -> None:
        """As the stream's."""
        self.engine.extend(self.stream, name, max_tokens)

    def cancel(self) -> None:
        """As the stream's."""
        self.stream.cancel()


class ScriptedEngine:
    """The engine, with the script instead of EOS and of borders; counts nothing and changes nothing else."""

    def __init__(self, engine: Engine, script: Script, tree_seeds: dict[tuple[int, ...], int]) -> None:
        self.engine, self.script, self.tree_seeds = engine, script, tree_seeds
        self.ends: set[str] = set()
        self.batches: list[int] = []  # running requests, step by step
        self.streams: dict[str, SegmentStream] = {}
        self.far: dict[str, tuple[tuple[int, ...], int]] = {}  # a run's name -> its prompt, tokens behind it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def _size(self, name: str, prompt: tuple[int, ...], far: int, seed: int, most: int) -> int:
        """Tokens of a segment by the script; remembers whether the path ends with it."""
        size = self.script.step(seed, most)
        end = self.script.end(prompt, far, seed, size)
        if end is not None:
            self.ends.add(name)
            return end
        self.far[name] = prompt, far + size
        return size

    def submit(self, request: SegmentRequest) -> ScriptedStream:
        """As the engine's; a segment is asked for up to where the script ends it."""
        prompt = tuple(request.prefix[:PROMPT])
        far = len(request.prefix) - PROMPT
        size = self._size(request.name, prompt, far, request.seed, request.max_tokens)
        changes: dict[str, Any] = {"max_tokens": size, "stop_token_ids": [], "reported_by_segment": True}
        if request.name in self.ends:
            changes |= {"peek": 0, "run": 0}
        stream = self.engine.submit(replace(request, **changes))
        self.streams[request.name] = stream
        return ScriptedStream(self, stream)

    def extend(self, stream: SegmentStream, name: str, max_tokens: int) -> None:
        """The script says where the next segment of `stream` ends."""
        prompt, far = self.far.pop(stream.name)
        seed = derive_seed(self.tree_seeds[prompt], *map(int, name.partition(":")[2].split(".")))
        self.streams[name] = self.streams.pop(stream.name)
        stream.extend(name, self._size(name, prompt, far, seed, max_tokens), 1)

    def step(self) -> list[Finished]:
        """As the engine's; the last token of a path that ended is EOS."""
        out = []
        self.batches.append(len(self.engine.unfinished))
        for x in self.engine.step():
            if x.request_id in self.ends:
                self.ends.remove(x.request_id)
                if x.more:
                    self.streams[x.request_id].cancel()
                x = replace(x, tokens=[*x.tokens[:-1], EOS], finish_reason="stop", more=False)
            out.append(x)
        return out


class Bench:
    """The engine, the prompts, and the three ways to sample them."""

    def __init__(self, hf: Path, dtype: str, prompts: int, **engine: Any) -> None:
        """`engine` replaces keys of rollout.engine."""
        self.cfg = config(hf, dtype, **engine)
        self.engine = Engine(hf, self.cfg)
        rng = random.Random(7)
        self.prompts = self.all_prompts = [
            Prompt(f"p{k}", "", [rng.randrange(VOCABULARY) for _ in range(PROMPT)], "", "exact", "bench")
            for k in range(prompts)
        ]

    def take(self, prompts: int) -> None:
        """The next runs are of the first so many prompts."""
        self.prompts = self.all_prompts[:prompts]

    @contextlib.contextmanager
    def vllm_alone(self, really: bool) -> Iterator[None]:
        """Without copies of partial blocks, if `really`."""
        self.engine.branch_cache.enabled = not really
        try:
            yield
        finally:
            self.engine.branch_cache.enabled = True

    def grow(self, script: Script, rollout: RolloutConfig) -> tuple[list[Tree], dict[str, Any]]:
        """Trees by our generator under `rollout`; counts with seconds and CPU seconds."""
        seeds = {tuple(p.tokens): derive_seed(self.cfg.train.seed, "train", 0, p.id) for p in self.prompts}
        scripted = ScriptedEngine(self.engine, script, seeds)
        generator = Generator(scripted, self.cfg, NoText())  # type: ignore[arg-type]
        generator.eos_token_ids = [EOS]
        generator.borders = lambda _: frozenset()  # type: ignore[method-assign]  # the script knows where steps end
        cpu, wall = time.process_time(), time.perf_counter()
        trees = generator.rollout(self.prompts, step=0, rollout=rollout)
        counts = {**generator.counts, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        return trees, counts | {"batches": scripted.batches}

    def independent(self, trees: Sequence[Tree]) -> dict[str, Any]:
        """As many samples a prompt as its tree has leaves, and as long; everything submitted at once."""
        self.engine.reset_prefix_cache()
        cpu, wall = time.process_time(), time.perf_counter()
        for k, tree in enumerate(trees):
            for n, leaf in enumerate(tree.leaves):
                length = len(tree.response(leaf))
                self.engine.submit(
                    SegmentRequest(
                        name=f"{k}:{n}", prefix=tree.prompt_tokens, max_tokens=length, seed=derive_seed(k, n)
                    )
                )
        forwarded, batches = 0, []
        while self.engine.busy:
            batches.append(len(self.engine.unfinished))
            for x in self.engine.step():
                forwarded += PROMPT - x.num_cached_tokens + len(x.tokens) - 1
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        return {"forwarded_tokens": forwarded, "engine_steps": len(batches), "batches": batches, **seconds}


@dataclass(frozen=True)
class StepTimes:
    """CPU milliseconds of an engine step by the requests that run in it, and of a prompt's token."""

    running: list[int]
    cpu_ms: list[float]
    prefill_ms: float

    @classmethod
    def measure(cls, bench: Bench, steps: int = 8) -> StepTimes:
        """Of requests behind one cached prompt, each sampling a few tokens; and of prompts that are not cached."""

        def timed() -> float:
            cpu = time.process_time()
            bench.engine.step()
            return 1e3 * (time.process_time() - cpu)

        bench.engine.reset_prefix_cache()
        for k, p in enumerate(bench.prompts):
            bench.engine.submit(SegmentRequest(name=f"prompt {k}", prefix=p.tokens, max_tokens=2, seed=k))
        first, second = timed(), timed()
        prefill = (first - second) / ((PROMPT - 1) * len(bench.prompts))
        running, found = [1, 8, 16, 32, 64, 128], []
        for n in running:
            for k in range(n):
                bench.engine.submit(
                    SegmentRequest(name=f"{n}:{k}", prefix=bench.prompts[0].tokens, max_tokens=steps + 1, seed=k)
                )
            bench.engine.step()
            found.append(statistics.median(timed() for _ in range(steps)))
        return cls(running, found, prefill)

    def at(self, running: int) -> float:
        """Of one step: linear between the measured batches, and on beyond them."""
        xs, ys = self.running, self.cpu_ms
        i = next((i for i in range(1, len(xs) - 1) if running <= xs[i]), len(xs) - 1)
        return ys[i - 1] + (ys[i] - ys[i - 1]) * (running - xs[i - 1]) / (xs[i] - xs[i - 1])

    def predict(self, batches: Sequence[int], forwarded: float) -> float:
        """Of a run with these batches; what it forwarded beyond a token a running request were prefixes."""
        return sum(map(self.at, batches)) + self.prefill_ms * max(0.0, forwarded - sum(batches))


class Told:
    """What is being done, on stderr: a bar on a terminal, else lines."""

    def __init__(self, total: int) -> None:
        self.started, self.total, self.done = time.monotonic(), total, 0
        self.bar = None
        if sys.stderr.isatty():
            self.bar = RichProgress(*RichProgress.get_default_columns(), console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=total)

    def say(self, what: str) -> None:
        """`what` begins; the part before it is done."""
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=what)
        else:
            seconds = time.monotonic() - self.started
            print(f"[{seconds:4.0f} s] {self.done + 1} of {self.total}: {what}", file=sys.stderr, flush=True)
        self.done += 1

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()


class NoText:
    """A tokenizer for stop rules that look at no text (answer_box and repetition are off)."""

    eos_token_id = EOS
    all_special_ids: tuple[int, ...] = ()

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        """Nothing."""
        return ""


def config(hf: Path, dtype: str, **engine: Any) -> Config:
    """The run that the bench samples for; shapes replace its rollout section, `engine` keys of rollout.engine."""
    raw = {
        "model": {"hf_checkpoint": str(hf), "params_dtype": dtype},
        "data": {"train": [{"reasoning_gym": "chain_sum"}], "max_prompt_len": PROMPT},
        "rollout": {
            "max_response_len": WINDOW,
            "segment": {"length": 32},
            "n_samples_per_prompt": 16,
            "stop": {"answer_box": False, "repetition_window": 0},
            "engine": {"kv_cache_memory_mb": 1024, "max_num_seqs": 1024, "max_num_batched_tokens": 8192} | engine,
        },
    }
    return parse_config(raw)


def make_model(directory: Path, dtype: str, sizes: dict[str, Any] = MODEL) -> int:
    """Write a random model; returns its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    model = LlamaForCausalLM(LlamaConfig(**sizes, dtype=name, eos_token_id=2, bos_token_id=1))
    model.to(getattr(torch, name)).save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def measure(bench: Bench, case: Case, repeats: int, times: StepTimes, told: Told) -> dict[str, Any]:
    """One row: the three ways in turn, the minimum of each."""
    bench.take(case.prompts)
    script = Script(case.pattern, case.window, bench.prompts, case.steps)
    shape = {"segment.length": case.length, "max_response_len": case.window, "n_samples_per_prompt": case.leaves}
    r = bench.cfg.rollout.replace({**shape, "segment.end": "newline" if case.steps else "length"})
    level = r.replace({"debug.schedule": "level", "debug.continue_paths": "never"})
    best: dict[str, dict[str, Any]] = {}
    for k in range(repeats):
        told.say(f"{case.name}, {k + 1} of {repeats}: tree")
        trees, tree = bench.grow(script, r)
        told.say(f"{case.name}, {k + 1} of {repeats}: level-synchronous")
        others, synchronous = bench.grow(script, level)
        if [len(t.response(i)) for t in trees for i in t.leaves] != [
            len(t.response(i)) for t in others for i in t.leaves
        ]:
            raise RuntimeError(f"{case.name}: the two schedules did not give the same leaves")
        told.say(f"{case.name}, {k + 1} of {repeats}: independent samples")
        alone = bench.independent(trees)
        for name, got in (("tree", tree), ("level", synchronous), ("independent", alone)):
            old = best.setdefault(name, got)
            best[name] = {**got, **{k: min(old[k], got[k]) for k in ("wall", "cpu")}}
    tree, level_, alone = best["tree"], best["level"], best["independent"]
    ways = (tree, level_, alone)
    unique = tree["unique_tokens"] + PROMPT * len(trees)
    predicted = {id(x): times.predict(x["batches"], x["forwarded_tokens"]) for x in ways}
    return {
        "name": case.name,
        "prompts": len(trees),
        "leaves": int(tree["leaves"]),
        "mean_length": tree["flat_tokens"] / tree["leaves"],
        "token_ratio": tree["token_ratio"],
        "forwarded_over_unique": tree["forwarded_tokens"] / unique,
        "time_vs_independent": tree["wall"] / alone["wall"],
        "time_vs_level": tree["wall"] / level_["wall"],
        "cpu_vs_independent": tree["cpu"] / alone["cpu"],
        "cpu_vs_level": tree["cpu"] / level_["cpu"],
        "predicted_vs_independent": predicted[id(tree)] / predicted[id(alone)],
        "running_mean": [statistics.mean(x["batches"]) for x in ways],
        "trajectories_per_s": tree["leaves"] / tree["wall"],
        "independent_per_s": tree["leaves"] / alone["wall"],
        "steps": [int(x["engine_steps"]) for x in ways],
        "forwarded": [int(x["forwarded_tokens"]) for x in ways],
    }


def choices(bench: Bench, pattern: str) -> list[dict[str, Any]]:
    """What borders, budget transfer and the peek of an uncertainty budget cost, on the 14-segment shape."""
    bench.take(8)
    script = Script(pattern, 448, bench.prompts)
    base = bench.cfg.rollout.replace({"segment.length": 32, "max_response_len": 448})
    rows = []
    for name, change in (
        ("aligned to KV blocks", {}),
        ("not aligned", {"debug.segment_alignment": "none"}),
        ("segments of 24, not aligned", {"segment.length": 24}),
        ("segments of 24, vLLM alone", {"segment.length": 24}),
        ("segments of 24, stretched to blocks", {"segment.length": 24, "debug.segment_alignment": "kv_block"}),
        ("transfer: quota", {"branching.transfer": "quota"}),
        ("budget: entropy (peeks)", {"branching.budget.kind": "entropy"}),
    ):
        with bench.vllm_alone(name.endswith("vLLM alone")):
            trees, c = bench.grow(script, base.replace(change))
        first = [sum(n.depth == 1 for n in t.nodes) for t in trees]
        rows.append(
            {
                "name": name,
                "leaves": int(c["leaves"]),
                "token_ratio": c["token_ratio"],
                "recomputed_share": c["recomputed_tokens"] / c["forwarded_tokens"],
                "forwarded_over_unique": c["forwarded_tokens"] / (c["unique_tokens"] + PROMPT * len(trees)),
                "fallbacks": int(c["fallbacks"]),
                "duplicates": int(c["duplicates"]),
                "distinct_beginnings": sum(first) / len(first),
                "engine_steps": int(c["engine_steps"]),
                "seconds": c["wall"],
                "tokens_per_s": c["flat_tokens"] / c["wall"],
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, str]]) -> None:
    """A table for people: (key, heading, format)."""
    print("".join(f"{heading:>{28 if k == 'name' else 13}}" for k, heading, _ in columns))
    for row in rows:
        print("".join(f"{format(row[k], f):>{28 if k == 'name' else 13}}" for k, _, f in columns))


def table_of_steps(times: StepTimes) -> dict[str, Any]:
    """The keys of the output that say what a step costs."""
    rows = [
        {"running": n, "cpu_ms": ms, "cpu_ms_per_token": ms / n}
        for n, ms in zip(times.running, times.cpu_ms, strict=True)
    ]
    return {"engine_steps": rows, "prefill_cpu_ms_per_token": times.prefill_ms}


def report(out: dict[str, Any]) -> None:
    """All tables for people."""
    rows = out["shapes"]
    table = [
        ("name", "shape", "s"),
        ("leaves", "leaves", "d"),
        ("mean_length", "mean length", ".0f"),
        ("token_ratio", "token_ratio", ".3f"),
    ]
    table += [("forwarded_over_unique", "fwd/unique", ".3f"), ("time_vs_independent", "t/independ.", ".3f")]
    table += [("cpu_vs_independent", "(cpu)", ".3f"), ("time_vs_level", "t/level", ".3f")]
    table += [("cpu_vs_level", "(cpu)", ".3f"), ("trajectories_per_s", "traj/s", ".1f")]
    table += [("independent_per_s", "indep. traj/s", ".1f")]
    show(rows, table)
    for row in rows:
        print(f"{row['name']:>28}  engine steps, forwarded tokens (tree, level, independent): ", end="")
        print(row["steps"], row["forwarded"])
    print("\nms of CPU time per engine step, by requests that run in it:")
    for row in out["engine_steps"]:
        print(f"{row['running']:>28}  {row['cpu_ms']:7.1f} ms, {row['cpu_ms_per_token']:5.2f} a token")
    for row in rows:
        tree, _, alone = row["running_mean"]
        print(
            f"{row['name']:>28}  explained: {tree:.0f} running in a tree's step, {alone:.0f} in an independent one's: "
            f"predicted {row['predicted_vs_independent']:.3f} of the CPU time, measured {row['cpu_vs_independent']:.3f}"
            f" (token_ratio {row['token_ratio']:.3f})"
        )
    if "choices" in out:
        keys = ("leaves", "token_ratio", "recomputed_share", "forwarded_over_unique", "fallbacks", "duplicates")
        formats = ("d", ".3f", ".3f", ".3f", "d", "d")
        wide = [("name", "choice", "s"), *((k, k[:12], f) for k, f in zip(keys, formats, strict=True))]
        show(out["choices"], [*wide, ("engine_steps", "steps", "d"), ("tokens_per_s", "flat tok/s", ".0f")])


def main() -> int:
    """Run and print; the exit status is 0 unless something failed."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="two small shapes")
    p.add_argument("--repeats", type=int, default=1, help="the minimum of so many counts (default: %(default)s)")
    p.add_argument("--prompts", type=int, help="in flight, in every shape (default: 8, 16 in one shape)")
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    p.add_argument("--only", default="", help="only shapes whose name holds this")
    p.add_argument("--choices", action="store_true", help="also compare borders and transfer rules")
    args = p.parse_args()
    quieten_libraries()
    cases = [case for case in (QUICK if args.quick else CASES) if args.only in case.name]
    if not cases or args.repeats < 1 or (args.prompts is not None and args.prompts < 1):
        p.error(f"--only {args.only!r} leaves {len(cases)} shapes; --repeats and --prompts must be positive")
    if args.prompts is not None:
        cases = list(dict.fromkeys(replace(case, prompts=args.prompts) for case in cases))
    told = Told(4 + 3 * args.repeats * len(cases) + args.choices)
    with tempfile.TemporaryDirectory() as tmp:
        told.say("model")
        size = make_model(Path(tmp), args.dtype)
        told.say("engine")
        bench = Bench(Path(tmp), args.dtype, max(8, *(case.prompts for case in cases)))
        bench.take(8)
        told.say("warm-up")
        short = bench.cfg.rollout.model_copy(update={"mode": "sequential", "max_response_len": 8})
        bench.independent(bench.grow(Script("full", 8, bench.prompts), short)[0])
        told.say("ms per engine step")
        times = StepTimes.measure(bench)
        rows = [measure(bench, case, args.repeats, times, told) for case in cases]
        out: dict[str, Any] = {"shapes": rows, **table_of_steps(times)}
        if args.choices:
            told.say("choices")
            out["choices"] = choices(bench, "trained")
    told.close()
    print(f"{size / 1e6:.1f} M parameters, {args.dtype}, ", end="")
    print(f"minimum of {args.repeats} alternated repeats")
    report(out)
    print(json.dumps(out))
    sys.stdout.flush()
    os._exit(0)  # the engine's destructor would tear down process groups


if __name__ == "__main__":
    main()
