"""The environments that come with the project: their tools, called directly."""

from __future__ import annotations

import ast
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st

from treepo_mega.environment.builtin.calculator import Calculator, evaluate
from treepo_mega.environment.builtin.game import Game
from treepo_mega.environment.builtin.guess import Guess
from treepo_mega.environment.builtin.python import Python
from treepo_mega.environment.builtin.search import Search, make_corpus


@given(
    st.recursive(
        st.integers(0, 99).map(str),
        lambda part: st.tuples(part, st.sampled_from("+-*"), part).map("(%s%s%s)".__mod__),
        max_leaves=12,
    )
)
def test_calculator_agrees_with_python(text: str) -> None:
    assert evaluate(ast.parse(text, mode="eval").body) == Fraction(eval(text))


@pytest.mark.parametrize(
    "text", ["9**9**9", "().__class__", "x", "1 << 3", "'a' * 9", "1e999999999", "2 ** 0.5", "True"]
)
def test_calculator_refuses_what_is_no_arithmetic(text: str) -> None:
    with pytest.raises((ValueError, SyntaxError, OverflowError)):
        Calculator().calculate(text)


def test_calculator_is_exact() -> None:
    assert Calculator().calculate(" 0.1 + 0.2 ") == "3/10"
    assert Calculator().calculate("-7 // 2") == "-4"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print(6 * 7)", "42\n"),
        ("raise ValueError('no')", "[exit status 1]"),
        ("import os; os.write(1, b'\\xff')", "\ufffd"),
        ("x = bytearray(1 << 33)", "MemoryError"),
        ("print('x' * 100_000)", "bytes left out"),
        ("open('/tmp/treepo-was-here', 'w')", "Permission denied"),
        ("import os; os.kill(os.getppid(), 9)", "Operation not permitted"),
    ],
)
def test_python_runs_programs_in_a_fence(code: str, said: str) -> None:
    world = Python()
    try:
        assert said in world.run(code)
    finally:
        world.close()


def test_python_keeps_files_and_forks_them() -> None:
    world = Python()
    world.run("open('note', 'w').write('one')")
    other = world.fork()
    other.run("open('note', 'a').write(' two')")
    try:
        assert world.run("print(open('note').read())") == "one\n"
        assert other.run("print(open('note').read())") == "one two\n"
    finally:
        world.close()
        other.close()


def test_search_finds_and_reads(tmp_path: Path) -> None:
    world = Search()
    world.reset(documents=["the cat sat", {"title": "Dogs", "text": "a dog AND a cat"}])
    assert world.search("dog cat").startswith("[2] Dogs: ")
    assert world.search('NOT "sat') == "No document has all of these words."
    assert world.fork().read(1) == "document 1\nthe cat sat"
    with pytest.raises(ValueError, match="no document 9"):
        world.read(9)
    make_corpus(tmp_path / "corpus.db", [("Owls", "owls fly at night")])
    world.reset(corpus=str(tmp_path / "corpus.db"))
    assert "Owls" in world.search("night")


def test_guess_discounts_later_tries() -> None:
    world = Guess()
    world.reset(answer="12")
    assert world.get_reward() == 0.0
    assert world.answer("11") == "Not right. Tries left: 3."
    assert world.answer(" 12 ") == "Right."
    assert world.answer("13") == "It was right already."
    assert world.get_reward() == pytest.approx(0.9)


def gym(name: str, **params: Any) -> dict[str, Any]:
    """A row as a source of reasoning-gym gives it to reset: through JSON."""
    item = reasoning_gym.create_dataset(name, size=3, seed=5, **params)[2]
    named = {"name": name, "params": params, "seed": 5, "size": 3, "index": 2}
    row = {"prompt": item["question"], "answer": item["answer"], "extra_info": {"reasoning_gym": named, "entry": item}}
    return json.loads(json.dumps(row, default=str))


def test_guess_grades_games_by_their_own_rules() -> None:
    item = reasoning_gym.create_dataset("chain_sum", size=1, seed=1)[0]
    row = gym("countdown")
    for wanted, right in ((item, item["answer"]), (row, f"({row['answer']})")):
        world = Guess()
        world.reset(**wanted)
        assert "Tries left" in world.answer("1")
        other = world.fork()
        assert world.answer(right) == "Right.", "another form of the answer is as good"
        assert world.get_reward() == pytest.approx(0.9) and other.get_reward() < 0.1
    row["extra_info"]["entry"]["question"] = "another"
    with pytest.raises(ValueError, match="another question now"):
        Guess().reset(**row)


@pytest.mark.parametrize(
    ("name", "params", "apart", "wrong", "why"),
    [
        (
            "sokoban",
            {"max_w": 7, "max_h": 7, "min_boxes": 3, "max_boxes": 5},
            "",
            "X",
            "is no step; expected L, U, R or D",
        ),
        ("tower_of_hanoi", {"max_disks": 3}, "\n", "Move disk 3 from Peg 1 to Peg 2", "is not on top of peg"),
    ],
)
def test_games_are_played_move_by_move(name: str, params: dict[str, Any], apart: str, wrong: str, why: str) -> None:
    row = gym(name, **params)
    world = Game()
    assert "move" in world.reset(**row)
    assert why in world.move(wrong) and world.get_reward() == 0.0
    moves = row["answer"].split(apart) if apart else list(row["answer"])
    boards = [world.move(move) for move in moves[:-1]]
    assert len(set(boards)) > 1 and not any(board.startswith(("Solved", "Not")) for board in boards)
    before = world.fork()
    assert world.move(moves[-1]).startswith("Solved.")
    assert world.get_reward() == 1.0
    assert before.get_reward() < 1.0, "the branch has a board of its own"
    assert before.move(moves[-1]).startswith("Solved.")


def test_a_game_is_told_what_it_can_play() -> None:
    with pytest.raises(ValueError, match=r"sokoban or tower_of_hanoi, found chain_sum; data\.environment guess"):
        Game().reset(**gym("chain_sum"))
