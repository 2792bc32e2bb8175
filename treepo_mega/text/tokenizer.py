"""What the project needs of a tokenizer: any of transformers' has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class PromptTokenizer(Protocol):
    """What turns prompts into ids; the dry run has one that imports no torch."""

    @property
    def eos_token_id(self) -> int | None:
        """Id of the mark that ends a text; None: the tokenizer names none."""

    @property
    def eos_token(self) -> str | None:
        """That mark as text."""

    def __len__(self) -> int:
        """Number of ids, added tokens included."""

    def __call__(self, texts: list[str], /, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Encode several texts; `input_ids` holds a list of ids each."""

    def decode(self, token_ids: list[int], /) -> str:
        """Text of one sequence."""

    def apply_chat_template(self, messages: list[dict[str, str]], /, *, tokenize: bool, **names: Any) -> str:
        """The messages as the chat template writes them, when `tokenize` is false; `names` are its variables."""


class Tokenizer(PromptTokenizer, Protocol):
    """The part of `transformers.PreTrainedTokenizerBase` that prompts, rollouts and evaluation use."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of tokens such as EOS and padding."""

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Text of one sequence."""

    def batch_decode(self, sequences: Sequence[list[int]], *, clean_up_tokenization_spaces: bool = False) -> list[str]:
        """Texts of several sequences."""
