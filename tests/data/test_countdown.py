"""The search task: its exact chance, its traces, its split, and that its rule holds for any text."""

from __future__ import annotations

import random
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_mega.data.tasks import countdown as task

PROBLEM = task.Countdown((3, 8, 5, 2), 29)


def test_the_example_of_the_manual() -> None:
    assert PROBLEM.prompt == "3,8,5,2>29:"
    assert task.parse_truth(PROBLEM.answer) == (PROBLEM.numbers, PROBLEM.target)
    assert task.solves("8-3=5*5=25+2=27;3*8=24+5=29", PROBLEM.numbers, PROBLEM.target)


def test_the_chance_is_the_share_of_uniform_attempts_that_meet_the_target() -> None:
    rng = random.Random(0)
    tries = 20_000
    met = sum(task.solves(task.search_trace(PROBLEM, rng, attempts=1), (3, 8, 5, 2), 29) for _ in range(tries))
    wanted = task.chance(PROBLEM)
    assert wanted > 0
    assert met / tries == pytest.approx(wanted, abs=4 * (wanted / tries) ** 0.5)


def test_a_problem_without_a_solution_has_no_chance() -> None:
    assert task.chance(task.Countdown((2, 3), 49)) == 0.0


def test_traces_are_right_arithmetic_and_end_when_they_meet_the_target() -> None:
    rng = random.Random(1)
    for problem in islice(task.draw_split(rng, held_out=False), 100):
        text = task.search_trace(problem, rng, lookahead=0.5)
        symbols = task.tokenize(text)
        attempts = text.split(";")
        assert len(symbols) + 1 <= task.RESPONSE_TOKENS
        assert len(task.tokenize(problem.prompt)) == task.PROMPT_TOKENS
        assert len(attempts) <= task.ATTEMPTS
        for attempt in attempts:
            # Each attempt is right for the total that it ends at, whatever the problem asks.
            assert task.solves(attempt, problem.numbers, int(task.tokenize(attempt)[-1]))
        assert not any(task.solves(attempt, problem.numbers, problem.target) for attempt in attempts[:-1])
        if len(attempts) < task.ATTEMPTS:
            assert task.solves(text, problem.numbers, problem.target)


def test_lookahead_takes_what_is_in_reach() -> None:
    near = task.Countdown((2, 3), 5)
    assert task.search_trace(near, random.Random(0), lookahead=1.0, attempts=1) in {"2+3=5", "3+2=5"}


def test_the_split_goes_by_numbers_and_target_in_any_order() -> None:
    sides = [task.problems(held_out=held_out) for held_out in (False, True)]
    assert not {(each.numbers, each.target) for each in sides[0]} & {(each.numbers, each.target) for each in sides[1]}
    assert 0.15 < len(sides[1]) / sum(map(len, sides)) < 0.25
    for each in sides[1]:
        assert task.is_held_out(task.Countdown(each.numbers[::-1], each.target))
        assert task.CHANCE[0] <= task.chance(each) <= task.CHANCE[1]


def test_a_pass_over_a_side_has_each_problem_once() -> None:
    count = len(task.problems(held_out=True))
    drawn = list(islice(task.draw_split(random.Random(2), held_out=True), 2 * count))
    first = [(tuple(sorted(each.numbers)), each.target) for each in drawn[:count]]
    assert len(set(first)) == count
    assert any(before.numbers != tuple(sorted(before.numbers)) for before, _ in pairwise(drawn))


@given(st.text(alphabet="0123456789+-*=; \n", max_size=80))
def test_any_text_has_a_verdict(text: str) -> None:
    assert task.solves(text, (3, 8, 5, 2), 29) in (True, False)


def test_an_endless_number_is_wrong_and_not_read() -> None:
    assert not task.solves("3+" + "8" * 200_000 + "=29", (3, 8), 29)
    assert not task.solves("3" * 200_000, (3, 8), 29)


def test_a_text_that_is_none_of_the_task_is_named() -> None:
    with pytest.raises(ValueError, match=r"'\?' is not a symbol of the countdown task"):
        task.tokenize("3+8=11?")
    with pytest.raises(ValueError, match="none of"):
        task.apply(3, "/", 1)
