"""The prompt cursor: every prompt once an epoch, ids once a run, and resumption at any point."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_mega.data.cursor import PromptCursor
from treepo_mega.data.prompts import Prompt
from treepo_mega.data.rows import PromptError


def make(n: int, answer: str = "x") -> list[Prompt]:
    return [Prompt(f"a:{i}", str(i), [i], answer, "exact", "a") for i in range(n)]


@given(st.integers(1, 12), st.lists(st.integers(0, 9), max_size=8), st.booleans(), st.integers(0, 2**40))
def test_every_prompt_comes_once_an_epoch_and_no_id_twice(n: int, takes: list[int], shuffle: bool, seed: int) -> None:
    cursor = PromptCursor(make(n), seed=seed, shuffle=shuffle)
    got = [p for k in takes for p in cursor.take(k)]
    assert len(got) == sum(takes)
    assert len({p.id for p in got}) == len(got)
    for start in range(0, len(got) - n + 1, n):
        assert sorted(p.tokens[0] for p in got[start : start + n]) == list(range(n))
        assert {p.id.partition("@")[2] for p in got[start : start + n]} == {str(start // n) if start else ""}


@given(st.integers(1, 9), st.integers(0, 30), st.integers(1, 30), st.booleans())
def test_a_resumed_cursor_goes_on_as_if_nothing_happened(n: int, before: int, after: int, shuffle: bool) -> None:
    first = PromptCursor(make(n), seed=3, shuffle=shuffle)
    first.take(before)
    state = json.loads(json.dumps(first.state_dict()))
    assert set(state) == {"epoch", "index", "fingerprint"}
    second = PromptCursor(make(n), seed=3, shuffle=shuffle)
    second.load_state_dict(state)
    assert second.take(after) == first.take(after)


def test_how_the_batches_are_cut_does_not_matter() -> None:
    one, many = (PromptCursor(make(7), seed=1, shuffle=True) for _ in range(2))
    assert one.take(24) == [p for k in (1, 5, 10, 8) for p in many.take(k)]


def test_orders_differ_by_epoch_and_seed_and_are_plain_without_shuffling() -> None:
    tokens = [p.tokens[0] for p in PromptCursor(make(20), seed=1, shuffle=True).take(40)]
    assert tokens[:20] != tokens[20:]
    assert tokens[:20] != [p.tokens[0] for p in PromptCursor(make(20), seed=2, shuffle=True).take(20)]
    assert [p.tokens[0] for p in PromptCursor(make(3), seed=1, shuffle=False).take(6)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "other, message",
    [
        (PromptCursor(make(4), seed=1, shuffle=True), r"it had 5 prompts, seed 1, .*now 4 prompts, seed 1"),
        (PromptCursor(make(5, "y"), seed=1, shuffle=True), r"the prompts changed since the checkpoint"),
        (PromptCursor(make(5), seed=2, shuffle=True), r"it had 5 prompts, seed 1, .*now 5 prompts, seed 2"),
        (PromptCursor(make(5), seed=1, shuffle=False), r"now 5 prompts, unshuffled"),
    ],
    ids=["fewer", "answers", "seed", "order"],
)
def test_a_changed_data_set_is_noticed(other: PromptCursor, message: str) -> None:
    state = PromptCursor(make(5), seed=1, shuffle=True).state_dict()
    with pytest.raises(PromptError, match=message):
        other.load_state_dict(state)


def test_the_fingerprint_is_that_of_earlier_versions() -> None:
    """Checkpoints hold it: the hash of one JSON list a prompt, however often the prompts share their tokens."""
    prompts = [
        Prompt(f"a:{i}", "x", tokens, 'say "\u00e9"', "exact", "a") for i, tokens in enumerate([[3, 4], [5]] * 2)
    ]
    shared = [replace(p, tokens=prompts[i % 2].tokens) for i, p in enumerate(prompts)]
    h = hashlib.blake2b(digest_size=8)
    for p in prompts:
        h.update(json.dumps([p.id, p.tokens, p.answer, p.verifier]).encode())
    for made in (prompts, shared):
        assert PromptCursor(made, seed=3, shuffle=True).fingerprint == f"4:seed 3:{h.hexdigest()}"


def test_no_prompts() -> None:
    with pytest.raises(PromptError, match="no prompts"):
        PromptCursor([], seed=1, shuffle=True)
