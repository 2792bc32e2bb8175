"""Does the scheduler of CUDA change the training? The demo's recipe on the CPU under each engine profile.

    python tools/bench/profiles.py [--quick] [--steps 3]

One rank trains the demo's model under the CPU's own engine, under `async` (async scheduling, the hand-over of CUDA) and
under `cuda` (model runner V2 as well, in Triton's interpreter; `engine/cuda_profile.py`). Forests are compared token by
token with the CPU's own, and each evaluation too: greedy answers depend on no noise.

Under `async` the forests must be equal. Runner V2 draws its noise from a counter (seed, position, token) instead of a
generator per request, so sampled tokens differ from the first one on, while greedy ones must not. `first` names the
first difference: step, tree, node, token, and the logprob that each engine gave to its own token.

--quick: one step of fewer trees. The default takes four minutes.

Last line, JSON: {"profiles": [{"name", "trees_equal", "first", "eval_max_diff", "greedy_max_diff",
"logprob_abs_diff_max", "canary_abs_diff_max", "seconds"}], "as_expected": bool}. eval_max_diff is over the sampled
figures of the evaluation before the first step, greedy_max_diff over the greedy ones; the two others are the run's own:
engine against actor. Exit status 1 when trees under `async` differ, or greedy answers or logprobs under either do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.runs import run

VARIABLE = "TREEPO_ENGINE_PROFILE"
PROFILES = ("", "async", "cuda")
LOGPROB_LIMIT = 1e-4


def recipe(steps: int, quick: bool) -> list[str]:
    """Small enough for the interpreter: some minutes a profile."""
    prompts, leaves = (2, 4) if quick else (4, 8)
    return [
        f"rollout.rollout_batch_size={prompts}",
        f"rollout.n_samples_per_prompt={leaves}",
        "rollout.dynamic_sampling=false",
        f"rollout.max_response_len={24 if quick else 48}",
        f"train.num_rollouts={steps}",
        "eval.at_start=true",
        "eval.n_samples_per_prompt=1",
        f"eval.max_prompts={4 if quick else 16}",
        "checkpoint.enabled=false",
        "logging.trees_interval=1",
    ]


def forests(run_dir: Path) -> list[list[dict[str, Any]]]:
    """Trees of every step, as they were written."""
    files = sorted((run_dir / "trees").glob("*.jsonl"))
    return [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in files]


def first_difference(ours: list[list[dict]], theirs: list[list[dict]]) -> dict[str, Any] | None:
    """Where the tokens of two runs differ first: step, tree, node, place, tokens and logprobs; None: nowhere."""
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        for tree, (left, right) in enumerate(zip(mine, other, strict=True)):
            for node, (one, two) in enumerate(zip(left["nodes"], right["nodes"], strict=False)):
                place = differing_place(one["tokens"], two["tokens"])
                if place is not None:
                    found = {"step": step, "tree": tree, "node": node, "place": place}
                    for name, side in (("ours", one), ("theirs", two)):
                        found[f"{name}_token"] = at(side["tokens"], place)
                        found[f"{name}_logprob"] = at(side.get("logprobs") or [], place)
                    return found
            if len(left["nodes"]) != len(right["nodes"]):
                return {"step": step, "tree": tree, "nodes": [len(left["nodes"]), len(right["nodes"])]}
    return None


def differing_place(ours: list[int], theirs: list[int]) -> int | None:
    """The first place at which two lists of tokens differ, also when one only ends there."""
    places = [place for place, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]]
    return places[0] if places else None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def at(values: list[Any], place: int) -> Any:
    """The value, or None behind the end."""
    return values[place] if place < len(values) else None


def largest(rows: list[dict[str, Any]], name: str) -> float:
    """Of a metric over the steps that have it."""
    return max(row[name] for row in rows if name in row)


def eval_difference(ours: dict[str, Any], theirs: dict[str, Any], greedy: bool) -> float:
    """Over the figures of an evaluation, of which the greedy ones have `greedy` in their names; times left out."""
    names = [name for name in ours if name.startswith("eval/") and ("greedy" in name) == greedy and name in theirs]
    names = [name for name in names if "seconds" not in name and "_s" not in name[-2:]]
    if not names:
        raise RuntimeError(f"the evaluation has no {'greedy' if greedy else 'sampled'} figure")
    return max(abs(ours[name] - theirs[name]) for name in names)


def train(base: Path, profile: str, steps: int, quick: bool) -> tuple[list[dict[str, Any]], list[list[dict]], float]:
    """Metrics, forests and seconds of one run."""
    os.environ[VARIABLE] = profile
    # Megatron looks for Triton before the engine is built, and a kernel is interpreted from its definition on.
    os.environ["TRITON_INTERPRET"] = str(int(profile == "cuda"))
    begin = time.monotonic()
    name = profile or "cpu"
    print(f"{name} ...", file=sys.stderr, flush=True)
    rows = run(1, base / name, recipe(steps, quick), name)
    return rows, forests(base / name), time.monotonic() - begin


def main() -> int:
    """Run and compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one step of fewer trees")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    steps = 1 if args.quick else args.steps
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        reference, trees, seconds = train(Path(scratch), PROFILES[0], steps, args.quick)
        print(f"the CPU's own engine took {seconds:.0f} s", file=sys.stderr, flush=True)
        for name in PROFILES[1:]:
            rows, theirs, seconds = train(Path(scratch), name, steps, args.quick)
            first = first_difference(trees, theirs)
            found.append(
                {
                    "name": name,
                    "trees_equal": first is None,
                    "first": first,
                    "eval_max_diff": eval_difference(reference[0], rows[0], greedy=False),
                    "greedy_max_diff": eval_difference(reference[0], rows[0], greedy=True),
                    "logprob_abs_diff_max": largest(rows, "rollout/logprob_abs_diff_max"),
                    "canary_abs_diff_max": largest(rows, "reshard/canary_abs_diff"),
                    "seconds": round(seconds, 1),
                }
            )
    for row in found:
        said = "equal" if row["trees_equal"] else f"differ first at {row['first']}"
        print(f"{row['name']:<6} trees {said}; greedy figures differ by {row['greedy_max_diff']:g}")
    good = found[0]["trees_equal"] and all(
        row["greedy_max_diff"] == 0 and row["logprob_abs_diff_max"] <= LOGPROB_LIMIT for row in found
    )
    print(json.dumps({"profiles": found, "as_expected": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
