"""Which tokens end a step of reasoning."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from treepo_mega.engine.engine import EngineError
from treepo_mega.rollout.borders import border_tokens


class Words:
    """A tokenizer with one string an id; id 0 is special."""

    all_special_ids = (0,)
    texts = ("\n", "a", "b\n", ". ", "3.", "!", "\u3002", "Step", " Step 2", "e.g", "\n\n")

    def __len__(self) -> int:
        return len(self.texts)

    def batch_decode(self, ids: list[list[int]], **_: object) -> list[str]:
        return [self.texts[i] for (i,) in ids]


@pytest.mark.parametrize(
    "kind, ids",
    [
        ("newline", {2, 10}),
        ("sentence", {2, 3, 4, 5, 6, 10}),
        (["Step"], {7, 8}),
        (["Step 2", "a"], {1, 8}),
    ],
)
def test_tokens_by_what_their_text_holds(kind, ids):
    assert border_tokens(Words(), 11, kind) == ids


def test_ids_that_the_model_does_not_have_are_left_out():
    assert border_tokens(Words(), 5, "newline") == {2}


def test_what_no_token_holds_is_an_error(tiny_llama):
    with pytest.raises(EngineError, match=r"no token of this tokenizer holds 'Stepp'"):
        border_tokens(Words(), 11, ["a", "Stepp"])
    with pytest.raises(EngineError, match=r"segment\.end 'newline': no token of this tokenizer"):
        border_tokens(AutoTokenizer.from_pretrained(tiny_llama), 56, "newline")
