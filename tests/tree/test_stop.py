"""Stop rules against hand-made texts and against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rollouts import rollout_config
from treepo_mega.text.boxes import closed_box
from treepo_mega.tree.stop import STOP_REASONS, StopRules, repeats

SYMBOLS = ["<eos>", "\\boxed{", "}", "{", "a", "b", "4", "2", "<eot>", "\\"]
EOS, BOX, CLOSE, OPEN, A, B, FOUR, TWO, EOT, SLASH = range(len(SYMBOLS))


def decode(tokens: list[int]) -> str:
    return "".join(SYMBOLS[t] for t in tokens if t not in (EOS, EOT))


def rules(**changes: object) -> StopRules:
    values = {"eos_token_ids": frozenset({EOS, EOT}), "decode": decode, "max_response_len": 100, "max_depth": 10}
    return StopRules(**{**values, **changes})  # type: ignore[arg-type]


def test_a_path_goes_on_when_nothing_ends_it():
    verdict = rules().judge([A], [A, B], 1)
    assert (verdict.keep, verdict.reason) == (2, None)


@pytest.mark.parametrize("eos", [EOS, EOT])
@pytest.mark.parametrize("position", [0, 1, 3])
def test_every_eos_id_is_seen_at_every_position_and_ends_the_segment(eos, position):
    segment = [A, B, A, B]
    segment[position] = eos
    verdict = rules().judge([A, B], segment, 2)
    assert (verdict.keep, verdict.reason) == (position + 1, "eos")


def test_tokens_behind_the_closing_brace_are_dropped():
    verdict = rules().judge([], [A, BOX, FOUR, CLOSE, B, B], 1)
    assert (verdict.keep, verdict.reason) == (4, "answer")


def test_an_eos_right_behind_the_box_is_kept_but_a_later_one_is_not():
    assert rules().judge([], [BOX, FOUR, CLOSE, EOS], 1) == rules().judge([BOX, FOUR], [A, A, CLOSE, EOS], 2)
    assert rules().judge([], [BOX, FOUR, CLOSE, EOS], 1).reason == "eos"
    late = rules().judge([], [BOX, FOUR, CLOSE, B, EOS], 1)
    assert (late.keep, late.reason) == (3, "answer")


@given(st.integers(1, 5))
def test_a_box_across_a_segment_border_is_seen(border):
    text = [A, BOX, FOUR, TWO, CLOSE, B]
    assert rules().judge([], text[:border], 1).reason == ("answer" if border >= 5 else None)
    if border < 5:
        verdict = rules().judge(text[:border], text[border:], 2)
        assert (verdict.keep, verdict.reason) == (5 - border, "answer")


@pytest.mark.parametrize(
    "text, end",
    [
        ("x \\boxed{4} y", 11),
        ("\\boxed{\\frac{1}{2}} and", 19),
        ("\\boxed{\\{1,2\\}}", 15),
        ("\\boxed{4", None),
        ("\\boxed{\\frac{1}{2}", None),
        ("put it in \\boxed{} please", None),
        ("\\boxed{ } then \\boxed{7}", 24),
        ("} } { \\boxed{4} ", 15),
        ("boxed{4}", None),
        ("\\fbox{4}", 8),
        ("\\boxed{" * 3, None),
        ("", None),
        ("\\", None),
    ],
)
def test_closed_box(text, end):
    assert closed_box(text) == end


def test_answer_box_can_be_off():
    assert rules(answer_box=False).judge([], [BOX, FOUR, CLOSE, B], 1).reason is None


def test_length_truncates_and_comes_before_depth():
    verdict = rules(max_response_len=5, max_depth=2).judge([A, B, A], [B, A, B], 2)
    assert (verdict.keep, verdict.reason) == (2, "length")
    assert rules(max_depth=2).judge([A, B, A], [B, A, B], 2).reason == "depth"


def test_an_answer_at_the_last_allowed_token_is_an_answer():
    assert rules(max_response_len=3, max_depth=1).judge([], [BOX, FOUR, CLOSE], 1).reason == "answer"


def test_repetition_threshold_is_the_published_one():
    assert repeats("a" * 39, 32, 8)
    assert not repeats("a" * 38, 32, 8)
    assert not repeats("a" * 500, 0, 8)


def test_repetition_looks_back_over_the_border_but_not_over_the_whole_response():
    r = rules(repetition_window=4, repetition_count=3)
    loop = [A, B, A, FOUR]
    assert r.judge([], loop, 1).reason is None
    assert r.judge(loop * 2, loop, 3).reason == "repetition"
    far = [A, B, FOUR, TWO] + [BOX, A, OPEN, TWO, B, FOUR, TWO, TWO, B, B, A, FOUR] * 2 + [A, B, FOUR, TWO]
    assert r.judge(far, [A, B, FOUR, TWO], 3).reason is None


@given(st.text("ab", max_size=40), st.integers(1, 5), st.integers(2, 5))
def test_repeats_agrees_with_counting(text, window, count):
    pieces = [text[i : i + window] for i in range(len(text) - window + 1)]
    assert repeats(text, window, count) == any(pieces.count(p) >= count for p in pieces)


@given(st.lists(st.integers(0, len(SYMBOLS) - 1), min_size=1, max_size=30), st.integers(1, 30))
def test_no_token_behind_the_end_is_kept(tokens, border):
    """Against brute force: feed a response in two segments; what is kept ends at the first token that ends it."""

    def ends_at() -> int | None:
        for k in range(1, len(tokens) + 1):
            if tokens[k - 1] in (EOS, EOT) or closed_box(decode(tokens[:k])) is not None:
                return k
        return None

    r = rules(repetition_window=0)
    before, rest = tokens[:border], tokens[border:]
    first = r.judge([], before, 1)
    if first.reason is None and rest:
        second = r.judge(before, rest, 2)
        keep, reason, end_of_segment = len(before) + second.keep, second.reason, len(tokens)
    else:
        keep, reason, end_of_segment = first.keep, first.reason, len(before)
    end = ends_at()
    if end is None or end > end_of_segment:
        assert reason is None and keep == end_of_segment
        return
    assert reason in STOP_REASONS
    with_eos = end < end_of_segment and tokens[end] in (EOS, EOT) and tokens[end - 1] not in (EOS, EOT)
    assert keep == end + with_eos
    assert reason == ("eos" if with_eos or tokens[end - 1] in (EOS, EOT) else "answer")


def test_from_config_needs_an_eos_and_reads_the_section():
    cfg = rollout_config(max_response_len=64, segment__length=16)
    with pytest.raises(ValueError, match="EOS"):
        StopRules.from_config(cfg, [], decode)
    made = StopRules.from_config(cfg, [EOS], decode)
    assert (made.max_response_len, made.max_depth, made.repetition_window) == (64, 4, 32)
    with pytest.raises(ValueError, match="at least one token"):
        made.judge([], [], 1)
