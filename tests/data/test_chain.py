"""The chain task: its arithmetic, its text format, its mistakes and its split."""

import random
import re
from collections import Counter
from itertools import islice

import pytest

from treepo_mega.data.tasks.chain import (
    BOX,
    HIGHEST,
    LABELS,
    LOWEST,
    MAX_TERMS,
    SYMBOLS,
    Chain,
    Slips,
    draw_chain,
    draw_split,
    is_held_out,
    solution_tokens,
    tokenize,
    worked_solution,
)


def test_the_example_of_the_manual():
    chain = Chain(63, (-9, -7, 8), 0)
    assert chain.prompt == "a63b-9c-7d+8="
    assert chain.totals == [54, 47, 55]
    assert chain.answer == "55"
    assert worked_solution(chain) == "a63;b-9=54;c-7=47;d+8=55;" + BOX + "55}"


@pytest.mark.parametrize("n_terms", [1, 3, 5, 7, MAX_TERMS])
def test_totals_stay_in_range_and_lengths_are_fixed(n_terms):
    rng = random.Random(n_terms)
    for _ in range(200):
        chain = draw_chain(rng, n_terms)
        assert all(LOWEST <= t <= HIGHEST for t in [chain.start, *chain.totals])
        assert len(tokenize(chain.prompt)) == 3 * n_terms + 4
        text = worked_solution(chain, rng, Slips(slip=0.3, forget_carry=0.6))
        assert len(tokenize(text)) + 1 == solution_tokens(n_terms)


def test_labels_are_consecutive_and_wrap_around():
    chain = Chain(20, (1,) * MAX_TERMS, len(LABELS) - 2)
    assert [chain.label(i) for i in range(4)] == ["k", "l", "a", "b"]
    assert len({chain.label(i) for i in range(MAX_TERMS + 1)}) == MAX_TERMS + 1


def test_a_clean_solution_is_right_step_by_step():
    rng = random.Random(1)
    for _ in range(100):
        chain = draw_chain(rng, 6)
        steps = re.findall(r"[a-l]([+-]\d)=(\d\d);", worked_solution(chain))
        assert [int(t) for t, _ in steps] == list(chain.terms)
        assert [int(r) for _, r in steps] == chain.totals
        assert worked_solution(chain).endswith(f"{BOX}{chain.answer}}}")


def test_the_misconception_forgets_only_the_carry_of_eight_and_nine():
    always = Slips(forget_carry=1.0)
    rng = random.Random(0)
    assert always.apply(63, 8, rng) == 61
    assert always.apply(99, 9, rng) == 98
    assert always.apply(61, 8, rng) == 69, "no ten is crossed"
    assert always.apply(67, 7, rng) == 74, "seven is carried rightly"
    assert always.apply(63, -8, rng) == 55


def test_mistakes_have_the_stated_rates():
    rng = random.Random(3)
    slips = Slips(slip=0.1, forget_carry=0.6)
    carried = Counter(slips.apply(55, 9, rng) for _ in range(4000))
    assert carried[54] / 4000 == pytest.approx(0.6 + 0.4 * 0.1 / 6, abs=0.03)
    plain = Counter(slips.apply(55, 4, rng) for _ in range(4000))
    assert plain[59] / 4000 == pytest.approx(0.9, abs=0.02)
    assert set(plain) == {59, 49, 57, 58, 60, 61, 69}


def test_a_wrong_total_is_carried_on_and_written_modulo_a_hundred():
    text = worked_solution(Chain(93, (9 - 3, 9), 0), random.Random(0), Slips(forget_carry=1.0))
    assert text == "a93;b+6=99;c+9=98;" + BOX + "98}"
    assert Slips().apply(99, 3, random.Random(0)) == 2


def test_the_split_is_disjoint_about_a_tenth_and_repeatable():
    train = [c.prompt for c in islice(draw_split(random.Random(0), (3, 4), held_out=False), 500)]
    held = [c.prompt for c in islice(draw_split(random.Random(0), (3, 4), held_out=True), 200)]
    assert len(set(train)) == 500
    assert len(set(held)) == 200
    assert not set(train) & set(held)
    assert all(is_held_out(p) for p in held)
    share = sum(is_held_out(draw_chain(random.Random(s), 4).prompt) for s in range(3000)) / 3000
    assert share == pytest.approx(0.1, abs=0.03)
    assert train == [c.prompt for c in islice(draw_split(random.Random(0), (3, 4), held_out=False), 500)]


def test_symbols_are_distinct_and_tokenize_is_exact():
    assert len(SYMBOLS) == len(set(SYMBOLS)) == 32
    text = f"<bos>a63b-9=a63;{BOX}54}}<eos>"
    assert "".join(tokenize(text)) == text
    with pytest.raises(ValueError, match="'x' at character 3"):
        tokenize("a63x")


@pytest.mark.parametrize("terms", [(), (1,) * (MAX_TERMS + 1), (0,), (10,)])
def test_impossible_chains_are_refused(terms):
    with pytest.raises(ValueError, match=r"chain has|terms are"):
        Chain(50, terms, 0)
