"""Where a step stops scaling, from 16 to 16,384 GPUs: rollout, refit, exchange, packing, pipeline. A simulation.

    python tools/bench/scaling.py [--quick] [--update] [--lengths RUN [--keep-lengths]]

Trees are grown by the trainer's own search (`tree/search.py`), and each path ends where a distribution of lengths says:
a log-normal one with assumed means, then that of a measured run, stretched so that its longest response is the recipe's
limit. The measured one is in measured_lengths.json, or of the trees of RUN, which --keep-lengths writes there. One unit
of the simulation is UNIT tokens. An engine runs all that its trees want, as the plan's decode step says
(`plan/engine.py`), and goes on to the next unit when every running path has it. Seeds are fixed. Rates are the plan's
assumptions: nothing here was measured on a GPU. --update writes docs/scaling.md; --quick looks at three sizes.

Last line, JSON: {"rows": [{"lengths", "gpus", "batch", "rollout_s", "flat_rollout_s", "idle", "refit_s", "exchange_s",
"packing_s", "update_s", "bubble", "step_s", "tokens_per_s_per_gpu"}], "seconds": CPU seconds of this script}.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import math
import random
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from treepo_mega.config import Config, load_config
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.plan.engine import Engine, decode_step_seconds
from treepo_mega.plan.hardware import Rates, gpu_of
from treepo_mega.plan.layout import Layout
from treepo_mega.plan.lengths import Lengths, MeasuredLengths, read_lengths
from treepo_mega.plan.memory import plan_memory
from treepo_mega.plan.run import plan_run
from treepo_mega.plan.timing import Cluster
from treepo_mega.plan.work import survival
from treepo_mega.tree.search import TreeSearch
from treepo_mega.tree.stop import StopRules
from treepo_mega.tree.wants import Segment

RECIPE = "examples/qwen25_7b_2x8.yaml"
MEASURED = Path(__file__).with_name("measured_lengths.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
SIZES = (16, 64, 256, 1024, 4096, 16384)
UNIT = 64
"""Tokens of a unit of the simulation: a segment of 512 is 8 of them."""
POOL = 96
"""Trees that are grown; engines draw theirs from these."""
ENGINES = 256
"""Engines that are looked at, at most, of each size."""
PROMPTS_A_GPU = 32
"""Of the batch that grows with the cluster; the fixed batch is the recipe's."""
PACKING_S = 1.0 / 4096
"""Seconds a tree to plan packs on one rank: tools/bench/pack.py."""
TOKEN_BYTES = 8
"""Of a token in the exchange of forests: its id and its logprob."""
EOS = 0


def units_of(cfg: Config, mode: str) -> Any:
    """The recipe's rollout with lengths in units."""
    short = {
        "mode": mode,
        "max_response_len": cfg.rollout.max_response_len // UNIT,
        "segment.length": cfg.rollout.segment.length // UNIT,
    }
    return cfg.rollout.replace(short)


def grow(rollout: Any, seed: int, ends: Callable[[int], float]) -> list[tuple[int, int]]:
    """(start, length) in units of every segment of a tree that never waits for an engine. `ends`: chance at a depth."""
    stop = StopRules.from_config(rollout, [EOS], lambda tokens: "")
    # Independent samples are trees of one level; all their paths start at the prompt.
    search = TreeSearch(f"tree {seed}", [1], rollout, seed=seed, stop=stop)
    rng = random.Random(seed)
    running: list[tuple[int, int, Segment]] = []
    out = []
    now = 0
    while not search.done:
        for want in search.wants():
            depth = search.tree.response_length(want.node_id)
            tokens: list[int] = []
            while len(tokens) < want.max_tokens and (not tokens or tokens[-1] != EOS):
                ended = rng.random() < ends(depth + len(tokens))
                tokens.append(EOS if ended else rng.randrange(1, 1 << 30))
            reason = "stop" if tokens[-1] == EOS else "length"
            out.append((now, len(tokens)))
            heapq.heappush(running, (now + len(tokens), want.node_id, Segment(tokens, [-1.0] * len(tokens), reason)))
        now, node, segment = heapq.heappop(running)
        search.take(node, segment)
    return out


