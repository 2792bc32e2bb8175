"""What sampling costs beside the model: this project's engine against transformers.generate, and where a step goes.

    python tools/bench/engine_cost.py [--quick] [--repeats 3] [--batches 16 64 256]

The demo's model, one process with one thread. Requests of one length each sample 40 tokens: from the engine with
logprobs, as a rollout does, and from `transformers.generate` with a cache and without logprobs, as TRL does. The two
take turns, and the least CPU seconds over the repeats count. A step's parts are measured by clocks around vLLM's own
calls in a run of their own, because the clocks cost time too:

    schedule    vLLM's scheduler decides what runs, and finds prefixes and blocks to copy
    model       inputs are laid out, the forward pass, and the sampler
    outputs     what was sampled goes into requests, logprobs and results
    admission   requests are checked and queued
    vllm rest   whatever else its step does
    ours        this project's engine around vLLM

Last line, JSON: {"cases": [{"requests", "engine_ms_per_step", "transformers_ms_per_step", "ratio" (engine /
transformers), "parts": {name: share of its CPU seconds}}], "engine": {"step_ms", "request_ms"},
"transformers": {"step_ms", "request_ms"}}: the line through the cases, milliseconds a step and for each request in it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from treepo_mega.config import load_config
from treepo_mega.engine.engine import Engine
from treepo_mega.engine.stream import SegmentRequest
from treepo_mega.monitor.progress import quieten_libraries

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "examples/tiny_cpu.yaml"
PROMPT = 19
TOKENS = 40
PARTS = ("schedule", "model", "outputs", "admission", "vllm rest", "ours")


class Clocks:
    """CPU seconds inside of wrapped calls, those of wrapped calls within them left out."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def wrap(self, owner: Any, method: str, part: str) -> None:
        """Count the calls of `owner.method` as `part`, from now on."""
        call = getattr(owner, method)

        @functools.wraps(call)
        def counted(*args: Any, **named: Any) -> Any:
            begun = time.process_time()
            self._inner.append(0.0)
            try:
                return call(*args, **named)
            finally:
                took = time.process_time() - begun
                own = took - self._inner.pop()
                self._inner[-1] += took
                self.seconds[part] = self.seconds.get(part, 0.0) + own

        setattr(owner, method, counted)


