"""Rewards of several functions, and the example answer that each function of people's own grades at the start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from treepo_mega.config import RewardConfig
from treepo_mega.data.prompts import Prompt
from treepo_mega.data.rewards import RewardItem, RewardPool, RewardResult, VerifierError
from treepo_mega.data.rewards.trial import try_rewards
from treepo_mega.data.rewards.weighted import check_functions, check_truths, combine, expand, used_functions

ROOT = Path(__file__).resolve().parents[2]
OWN = """
import json
def style(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": len(solution_str) / 10, "acc": 0.0, "words": float(len(solution_str.split()))}
def strict(data_source, solution_str, ground_truth, extra_info=None):
    return float(json.loads(solution_str) == ground_truth)
def silent(data_source, solution_str, ground_truth, extra_info=None):
    {"score": 1.0}
def points(data_source, solution_str, ground_truth, extra_info=None):
    return {"points": 1.0}
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("own") / "mine.py"
    file.write_text(OWN)
    return file


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(RewardConfig(startup_timeout_s=60)) as pool:
        yield pool


def prompt(verifier: str, answer: str = "4") -> Prompt:
    return Prompt(f"rows:{answer}", "2+2=", [1], answer, verifier, "test")


def functions(*parts: dict[str, object]) -> RewardConfig:
    return RewardConfig.model_validate({"functions": list(parts)})


def test_scores_are_weighed_and_every_part_keeps_its_name(pool: RewardPool, own: Path):
    parts = functions(
        {"verifier": None}, {"verifier": f"{own}:style", "weight": 0.5}, {"verifier": "exact", "weight": 0}
    )
    assert check_functions(parts.functions) == []
    items = [RewardItem("boxed", "x", text, "4") for text in ("\\boxed{4} ok", "no", "4")]
    got = combine(pool.score(expand(items, parts.functions)), parts.functions)
    # 1 + len / 20; the verdict is the first function's, whatever `acc` another one has.
    assert [each.score for each in got] == pytest.approx([1.0 + 12 / 20, 2 / 20, 1 / 20])
    assert got[0].extra == {"acc": 1.0, "answer": 1.0, "style": 1.2, "style.acc": 0.0, "style.words": 2.0, "exact": 0.0}
    assert [each.extra["acc"] for each in got] == [1.0, 0.0, 0.0] and got[2].extra["exact"] == 1.0
    assert combine(pool.score(expand(items, [])), []) == [RewardResult(1.0), RewardResult(0.0), RewardResult(0.0)]


def test_evaluation_asks_whether_answers_are_right_and_no_more():
    parts = functions({"verifier": "boxed", "weight": 3.0}, {"verifier": "exact", "weight": -1.0}).functions
    assert used_functions(parts, "train") == parts and used_functions([], "eval") == []
    (first,) = used_functions(parts, "eval")
    assert (first.verifier, first.weight) == ("boxed", 1.0)


def test_an_answer_that_one_function_lost_is_lost():
    parts = functions({"verifier": "boxed"}, {"verifier": "my.py:style"}).functions
    lost, whole = combine([RewardResult(1.0), RewardResult(None, "hung"), RewardResult(1.0), RewardResult(2.0)], parts)
    assert (lost.score, lost.error) == (None, "style: hung") and whole.score == 3.0


def test_what_cannot_be_added_up_is_named(own: Path):
    parts = functions(
        {"verifier": "boxd", "weight": 0}, {"verifier": "boxed", "weight": 0}, {"verifier": "boxed", "weight": 0},
        {"verifier": f"{own}:style", "name": "mean", "weight": 0},
    ).functions  # fmt: skip
    assert [said.partition(": ")[0] for said in check_functions(parts)] == [
        "reward.functions.0", "reward.functions.2", "reward.functions.3", "reward.functions",
    ]  # fmt: skip
    unknown, twice, taken, nothing = check_functions(parts)
    assert "did you mean 'boxed'?" in unknown and "'boxed' is the name of reward.functions.1 too" in twice
    assert "reward/mean is a metric of the trainer" in taken and "every weight is 0" in nothing
    with pytest.raises(
        VerifierError, match=r"functions.1: verifier 'last_number' cannot grade prompt 'rows:x': last_num"
    ):
        check_truths(
            functions({"verifier": None}, {"verifier": "last_number"}).functions,
            [prompt("exact", "4"), prompt("exact", "x")],
        )


def test_the_start_calls_each_own_function_once(pool: RewardPool, own: Path):
    example = f"{ROOT}/examples/plugins/reward.py:form"
    assert try_rewards(pool, functions({}, {"verifier": example}), [prompt(f"{own}:style"), prompt("boxed")]) == []
    assert pool.take_tally()["total"] == 0, "examples do not count as rewards of a step"
    (said,) = try_rewards(pool, functions(), [prompt(f"{own}:strict")])
    assert "on the example answer '\\\\boxed{4}' to prompt 'rows:4': JSONDecodeError" in said and "are lost" in said
    for function, returned in (
        ("silent", "returned NoneType; expected"),
        ("points", "a dict without 'score' (keys: po"),
    ):
        with pytest.raises(VerifierError) as error:
            try_rewards(pool, functions({"verifier": f"{own}:{function}"}), [prompt("boxed")])
        assert returned in str(error.value) and "to prompt 'rows:4'" in str(error.value)
    assert try_rewards(pool, functions(), [prompt("boxed")]) == [], "ours are not tried"