def profile(segments: list[tuple[int, int]], units: int) -> np.ndarray:
    """[units] paths that run in each unit."""
    running = np.zeros(units)
    for start, length in segments:
        running[start : start + length] += 1
    return running


def simulate(sizes: tuple[int, ...], measured: MeasuredLengths | None = None) -> list[dict[str, Any]]:
    """The rows of all sizes, with a fixed batch and with one that grows; lengths log-normal, or as `measured`."""
    cfg = load_config(RECIPE, [])
    spec = ModelSpec.from_hf(cfg.model.hf_checkpoint)
    cluster = Cluster(gpu_of("H100"), 8, Rates())
    limit = cfg.rollout.max_response_len
    assumed = Lengths.assumed(cfg, cluster.rates)
    lengths = assumed
    if measured is not None:
        lengths = dataclasses.replace(measured.scaled(limit).put(assumed), prompt=assumed.prompt)
    longest = limit // UNIT
    longer = survival(lengths.response, lengths.spread, limit, lengths.tail)

    def ends(depth: int) -> float:
        alive = longer(max(1.0, depth * UNIT))
        return 1 - longer((depth + 1) * UNIT) / alive if alive > 0 else 1.0

    # A level waits for its slowest segment, so that a tree may take longer than its longest path.
    units = 4 * longest
    pools = {
        mode: np.stack([profile(grow(units_of(cfg, mode), seed, ends), units) for seed in range(POOL)])
        for mode in ("tree", "sequential")
    }
    rows = []
    for gpus in sizes:
        for batch in ("fixed", "growing"):
            prompts = cfg.rollout.rollout_batch_size if batch == "fixed" else PROMPTS_A_GPU * gpus
            kind = "log-normal" if measured is None else "measured"
            rows.append({"lengths": kind} | row(cfg, spec, cluster, lengths, pools, gpus, batch, prompts))
    return rows


def kept_lengths() -> MeasuredLengths:
    """Those that the repository holds."""
    stored = json.loads(MEASURED.read_text(encoding="utf-8"))
    tail, steps = tuple(stored["tail"]), tuple(stored["steps"])
    return MeasuredLengths(stored["run"], stored["leaves"], tail, stored["prompt"], steps)


def row(
    cfg: Config,
    spec: ModelSpec,
    cluster: Cluster,
    lengths: Lengths,
    pools: dict[str, np.ndarray],
    gpus: int,
    batch: str,
    prompts: int,
) -> dict[str, Any]:
    """One size and batch."""
    sized = cfg.replace({"rollout.rollout_batch_size": prompts})
    layout = Layout.of(sized, gpus)
    plan = plan_run(sized, spec, world_size=gpus, cluster=cluster, lengths=lengths, refit=False)
    engine = Engine.of(
        sized, spec, plan_memory(sized, spec, layout, cluster).kv_budget, lengths.prompt + lengths.response / 2
    )
    rng = np.random.default_rng(gpus)
    engines = gpus // layout.tp_v
    took = {}
    idle = 0.0
    for mode, pool in pools.items():
        took[mode], waits = rollout(sized, spec, cluster, lengths, engine, pool, engines, prompts, rng)
        idle = waits if mode == "tree" else idle
    unique = float(pools["tree"].sum(1).mean()) * UNIT * prompts
    # Every rank receives the structure and tokens of the others' trees.
    exchange = TOKEN_BYTES * unique / cluster.link(gpus)
    packing = PACKING_S * prompts
    update = plan.seconds["update"] + plan.seconds["old_logprobs"]
    step = took["tree"] + plan.seconds["reshard"] + exchange + packing + update
    return {
        "gpus": gpus,
        "batch": batch,
        "prompts": prompts,
        "rollout_s": took["tree"],
        "flat_rollout_s": took["sequential"],
        "idle": idle,
        "refit_s": plan.seconds["reshard"],
        "exchange_s": exchange,
        "packing_s": packing,
        "update_s": update,
        "bubble": plan.bubble,
        "step_s": step,
        "tokens_per_s_per_gpu": unique / step / gpus,
    }


