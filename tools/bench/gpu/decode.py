"""Decoded tokens a second of trees and of independent samples, as shares of what reading the weights allows.

    python tools/bench/gpu/decode.py [--quick] [--check]

`tools/bench/rollout.py` on this device: the same scripted lengths, a larger model of random weights, bf16, CUDA
graphs for decoding. Both ways give the same leaves; the tree samples what siblings share once.

A decoding step reads all weights once, whatever its batch. The bound of a way is its steps times the seconds of that
read, at the measured rate of a copy, which reads and writes. Keys and values come on top, so long batches stay below 1.

Last line, JSON: {"bench", "device", "check", "shares": {"<shape> <way>": bound seconds / seconds}, "wrong", "rows": [{
"shape", "way", "seconds", "steps", "sampled_tokens", "trajectory_tokens_per_s", "share"}], "ratios": [{"shape",
"time_vs_independent", "token_ratio", "forwarded_over_unique"}], "weight_bytes"}. A tree that forwards a token of
its forest twice is in "wrong".
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tools.bench import rollout
from tools.bench.gpu import card, sampler

FULL = (
    rollout.Case(7, 128, "trained", prompts=64),
    rollout.Case(14, 64, "trained", prompts=64),
    rollout.Case(7, 128, "long-tailed", steps=True, prompts=64),
)
QUICK = (rollout.Case(7, 64, "trained", prompts=16),)
CHECK = (rollout.Case(3, 32, "trained", leaves=4, prompts=2),)


def measure(
    bench: rollout.Bench, case: rollout.Case, read_seconds: float, repeats: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(a row for each way, the ratios); the fastest of the repeats, after one that does not count."""
    bench.take(case.prompts)
    script = rollout.Script(case.pattern, case.window, bench.prompts, case.steps)
    shape = {"segment.length": case.length, "max_response_len": case.window, "n_samples_per_prompt": case.leaves}
    settings = bench.cfg.rollout.replace({**shape, "segment.end": "newline" if case.steps else "length"})
    trees, _ = bench.grow(script, settings)
    runs = [(bench.grow(script, settings)[1], bench.independent(trees)) for _ in range(repeats)]
    tree = min((pair[0] for pair in runs), key=lambda counts: counts["wall"])
    alone = min((pair[1] for pair in runs), key=lambda counts: counts["wall"])
    rows = []
    for name, counts, sampled in (
        ("tree", tree, tree["unique_tokens"]),
        ("independent", alone, tree["flat_tokens"]),
    ):
        steps = int(counts["engine_steps"])
        row = {
            "shape": case.name,
            "way": name,
            "seconds": counts["wall"],
            "steps": steps,
            "sampled_tokens": int(sampled),
        }
        row["trajectory_tokens_per_s"] = tree["flat_tokens"] / counts["wall"]
        row["share"] = steps * read_seconds / counts["wall"]
        rows.append(row)
    unique = tree["unique_tokens"] + rollout.PROMPT * len(trees)
    return rows, {
        "shape": case.name,
        "time_vs_independent": tree["wall"] / alone["wall"],
        "token_ratio": tree["token_ratio"],
        "forwarded_over_unique": tree["forwarded_tokens"] / unique,
    }


def main(given: list[str] | None = None) -> int:
    """Measure and print; the exit status."""
    size = card.arguments(__doc__, given)
    rates = card.copy_rates(size)
    bench, weight_bytes = sampler.bench(size)
    # A copy reads a byte and writes one; a step only reads.
    read_seconds = weight_bytes / (2 * rates.within)
    repeats = size.choose(3, 1, 1)
    found = [measure(bench, case, read_seconds, repeats) for case in size.choose(FULL, QUICK, CHECK)]
    rows = [row for part, _ in found for row in part]
    ratios = [ratio for _, ratio in found]
    print(f"{card.card_name()}: {weight_bytes / 1e9:.3g} GB of weights, read in {1e3 * read_seconds:.3g} ms")
    columns = {"shape": "s", "way": "s", "seconds": ".3f", "steps": "d", "sampled_tokens": ",d"}
    print(card.table(rows, columns | {"trajectory_tokens_per_s": ",.0f", "share": ".3f"}))
    print(card.table(ratios, {"shape": "s", "time_vs_independent": ".3f", "token_ratio": ".3f"}))
    wrong = [
        f"{ratio['shape']}: {ratio['forwarded_over_unique']:.3f} tokens forwarded for each token of the forest"
        for ratio in ratios
        if not ratio["forwarded_over_unique"] <= 1.02
    ]
    shares = {f"{row['shape']} {row['way']}": row["share"] for row in rows}
    return card.finish("decode", size, shares, wrong, rows=rows, ratios=ratios, weight_bytes=weight_bytes)


if __name__ == "__main__":
    card.leave(main())
