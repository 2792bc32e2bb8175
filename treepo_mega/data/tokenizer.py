"""The tokenizer of a model directory, with an error that says what is missing, and what to say about its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from treepo_mega.config import DataConfig
from treepo_mega.data.chat import read_template
from treepo_mega.errors import TreepoError
from treepo_mega.text.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Files of which a model directory has at least one if it has a tokenizer at all."""


class TokenizerError(TreepoError):
    """The model directory holds no tokenizer that can be used."""


def require_tokenizer_files(hf_dir: str | Path) -> None:
    """Raises TokenizerError when none of `TOKENIZER_FILES` is there."""
    directory = Path(hf_dir)
    if any((directory / name).is_file() for name in TOKENIZER_FILES) or any(directory.glob("*.tiktoken")):
        return
    raise TokenizerError(
        f"{directory}: no tokenizer in this directory (expected one of {', '.join(TOKENIZER_FILES)}); copy tokenizer* "
        "and special_tokens_map.json from the model that it was made from"
    )


def load_tokenizer(hf_dir: str | Path, data: DataConfig) -> Tokenizer:
    """transformers' tokenizer of `hf_dir`, with the chat template of the configuration if it names one.

    Raises TokenizerError for missing or broken files, PromptError for a template that cannot be read.
    """
    require_tokenizer_files(hf_dir)
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    except Exception as error:
        raise TokenizerError(f"{hf_dir}: the tokenizer cannot be loaded: {type(error).__name__}: {error}") from None
    if data.chat_template is not None:
        tokenizer.chat_template = read_template(data.chat_template)
    # transformers annotates decode() as a text or a list of texts, whatever it is given.
    return cast(Tokenizer, tokenizer)


def describe_size(tokens: int, vocab_size: int) -> str | None:
    """What to say about a tokenizer of `tokens` tokens for a model of `vocab_size` ids; None when they fit."""
    if tokens <= vocab_size:
        return None
    return (
        f"the tokenizer has {tokens} tokens, the model only {vocab_size} (config.json: vocab_size): a prompt that "
        f"needs token {vocab_size} or above is refused"
    )
