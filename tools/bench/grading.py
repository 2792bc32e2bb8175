r"""How often our grading, plain math-verify and verl's math_dapo give the wanted verdict, and what a grading costs.

    python tools/bench/grading.py [--quick]

The rows are tests/data/grading_table.jsonl, those of verifier math. `math_verify`: parse of the truth in a box against
parse of the response, as its README has it. `verl`: the public behaviour of math_dapo, retold here for comparison: what
follows the last `Answer:` in the last 300 characters, both sides normalised as text. Responses in the table mostly box
their answers, which math_dapo does not look for; `verl_given_answer` hands it our candidate behind `Answer:`.
A truth that cannot be graded (want null) counts as agreed when a grader does not reward.

The last line is JSON. seconds_per_1000: wall time of 1000 gradings through one worker process, batches included.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

TABLE = ROOT / "tests" / "data" / "grading_table.jsonl"
UNIT_WORDS = "dollars|cents|degrees|units|points|hours|minutes|seconds|inches|feet|ft|cm|km|mph|meters|square|percent"


def dapo_text(answer: str) -> str:
    """An answer as math_dapo compares it: right of the last `=`, without dollars, spaces, units and text commands."""
    text = answer.split("=")[-1].replace("\\$", "").replace("\\%", "").replace("%", "")
    text = re.sub(rf"\\text\{{\s*(?:{UNIT_WORDS})\s*\}}|\b(?:{UNIT_WORDS})\b", "", text)
    text = re.sub(r"\\(?:text|textbf|boxed|mbox|overline)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(frac|sqrt)([0-9])([0-9]?)(?!\d)", lambda m: m[1] + "".join(f"{{{d}}}" for d in m[2] + m[3]), text)
    text = text.replace("$", "").replace("^\\circ", "").replace(" ", "").rstrip(".")
    digits = text.replace(",", "")
    return digits if digits.isdigit() else text


def dapo(truth: str, response: str) -> bool:
    """Whether math_dapo would reward."""
    found = re.findall(r"(?i)answer\s{0,9}:\s{0,9}([^\n]+)", response[-300:])
    return bool(found) and dapo_text(found[-1]) == dapo_text(truth)


def main() -> None:
    """Print the disagreements by grader, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="time 500 gradings instead of 5000")
    args = parser.parse_args()
    from math_verify import parse, verify

    from treepo_mega.config import RewardConfig
    from treepo_mega.data.rewards import RewardItem, RewardPool
    from treepo_mega.data.rewards.answers import find_answer

    table = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in table if row["verifier"] == "math"]
    items = [RewardItem("math", "bench", row["response"], row["truth"]) for row in rows]
    with RewardPool(RewardConfig(num_workers=1)) as pool:
        ours = [result.score == 1.0 for result in pool.score(items)]
        many = (items * (-(-5000 // len(items))))[: 500 if args.quick else 5000]
        started = time.monotonic()
        pool.score(many)
        seconds = (time.monotonic() - started) * 1000 / len(many)
    counts = dict.fromkeys(("wanted", "math_verify", "verl", "verl_given_answer"), 0)
    print(f"{'truth':28} {'response':44} want ours m-v dapo  why")
    for row, mine in zip(rows, ours, strict=True):
        want = bool(row["want"])
        plain = verify(parse(f"\\boxed{{{row['truth']}}}"), parse(row["response"]))
        strict = dapo(row["truth"], row["response"])
        given = dapo(row["truth"], f"Answer: {find_answer(row['response']).text}")
        for name, verdict in zip(counts, (mine, plain, strict, given), strict=True):
            counts[name] += verdict == want
        if not mine == plain == given == want:
            shown = (row["truth"][:28], row["response"].replace("\n", " ")[:44])
            print(f"{shown[0]:28} {shown[1]:44} {want:4d} {mine:4d} {plain:3d} {given:4d}  {row['reason']}")
    out = {"rows": len(rows)} | {f"agree_{name}": count for name, count in counts.items()}
    print(json.dumps(out | {"seconds_per_1000": round(seconds, 3)}))
    if counts["wanted"] != len(rows):
        sys.exit("grading disagrees with the table")


if __name__ == "__main__":
    main()
