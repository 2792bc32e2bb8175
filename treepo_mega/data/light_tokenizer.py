"""A tokenizer read from `tokenizer.json` alone, to try prompts without importing transformers, which takes seconds.

    tokenizer = read_light_tokenizer(hf_dir)      # None when the directory has no tokenizer.json

It renders chat templates and tokenizes as transformers' fast tokenizers do (tests/cases/test_template_cases.py holds
them against each other), and has what data/prompts.py asks of a tokenizer. Settings that transformers applies on top of
`tokenizer.json` for some old models, such as `add_bos_token`, are not known here: training uses transformers' own.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from treepo_mega.data.tokenizer import TokenizerError

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2): printable ones for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _byte_level_alphabet()


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks the assistant's words in some templates: only its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def template_environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it: sandboxed, blocks without their line ends, raise_exception, strftime_now."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    # Jinja's own filter escapes <, > and & for HTML, and transformers replaces it as well.
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class LightTokenizer:
    """Text to ids and chats to text. `special`: texts of bos_token, eos_token and their kin."""

    def __init__(self, inner: Any, special: dict[str, str], chat_template: str | None) -> None:
        self._inner = inner
        self._special = special
        self.chat_template = chat_template
        self._environment = template_environment()
        self._compiled: dict[str, Any] = {}
        self.bos_token_id = self._id("bos_token")
        self.eos_token_id = self._id("eos_token")
        self.unk_token_id = self._id("unk_token")
        self.eos_token = special.get("eos_token")

    def _id(self, name: str) -> int | None:
        return self._inner.token_to_id(self._special[name]) if name in self._special else None

    def __len__(self) -> int:
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        """`{"input_ids": ids of each text}`."""
        return {"input_ids": [e.ids for e in self._inner.encode_batch(texts, add_special_tokens=add_special_tokens)]}

    def decode(self, ids: list[int]) -> str:
        """Text of one sequence, special tokens included."""
        return str(self._inner.decode(ids, skip_special_tokens=False))

    def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """UTF-8 bytes of each token as it stands within a text; joined they are the text of a sequence.

        Decoders of the SentencePiece kind drop the space before a text's first token; here it stays. An id that the
        tokenizer does not know is `<id?>`.
        """
        decoder = self._inner.decoder
        # Its serialised form: the library tells its kind and its parts nowhere else.
        rules = decoder.__getstate__().decode() if decoder is not None else ""
        added = {token.content for token in self._inner.get_added_tokens_decoder().values()}
        return [self._bytes_of(one, '"ByteLevel"' in rules, '"ByteFallback"' in rules, added) for one in ids]

    def _bytes_of(self, one: int, byte_level: bool, byte_fallback: bool, added: set[str]) -> bytes:
        piece = self._inner.id_to_token(one)
        if piece is None:
            return f"<{one}?>".encode()
        if piece in added:
            return str(piece).encode()
        if byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        if byte_level and all(character in BYTE_OF for character in piece):
            return bytes(BYTE_OF[character] for character in piece)
        # The second of two: at the beginning of a text some decoders drop a space.
        return str(self._inner.decode([one, one], skip_special_tokens=False))[len(self.decode([one])) :].encode()

    def apply_chat_template(
        self, messages: list[dict[str, str]], /, chat_template: str | None = None, tokenize: bool = False, **names: Any
    ) -> str:
        """The text of a chat; `names` are variables of the template."""
        source = chat_template or self.chat_template or ""
        if source not in self._compiled:
            self._compiled[source] = self._environment.from_string(source)
        # transformers passes None: templates ask `tools is not none`, which is true of an undefined variable.
        options = {"tools": None, "documents": None, **self._special, **names}
        return str(self._compiled[source].render(messages=messages, **options))


def read_light_tokenizer(hf_dir: str | Path) -> LightTokenizer | None:
    """The tokenizer of `hf_dir`, or None without a tokenizer.json. Raises TokenizerError for files that are broken."""
    directory = Path(hf_dir)
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        inner = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{path}: the tokenizer cannot be loaded: {error}") from None
    # tokenizer.json may hold settings of truncation and padding, which transformers resets too.
    inner.no_truncation()
    inner.no_padding()
    settings = {**_read_json(directory / "special_tokens_map.json"), **_read_json(directory / "tokenizer_config.json")}
    special = {}
    for name in SPECIAL:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            special[name] = text
    return LightTokenizer(inner, special, _template(directory, settings))


def _template(directory: Path, settings: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template") or _read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from None
    return value if isinstance(value, dict) else {}
