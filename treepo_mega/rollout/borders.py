"""Which tokens end a step of reasoning: `rollout.segment.end` as a set of token ids.

    border_tokens(tokenizer, vocab_size, "newline")      # tokens whose text holds a newline
    border_tokens(tokenizer, vocab_size, "sentence")     # ... or ends with . ! ? or their full-width forms
    border_tokens(tokenizer, vocab_size, ["Step", ";"])  # tokens whose text holds one of these

Tokens, not text: the engine looks at one sampled id a step, and a token that is only the first half of a character
has no text of its own. So a string that a tokenizer always splits over two tokens is never seen.
"""

from __future__ import annotations

from treepo_mega.engine.stream import EngineError
from treepo_mega.text.tokenizer import Tokenizer

SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")


def border_tokens(tokenizer: Tokenizer, vocab_size: int, segment_end: str | list[str]) -> frozenset[int]:
    """Ids below `vocab_size` of the tokens that end a segment; special tokens never do.

    Raises EngineError when there are none, or when one of the strings is in no token.
    """
    # A model's vocabulary may be padded beyond the tokenizer's, or be smaller than it.
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(min(vocab_size, len(tokenizer))) if i not in special]
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    if isinstance(segment_end, list):
        for string in segment_end:
            if not any(string in text for text in texts):
                raise EngineError(
                    f"rollout.segment.end: no token of this tokenizer holds {string!r}: it can end nothing"
                )
        found = {i for i, text in zip(ids, texts, strict=True) if any(string in text for string in segment_end)}
    else:
        found = {i for i, text in zip(ids, texts, strict=True) if _ends(text, segment_end)}
    if not found:
        raise EngineError(f"rollout.segment.end {segment_end!r}: no token of this tokenizer ends such a step")
    return frozenset(found)


def _ends(text: str, kind: str) -> bool:
    if "\n" in text:
        return True
    # The point of 3.14 ends a "sentence" as well. A border is only a place where a path may branch: one too many costs
    # a little and breaks nothing.
    return kind == "sentence" and text.rstrip().endswith(SENTENCE_ENDS)
