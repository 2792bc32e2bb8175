"""`treepo-mega eval`: accuracy against compute, for trees and for independent samples, on one engine.

    treepo-mega eval CONFIG.yaml model.hf_checkpoint=runs/demo/hf
    treepo-mega eval CONFIG.yaml --sampler both --samples 1,2,4,8,16 --branch-factor 2,4 --compute-budget 600
    torchrun --nproc-per-node 4 --no-python treepo-mega eval CONFIG.yaml        an engine a rank

Samples every prompt of data.eval with each sampler and number of samples, and reports avg@k, pass@k and maj@k beside
what they cost: tokens that went through the model, a prompt. That is the paper's figure 9 (test-time scaling: which
branch factor is best at which compute) as a command. A `--compute-budget` of tokens a prompt ends each sampler's
series before it would be exceeded, and names the best maj@k within it.

Reads Hugging Face weights (`model.hf_checkpoint`; for a Megatron checkpoint use treepo-mega convert to-hf first)
and needs no Megatron layout: every rank has an engine, `rollout.engine.tensor_parallel_size` ranks share one. Prompts
are dealt to the engines by expected cost and stolen by those that run dry, as in training. Writes
eval.json and eval.html to `--output` (default: <logging.run_dir>/eval).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from treepo_mega.config import Config, ConfigError, ParallelConfig, RolloutConfig
from treepo_mega.data.end_tokens import find_eos_token_ids
from treepo_mega.data.prompts import Prompt, load_prompts
from treepo_mega.data.rewards import RewardPool
from treepo_mega.data.rewards.trial import verifiers_of
from treepo_mega.data.tokenizer import describe_size, load_tokenizer
from treepo_mega.engine.engine import Engine
from treepo_mega.environment.setup import open_environment
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.progress import Progress
from treepo_mega.monitor.report.charts import colour, lines
from treepo_mega.monitor.report.page import Charts, document, table
from treepo_mega.rollout.eval import Evaluator
from treepo_mega.rollout.generator import Generator
from treepo_mega.runtime import dist
from treepo_mega.runtime.process import run_and_leave


@dataclass(frozen=True)
class Plan:
    """What to sample: the command's options."""

    samplers: tuple[str, ...]
    samples: tuple[int, ...]
    branch_factors: tuple[int, ...]
    temperature: float
    compute_budget: float | None
    output: Path


@dataclass(frozen=True)
class Point:
    """One measurement. `tokens`: through the model, a prompt; `seconds`: of sampling and grading, this run."""

    sampler: str
    k: int
    tokens: float
    avg: float
    passed: float
    majority: float
    response_len: float
    truncated: float
    lost: int
    seconds: float


def series(cfg: Config, plan: Plan) -> list[tuple[str, RolloutConfig]]:
    """(name, how to sample) of every sampler that the plan asks for."""
    out = []
    if "sequential" in plan.samplers:
        out.append(("sequential", cfg.rollout.model_copy(update={"mode": "sequential"})))
    if "tree" in plan.samplers:
        for factor in plan.branch_factors:
            tree = {"mode": "tree", "branching.factor": factor, "branching.initial": None}
            out.append((f"tree b={factor}", cfg.rollout.replace(tree)))
    return out


def run(cfg: Config, plan: Plan) -> list[Point]:
    """All points, the same on every rank. Collective over all ranks. Raises ConfigError without data.eval."""
    hf_dir = cfg.model.hf_checkpoint
    if not cfg.data.eval:
        raise ConfigError("data.eval: there are no prompts to evaluate on; set data.eval=[{path: FILE}]")
    # Any number of ranks: what is sampled does not depend on Megatron's layout, and no batch is trained on.
    cfg = cfg.model_copy(update={"parallel": ParallelConfig()})
    progress = Progress(enabled=cfg.logging.progress)
    spec = ModelSpec.from_hf(hf_dir)
    dist.initialize(cfg, spec)
    # Only now: before the group exists, every rank takes itself for rank 0.
    progress.enabled = progress.enabled and dist.is_main()
    tokenizer = load_tokenizer(hf_dir, cfg.data)
    progress.say(*filter(None, [describe_size(len(tokenizer), spec.vocab_size)]))
    # Asked here, although the generator asks again: an error here costs no engine.
    find_eos_token_ids(hf_dir, tokenizer, cfg.rollout.stop.eos_token_ids)
    environment = open_environment(cfg)
    loaded = load_prompts(cfg.data.eval, cfg.data, tokenizer, vocab_size=spec.vocab_size, opener=environment)
    progress.say(*loaded.notes)
    prompts = loaded.prompts[: cfg.eval.max_prompts]
    points: list[Point] = []
    with RewardPool(cfg.reward) as pool:
        # Workers import their verifiers while the engine is built.
        pool.warm(verifiers_of(cfg.reward, prompts))
        engine = Engine(hf_dir, cfg, seed=cfg.train.seed)
        pool.finish_warming(progress.say)
        generator = Generator(engine, cfg, tokenizer, environment=environment, progress=progress.leaves)
        progress.say(f"{len(prompts)} prompts, temperature {plan.temperature}, {dist.world_size()} ranks")
        evaluator = Evaluator(generator, pool, cfg)
        for name, sampling in series(cfg, plan):
            mine: list[Point] = []
            for samples in plan.samples:
                # The tokens are the same on every rank, so that all end a series together: a point is collective.
                if plan.compute_budget and mine and mine[-1].tokens * samples / mine[-1].k > plan.compute_budget:
                    progress.say(
                        f"{name:>12}  stopped before {samples} samples: over {plan.compute_budget:g} tokens a prompt"
                    )
                    break
                rollout = sampling.model_copy(update={"n_samples_per_prompt": samples})
                mine.append(_point(evaluator, prompts, name, rollout, plan.temperature))
                progress.close()
                progress.say(_line(mine[-1]))
            points += mine
    return points


