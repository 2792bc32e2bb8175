"""What sampling needs of a tokenizer: any of transformers' has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """The part of `transformers.PreTrainedTokenizerBase` that rollouts use."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of tokens such as EOS and padding."""

    def __len__(self) -> int:
        """Number of ids, added tokens included."""

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Text of one sequence."""

    def batch_decode(self, sequences: Sequence[list[int]], *, clean_up_tokenization_spaces: bool = False) -> list[str]:
        """Texts of several sequences."""
