"""Reports between ranks: what JSON would make of them, in a third of its bytes, or an error."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_mega.runtime import packed
from treepo_mega.runtime.packed import LEAST, PackedError, pack, unpack
from treepo_mega.tree.node import Tree

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text("$aü", max_size=3)
NUMBERS = (
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=LEAST, max_size=40)
    | st.lists(st.integers(-(2**64), 2**64), min_size=LEAST, max_size=20)
    | st.lists(st.floats(), min_size=LEAST, max_size=20)
    | st.lists(st.floats(width=32), min_size=LEAST, max_size=40)
    | st.lists(st.integers() | st.booleans() | st.floats(), min_size=LEAST, max_size=20)
)
VALUES = st.recursive(
    SCALARS | NUMBERS | NUMBERS.map(tuple),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("$a", max_size=3) | st.integers(), inner),
    max_leaves=8,
)


@given(VALUES)
def test_values_come_back_as_json_gives_them(value):
    """Texts are compared: NaN equals nothing, and -0.0, 1 and true equal 0.0, 1.0 and 1."""
    expected = json.loads(json.dumps(value))
    assert json.dumps(unpack(pack(value))) == json.dumps(expected)


@given(NUMBERS, st.data())
def test_a_changed_byte_is_an_error(numbers, data):
    whole = bytearray(pack({"numbers": numbers}))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(PackedError):
        unpack(bytes(whole))


@pytest.mark.parametrize("kept", [0, 7, packed.HEADER.size, -1])
def test_bytes_that_are_missing_are_an_error(kept):
    with pytest.raises(PackedError):
        unpack(pack([1.5] * 50)[:kept])


def test_what_another_version_sent_is_named():
    with pytest.raises(PackedError, match=r"begins with b'{\"ro', expected b'TPK1': ranks run different versions"):
        unpack(b'{"rows": [1, 2, 3]}')


@pytest.mark.parametrize(
    "numbers, width",
    [
        ([7] * 100, 4),
        ([-(2**31), 2**31 - 1] * 50, 4),
        ([2**31] * 100, 8),
        ([-0.125, -0.0, math.inf, math.nan] * 25, 4),
        ([0.1] * 100, 8),
        ([1e300] * 100, 8),
    ],
)
def test_numbers_take_the_fewest_bytes_that_hold_them_exactly(numbers, width):
    data = pack(numbers)
    assert len(data) - packed.HEADER.size - len('{"$": ["i4", 0, 100]}') == 100 * width
    assert np.array(unpack(data)).tobytes() == np.array(numbers).tobytes()


def test_values_that_are_no_json_are_refused_as_json_does():
    for value in ({1, 2}, [np.int64(3)] * LEAST, b"bytes"):
        with pytest.raises(TypeError, match="not JSON serializable"):
            pack(value)


def forest(segment: int) -> tuple[list[dict], int]:
    """Rows of 4 trees of 40 segments of that many tokens, and how many tokens they hold."""
    draw = np.random.default_rng(0)
    trees = [Tree.start(f"prompt {number}", draw.integers(0, 151_000, segment).tolist()) for number in range(4)]
    for tree in trees:
        for number in range(40):
            node = tree.add_child(number // 3)
            node.tokens = draw.integers(0, 151_000, segment).tolist()
            node.logprobs = (-draw.exponential(size=segment)).astype(np.float32).tolist()
    return [tree.to_dict() for tree in trees], 4 * 41 * segment


def test_a_forest_costs_nine_bytes_a_token_and_its_text_does_not_grow_with_them(monkeypatch):
    """Each number costs the same few instructions: none is written or read as text."""
    texts: list[int] = []
    dumps = json.dumps
    monkeypatch.setattr(packed.json, "dumps", lambda value: texts.append(len(dumps(value))) or dumps(value))
    for segment in (256, 1024):
        rows, tokens = forest(segment)
        data = pack(rows)
        assert [Tree.from_dict(row) for row in unpack(data)] == [Tree.from_dict(row) for row in rows]
        assert len(data) < 9 * tokens < 27 * tokens < len(dumps(rows))
        assert len(data) - texts[-1] == packed.HEADER.size + 4 * tokens + 4 * tokens * 40 // 41
    small, large = texts
    # Only the numbers of entries and the places of the arrays have more digits.
    assert large < small * 1.1


@pytest.mark.parametrize("kind", packed.KINDS)
def test_arrays_come_back_as_arrays(kind):
    arrays = {
        "one": np.arange(5).astype(kind),
        "table": np.arange(6).reshape(3, 2).astype(kind),
        "none": np.zeros(0, kind),
    }
    got = unpack(pack({"$held": arrays, "beside": [1.5] * 20}))
    for name, array in arrays.items():
        assert (got["$held"][name].dtype, got["$held"][name].shape) == (array.dtype, array.shape)
        assert got["$held"][name].tolist() == array.tolist()
    assert got["beside"] == [1.5] * 20
    with pytest.raises(TypeError, match="an array of complex128 is not among i1, i2"):
        pack(np.zeros(2, np.complex128))