def rollout(
    cfg: Config,
    spec: ModelSpec,
    cluster: Cluster,
    lengths: Lengths,
    engine: Engine,
    pool: np.ndarray,
    engines: int,
    prompts: int,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """(seconds until the last engine is done, share of the engines' time that they wait for it), with refills."""

    @cache
    def unit_s(running: int, unit: int) -> float:
        context = lengths.prompt + min(unit * UNIT, cfg.rollout.max_response_len) / 2
        rounds = math.ceil(running / engine.most_running)
        return rounds * UNIT * decode_step_seconds(cfg, spec, cluster, engine, running / rounds, context)

    total = busy = 0.0
    left = float(prompts)
    # Prompts whose rewards are all equal are drawn again, as long as there is one to draw.
    while left >= 1:
        looked_at = min(engines, ENGINES)
        # Prompts are dealt evenly, so that an engine has one more than another at most.
        counts = np.full(looked_at, int(left // engines))
        counts[: math.ceil(looked_at * (left / engines - left // engines))] += 1
        times = []
        for count in counts:
            running = pool[rng.integers(len(pool), size=count)].sum(0) if count else np.zeros(pool.shape[1])
            times.append(sum(unit_s(int(paths), unit) for unit, paths in enumerate(running) if paths))
        total += max(times)
        busy += sum(times) / looked_at
        left *= 1 - lengths.kept
    return total, 1 - busy / total


def page(rows: list[dict[str, Any]], again: list[dict[str, Any]], measured: MeasuredLengths) -> str:
    """docs/scaling.md: `rows` with log-normal lengths, `again` with measured ones."""
    first = {batch: next(row for row in rows if row["batch"] == batch) for batch in ("fixed", "growing")}
    kept = Rates().kept
    out = [
        "# Scaling",
        "",
        "Generated by `python tools/bench/scaling.py --update`. A simulation: nothing here was measured on a GPU.",
        "",
        "The trees are grown by the trainer's own search, for `examples/qwen25_7b_2x8.yaml` on H100. Lengths are",
        "log-normal, with the means that `treepo-mega plan` assumes; none was measured on a model of this size.",
        "The last table has lengths that were measured: those of the demo's tiny model, stretched.",
        "Decoding, links and products take what the plan says. An engine's prompts all start at once. Of each round",
        f"{1 - kept:.0%} of the prompts are drawn again, because their rewards are all equal.",
        "",
    ]
    for batch, what in (("fixed", "A fixed batch of 512 prompts"), ("growing", "A batch of 32 prompts a GPU")):
        out += [
            f"## {what}",
            "",
            "| GPUs | rollout s | independent samples s | engines wait | refit s | exchange s | packing s "
            "| old and update s | step s | tokens/s a GPU | efficiency |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for each in (row for row in rows if row["batch"] == batch):
            efficiency = each["tokens_per_s_per_gpu"] / first[batch]["tokens_per_s_per_gpu"]
            out.append(
                f"| {each['gpus']:,} | {each['rollout_s']:.1f} | {each['flat_rollout_s']:.1f} | {each['idle']:.0%} "
                f"| {each['refit_s']:.2f} | {each['exchange_s']:.2f} | {each['packing_s']:.2f} "
                f"| {each['update_s']:.1f} | {each['step_s']:.1f} "
                f"| {each['tokens_per_s_per_gpu']:.0f} | {efficiency:.0%} |"
            )
        out.append("")
    return "\n".join([*out, *with_measured(rows, again, measured), *findings(rows), ""])


def with_measured(rows: list[dict[str, Any]], again: list[dict[str, Any]], measured: MeasuredLengths) -> list[str]:
    """The fixed batch once more, with measured lengths beside the log-normal ones."""
    tail = measured.tail
    mean = measured.response
    far = tail[int(0.95 * len(tail))]
    steps = ", ".join(map(str, measured.steps))
    out = [
        "## Measured lengths",
        "",
        f"Of the trees that the demo kept (`{measured.run}`, steps {steps}): {measured.leaves:,} responses of its tiny",
        f"model, {mean:.0f} tokens in the mean. The longest is {tail[-1] / mean:.2f} times that,",
        f"and the 95th percentile is {far / mean:.2f} times that. Stretched to the recipe's limit,",
        "they give, for the fixed batch:",
        "",
        "| GPUs | rollout s | independent samples s | engines wait | step s | rollout with log-normal lengths s "
        "| engines wait |",
        "|---|---|---|---|---|---|---|",
    ]
    for each, assumed in zip(again, rows, strict=True):
        if each["batch"] == "fixed":
            out.append(
                f"| {each['gpus']:,} | {each['rollout_s']:.1f} | {each['flat_rollout_s']:.1f} | {each['idle']:.0%} "
                f"| {each['step_s']:.1f} | {assumed['rollout_s']:.1f} | {assumed['idle']:.0%} |"
            )
    return [*out, ""]


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """What the figures say, from the figures."""
    fixed = [row for row in rows if row["batch"] == "fixed"]
    growing = [row for row in rows if row["batch"] == "growing"]
    half = next((row for row in fixed if row["tokens_per_s_per_gpu"] < 0.5 * fixed[0]["tokens_per_s_per_gpu"]), None)
    largest = growing[-1]
    parts = ("rollout_s", "refit_s", "exchange_s", "packing_s", "update_s")
    out = ["## What stops scaling", ""]
    if half is not None:
        out += [
            f"- With a fixed batch the efficiency falls below one half at {half['gpus']:,} GPUs. The longest paths of",
            f"  each round then decode alone: the rollout takes {half['rollout_s']:.0f} s, and engines wait for "
            f"{half['idle']:.0%} of it.",
            "  Refills repeat that tail in every round: `rollout.oversample` draws them at once, and",
            "  `rollout.partial_rollout` carries long paths over.",
        ]
    grown = {name: largest[name] - growing[0][name] for name in parts}
    order = sorted(parts, key=lambda name: -grown[name])
    out += [
        f"- With a batch that grows with the cluster a step is {largest['step_s'] / growing[0]['step_s']:.2f} times as "
        f"long at {largest['gpus']:,} GPUs as at {growing[0]['gpus']}. What grew:",
        "  " + ", ".join(f"{name.removesuffix('_s')} by {grown[name]:.1f} s" for name in order) + ".",
        "  Every rank plans the packs of all trees, so that packing grows with the batch. Exchange is counted as if",
        "  every rank received every token; ranks fetch the tokens of their own packs alone, which is less.",
    ]
    shares = [each["rollout_s"] / each["flat_rollout_s"] for each in fixed]
    out += [
        f"- Trees take {shares[0]:.2f} of the time of independent samples at {fixed[0]['gpus']} GPUs, and "
        f"{shares[-1]:.2f} at {fixed[-1]['gpus']:,}, with a fixed batch.",
        "  Where an engine has few paths, a decode step reads the weights whatever it decodes, and shared tokens save",
        "  little; what trees save in the update does not depend on the size.",
        f"- The refit takes {largest['refit_s']:.2f} s at {largest['gpus']:,} GPUs: a rank receives its part of an",
        "  engine, whatever the number of engines.",
        "- This layout has one pipeline stage. With more, the bubble grows as micro-batches a rank become fewer:",
        "  `treepo-mega plan` says it for every size.",
    ]
    return out


def main() -> int:
    """Simulate, print, and with --update write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three sizes")
    parser.add_argument("--update", action="store_true", help="write docs/scaling.md")
    parser.add_argument("--lengths", metavar="RUN", help="a run that kept trees, for its response lengths")
    parser.add_argument("--keep-lengths", action="store_true", help=f"write them to {MEASURED.name}")
    args = parser.parse_args()
    started = time.process_time()
    measured = kept_lengths() if args.lengths is None else read_lengths(args.lengths)
    if args.keep_lengths:
        stored = dataclasses.asdict(measured) | {"tail": [round(length, 1) for length in measured.tail]}
        MEASURED.write_text(json.dumps(stored) + "\n", encoding="utf-8")
    sizes = SIZES[::2] if args.quick else SIZES
    rows = simulate(sizes)
    again = simulate(sizes, measured)
    text = page(rows, again, measured)
    rows += again
    print(text)
    if args.update:
        PAGE.write_text(text)
    for each in rows:
        each |= {name: round(value, 4) for name, value in each.items() if isinstance(value, float)}
    print(json.dumps({"rows": rows, "seconds": round(time.process_time() - started, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
