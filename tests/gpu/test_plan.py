"""The plan for a GPU holds every test with the mark `gpu` exactly once, and names only tests that exist."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from tools.gpu import plan

ROOT = Path(__file__).resolve().parents[2]


def test_every_marked_test_has_a_row():
    assert plan.without_row() == [], "add a row to tools/gpu/plan.py, then run python tools/gpu/check.py --render"


def test_rows_of_marked_tests_are_marked_tests_and_none_runs_twice():
    rows = [check for check in plan.CHECKS if check.marked]
    assert {check.node for check in rows} <= set(plan.marked_tests())
    for node, times in Counter(check.node for check in rows).items():
        keywords = {check.keyword for check in rows if check.node == node}
        if times == 1:
            assert keywords == {""}, node
        else:
            (part,) = [word for word in keywords if not word.startswith("not ")]
            assert times == 2 and keywords == {part, f"not {part}"}, node


def test_a_keyword_of_the_plan_is_a_part_of_some_parameters_id():
    """Else one of two halves would be empty: overrides2 is the third value of a parameter named overrides."""
    for check in plan.CHECKS:
        if not check.keyword or check.keyword.startswith("not "):
            continue
        path, name = check.node.split("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        (function,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
        ids = set()
        for decorator in function.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.parametrize":
                label, values = decorator.args
                for place, value in enumerate(getattr(values, "elts", [])):
                    ids.add(str(value.value) if isinstance(value, ast.Constant) else f"{label.value}{place}")
        assert any(check.keyword in text for text in ids), (check.name, ids)
        assert not all(check.keyword in text for text in ids)


def test_rows_of_the_cpus_tests_exist_and_have_no_mark_of_their_own():
    for check in plan.CHECKS:
        if not check.marked:
            path, _, name = check.node.partition("::")
            source = (ROOT / path).read_text(encoding="utf-8")
            assert not name or re.search(rf"^def {name}\(", source, re.M), check.node
            assert check.node not in plan.marked_tests()


def test_each_check_has_a_stage_a_time_and_a_name_of_its_own():
    names = [check.name for check in plan.CHECKS]
    assert len(set(names)) == len(names)
    stages = [stage.name for stage in plan.STAGES]
    assert {check.stage for check in plan.CHECKS} == set(stages)
    order = [stages.index(check.stage) for check in plan.CHECKS]
    assert order == sorted(order)
    assert all(0 < check.minutes <= 10 for check in plan.CHECKS)


SOURCE = """
import pytest
from pytest import mark

@pytest.mark.gpu
@pytest.mark.parametrize("x", [1])
def test_decorated(x): ...

@mark.gpu
def test_short(): ...

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_parameter(device): ...

def test_plain(): assert "pytest.mark.gpu"

class TestMarked:
    pytestmark = pytest.mark.gpu
    def test_inside(self): ...

class TestPlain:
    def test_inside(self): ...
"""


def test_marks_are_found_where_pytest_finds_them():
    wanted = ["test_decorated", "test_short", "test_one_parameter", "TestMarked::test_inside"]
    assert plan.marked_in(SOURCE, "t.py") == [f"t.py::{name}" for name in wanted]
    whole = SOURCE + "\npytestmark = [pytest.mark.slow, pytest.mark.gpu]\n"
    assert len(plan.marked_in(whole, "t.py")) == 6


def test_a_marked_test_without_a_row_is_seen(tmp_path):
    (tmp_path / "tests" / "new").mkdir(parents=True)
    (tmp_path / "tests" / "new" / "test_new.py").write_text(SOURCE)
    known = plan.Check("torch", "tests/new/test_new.py::test_short", 1, "x")
    assert "tests/new/test_new.py::test_short" not in plan.without_row(tmp_path, [known])
    assert "tests/new/test_new.py::test_decorated" in plan.without_row(tmp_path, [known])


@pytest.mark.parametrize(
    "check, present, gpus, reason",
    [
        (plan.Check("torch", "n", 1, "x"), plan.BASE, 1, ""),
        (plan.Check("torch", "n", 1, "x"), plan.BASE[1:], 1, "not installed: torch"),
        (plan.Check("torch", "n", 1, "x", needs=(plan.TE,)), plan.BASE, 1, "not installed: transformer_engine"),
        (plan.Check("vllm", "n", 1, "x"), plan.TRAINER, 1, "not installed: vllm"),
        (plan.Check("gpus", "n", 1, "x"), plan.ENGINE, 1, "needs 2 GPUs, and 1 is here"),
        (plan.Check("gpus", "n", 1, "x", gpus=4), plan.ENGINE, 2, "needs 4 GPUs, and 2 are here"),
        (plan.Check("gpus", "n", 1, "x", gpus=4), plan.ENGINE, 4, ""),
    ],
)
def test_what_a_check_misses(check, present, gpus, reason):
    assert plan.missing(check, present, gpus) == reason