def prompts_of(count: int, vocabulary: int) -> list[list[int]]:
    """So many prompts of PROMPT tokens; eight requests share one, as siblings do."""
    draws = random.Random(7)
    distinct = [[draws.randrange(vocabulary) for _ in range(PROMPT)] for _ in range(-(-count // 8))]
    return [distinct[index // 8] for index in range(count)]


def sample_by_engine(engine: Engine, prompts: list[list[int]]) -> float:
    """CPU seconds of sampling TOKENS tokens for each of `prompts`."""
    engine.reset_prefix_cache()
    begun = time.process_time()
    for index, prompt in enumerate(prompts):
        engine.submit(SegmentRequest(name=str(index), prefix=prompt, max_tokens=TOKENS, seed=index))
    sampled = 0
    while engine.busy:
        sampled += sum(len(finished.tokens) for finished in engine.step())
    seconds = time.process_time() - begun
    if sampled != len(prompts) * TOKENS:
        raise RuntimeError(f"the engine sampled {sampled} tokens of {len(prompts)} x {TOKENS}")
    return seconds


@torch.inference_mode()
def sample_by_transformers(model: Any, prompts: list[list[int]]) -> float:
    """The same by transformers.generate."""
    begun = time.process_time()
    out = model.generate(
        torch.tensor(prompts), attention_mask=torch.ones(len(prompts), PROMPT, dtype=torch.long), do_sample=True,
        max_new_tokens=TOKENS, min_new_tokens=TOKENS, top_k=0,
    )  # fmt: skip
    seconds = time.process_time() - begun
    if out.shape != (len(prompts), PROMPT + TOKENS):
        raise RuntimeError(f"transformers returned {tuple(out.shape)}")
    return seconds


def clocks_around(engine: Engine) -> Clocks:
    """Clocks for each of PARTS. They stay: nothing else may be timed afterwards."""
    llm = engine._llm.llm_engine
    core = llm.engine_core.engine_core
    clocks = Clocks()
    clocks.wrap(core.scheduler, "schedule", "schedule")
    clocks.wrap(core.model_executor, "execute_model", "model")
    clocks.wrap(core.model_executor, "sample_tokens", "model")
    clocks.wrap(core.scheduler, "update_from_output", "outputs")
    clocks.wrap(llm.output_processor, "process_outputs", "outputs")
    clocks.wrap(llm, "add_request", "admission")
    clocks.wrap(llm, "step", "vllm rest")
    return clocks


def parts_of(engine: Engine, clocks: Clocks, prompts: list[list[int]]) -> dict[str, float]:
    """Share of each of PARTS in the engine's CPU seconds."""
    sample_by_engine(engine, prompts)
    clocks.seconds.clear()
    total = sample_by_engine(engine, prompts)
    clocks.seconds["ours"] = total - sum(clocks.seconds.values())
    return {part: clocks.seconds[part] / total for part in PARTS}


def line(points: list[tuple[int, float]]) -> dict[str, float]:
    """Milliseconds a step and for each request in it, of (requests, ms a step); least squares of relative errors."""
    count = np.array([requests for requests, _ in points], float)
    took = np.array([ms for _, ms in points])
    rows = np.stack([np.ones_like(count), count], axis=1) / took[:, None]
    step, request = np.linalg.lstsq(rows, np.ones_like(took), rcond=None)[0]
    return {"step_ms": round(float(step), 3), "request_ms": round(float(request), 4)}


def least(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The least seconds of each of `ways`, which take turns; a first turn of each warms up."""
    for way in ways.values():
        way()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            taken[name].append(way())
    return {name: min(seconds) for name, seconds in taken.items()}


def main() -> int:
    """Prints the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two batches, once each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256])
    args = parser.parse_args()
    batches, repeats = ([16, 64], 1) if args.quick else (args.batches, args.repeats)
    quieten_libraries()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        cfg = load_config(RECIPE, [f"logging.run_dir={scratch}"])
        model = AutoModelForCausalLM.from_pretrained(cfg.model.hf_checkpoint, dtype=torch.float32).eval()
        engine = Engine(cfg.model.hf_checkpoint, cfg)
        cases: list[dict[str, Any]] = []
        for count in batches:
            prompts = prompts_of(count, engine.vocab_size)
            found = least(
                {
                    "engine": functools.partial(sample_by_engine, engine, prompts),
                    "transformers": functools.partial(sample_by_transformers, model, prompts),
                },
                repeats,
            )
            ms = {name: 1e3 * seconds / TOKENS for name, seconds in found.items()}
            cases.append(
                {
                    "requests": count,
                    "engine_ms_per_step": round(ms["engine"], 3),
                    "transformers_ms_per_step": round(ms["transformers"], 3),
                    "ratio": round(ms["engine"] / ms["transformers"], 3),
                }
            )
            print(f"{count:>5} requests{ms['engine']:>9.2f} ms a step, transformers{ms['transformers']:>9.2f}"
                  f"{ms['engine'] / ms['transformers']:>8.2f}", flush=True)  # fmt: skip
        clocks = clocks_around(engine)
        for case in cases:
            case["parts"] = parts_of(engine, clocks, prompts_of(case["requests"], engine.vocab_size))
            shares = ", ".join(f"{part} {100 * share:.0f} %" for part, share in case["parts"].items())
            print(f"{case['requests']:>5} requests: {shares}", flush=True)
    lines = {
        name: line([(case["requests"], case[f"{name}_ms_per_step"]) for case in cases])
        for name in ("engine", "transformers")
    }
    print(json.dumps({"cases": cases, **lines}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