def _point(
    evaluator: Evaluator, prompts: Sequence[Prompt], name: str, rollout: RolloutConfig, temperature: float
) -> Point:
    started = time.monotonic()
    samples = rollout.n_samples_per_prompt
    metrics = evaluator.evaluate(prompts, temperature=temperature, n=samples, step=0, rollout=rollout)
    return Point(
        sampler=name,
        k=samples,
        tokens=metrics["forwarded_tokens"] / max(1.0, metrics["prompts"]),
        avg=metrics[f"avg@{samples}"],
        passed=metrics[f"pass@{samples}"],
        majority=metrics[f"maj@{samples}"],
        response_len=metrics["response_len"],
        truncated=metrics["truncated"],
        lost=int(metrics["lost"]),
        seconds=time.monotonic() - started,
    )


def _line(p: Point) -> str:
    return (
        f"{p.sampler:>12}  k {p.k:<3} tokens/prompt {p.tokens:8.1f}  avg@{p.k} {p.avg:.3f}  pass@{p.k} {p.passed:.3f}"
        f"  maj@{p.k} {p.majority:.3f}  len {p.response_len:.1f}  s {p.seconds:.1f}"
    )


def best_within(points: Sequence[Point], budget: float | None) -> dict[str, Point]:
    """Each sampler's point with the highest maj@k that costs no more than `budget`; the cheapest of equals."""
    out: dict[str, Point] = {}
    for point in sorted(points, key=lambda point: (-point.majority, point.tokens)):
        if budget is None or point.tokens <= budget:
            out.setdefault(point.sampler, point)
    return out


def write(points: Sequence[Point], plan: Plan, prompts_from: str) -> list[Path]:
    """eval.json and eval.html in plan.output; returns their paths."""
    plan.output.mkdir(parents=True, exist_ok=True)
    best = best_within(points, plan.compute_budget)
    data = {
        "checkpoint": prompts_from,
        "temperature": plan.temperature,
        "compute_budget": plan.compute_budget,
        "points": [asdict(point) for point in points],
        "best": {name: asdict(point) for name, point in best.items()},
    }
    paths = [plan.output / "eval.json", plan.output / "eval.html"]
    paths[0].write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(page(points, best, plan, prompts_from), encoding="utf-8")
    return paths


def page(points: Sequence[Point], best: dict[str, Point], plan: Plan, checkpoint: str) -> str:
    """One HTML page: three curves over tokens, and the table behind them."""
    names = list(dict.fromkeys(point.sampler for point in points))
    keys = "".join(
        f'<span class="key" style="background:{colour(i)}"></span>{escape(label)} &nbsp; '
        for i, label in enumerate(names)
    )
    charts = Charts()
    figures = []
    for title, field in (("maj@k", "majority"), ("pass@k", "passed"), ("avg@k", "avg")):
        series = []
        for name in names:
            mine = sorted((point for point in points if point.sampler == name), key=lambda point: point.tokens)
            series.append((name, [round(point.tokens) for point in mine], [getattr(point, field) for point in mine]))
        figures.append(charts.place(title, lines(series, "tokens a prompt"), about="over tokens a prompt"))
    head = ("sampler", "k", "tokens a prompt", "avg@k", "pass@k", "maj@k", "length", "truncated", "lost", "s")
    rows = [
        [
            escape(point.sampler) + (" (best)" if best.get(point.sampler) == point else ""),
            *(str(point.k), f"{point.tokens:.1f}", f"{point.avg:.3f}", f"{point.passed:.3f}", f"{point.majority:.3f}"),
            *(f"{point.response_len:.1f}", f"{point.truncated:.3f}", str(point.lost), f"{point.seconds:.1f}"),
        ]
        for point in points
    ]
    limit = "" if plan.compute_budget is None else f", at most {plan.compute_budget:g} tokens a prompt"
    note = f'<p class="note">{escape(checkpoint)}, temperature {plan.temperature}{limit}</p>'
    body = f'<h1>Accuracy against compute</h1>{note}<p>{keys}</p><div class="charts">{"".join(figures)}</div>'
    return document("treepo_mega eval", body + "<h2>Measurements</h2>" + table(head, rows), charts)


def main(cfg: Config, plan: Plan) -> None:
    """Evaluate, write, and end the process."""
    run_and_leave(lambda: _evaluate_and_write(cfg, plan))


def _evaluate_and_write(cfg: Config, plan: Plan) -> int:
    points = run(cfg, plan)
    if dist.is_main():
        for path in write(points, plan, cfg.model.hf_checkpoint):
            print(f"wrote {path}")
    return 0
