"""Prompts: read, checked, templated and tokenized once; then handed out in endless shuffled epochs.

    prompts = load_prompts(cfg.data.train, cfg.data, tokenizer)
    cursor = PromptCursor(prompts, seed=cfg.train.seed, shuffle=cfg.data.shuffle)
    batch = cursor.take(16)

A source is a `.jsonl` or `.parquet` file (`file@[a:b]` takes rows a to b, as a Python slice) or a
reasoning-gym task. A row has a prompt (a string, or a list of `{"role", "content"}` messages) and an answer;
the keys are configurable, dotted keys reach into nested values, and common names are tried too unless a key
was chosen. A row may also have a reference text (`data.reference_key`), for perplexity. `data_source` and
`extra_info` columns are passed on to the verifier, as in verl's data.

The verifier of a prompt is its source's own, else `reasoning_gym` for reasoning-gym sources, else
`data.verifier`. It is checked here, before anything is sampled.

Ids. A prompt is called `<file stem or task>:<row>`, with `#2` after the name for a second source of that name.
`PromptCursor` adds `@<epoch>` from the second pass on, so that no two trees of a run share an id, and with it
a seed, even where two epochs meet in one batch or the batch is larger than the data set.

What is refused: a malformed line, a missing prompt or answer (file, line, the keys that are there, the
nearest), a truth that its verifier cannot grade (data/truths.py). What is dropped, counted and logged: a
prompt longer than `data.max_prompt_len` tokens.

Traps. (1) The chat template writes the special tokens, so templated text is tokenized without adding them
again; plain text with. (2) Some tokenizers append EOS to plain text, which would end the response before it
began: it is taken off. (3) An answer in GSM8K's form, `reasoning\\n#### 42`, is cut to `42`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2 import TemplateError

from treepo_mega.config import DataConfig, PromptSource
from treepo_mega.data.gym import GymError, make_items
from treepo_mega.data.rewards.verifiers import VerifierError, check_verifier
from treepo_mega.data.rows import MISSING, PromptError, Row, describe_missing, lookup, read_rows
from treepo_mega.data.truths import check_truths, truth_text
from treepo_mega.runtime.seeding import derive_seed

logger = logging.getLogger(__name__)

PROMPT_KEYS = ("prompt", "messages", "question", "problem", "input")
ANSWER_KEYS = ("answer", "label", "ground_truth", "solution", "reward_model.ground_truth")
REFERENCE_KEYS = ("solution", "target", "completion")


@dataclass(slots=True, frozen=True)
class Prompt:
    """One problem. `text` is what was tokenized into `tokens`; `extra` is the verifier's `extra_info` (JSON-safe)."""

    id: str
    text: str
    tokens: list[int]
    answer: str
    verifier: str
    data_source: str
    extra: dict[str, Any] = field(default_factory=dict)
    reference: str = ""
    """A text that answers the prompt, such as a worked solution; empty when the row has none."""


@dataclass(slots=True)
class PromptSet:
    """The prompts that are used, and how many were dropped for which reason."""

    prompts: list[Prompt]
    dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)


def load_prompts(sources: Sequence[PromptSource], data: DataConfig, tokenizer: Any) -> PromptSet:
    """Read all `sources` in order.

    Raises PromptError (a ValueError) naming file, line and key for what cannot be used, and when no prompt is
    left.
    """
    prompts: list[Prompt] = []
    dropped: Counter[str] = Counter()
    names: Counter[str] = Counter()
    too_long = ""
    for source in sources:
        drafts = _read_source(source, data, tokenizer, names)
        for draft, tokens in zip(drafts, _tokenize(drafts, tokenizer), strict=True):
            if len(tokens) > data.max_prompt_len:
                dropped["too_long"] += 1
                too_long = too_long or f"; such as {draft.where}: {len(tokens)} tokens"
            else:
                prompts.append(replace(draft.prompt, tokens=tokens))
    total = len(prompts) + dropped.total()
    _report(prompts, dropped, total, data, tokenizer, too_long)
    if not prompts:
        raise PromptError(
            f"no prompt is left of {total}: dropped {dict(dropped)} (data.max_prompt_len "
            f"{data.max_prompt_len}{too_long})"
        )
    return PromptSet(prompts, dict(dropped))


def _report(
    prompts: list[Prompt], dropped: Counter[str], total: int, data: DataConfig, tokenizer: Any, too_long: str
) -> None:
    if dropped["too_long"]:
        limit = data.max_prompt_len
        text = "%d of %d prompts dropped: longer than data.max_prompt_len = %d tokens%s"
        logger.warning(text, dropped["too_long"], total, limit, too_long)
    unknown = getattr(tokenizer, "unk_token_id", None)
    blurred = [p.id for p in prompts if unknown is not None and unknown in p.tokens]
    if blurred:
        text = "%d of %d prompts hold text that the tokenizer cannot spell (unknown token), such as %s"
        logger.warning(text, len(blurred), total, blurred[0])


@dataclass(slots=True)
class _Draft:
    prompt: Prompt
    templated: bool
    where: str


def _read_source(source: PromptSource, data: DataConfig, tokenizer: Any, names: Counter[str]) -> list[_Draft]:
    if (source.path is None) == (source.reasoning_gym is None):
        raise PromptError("a prompt source needs exactly one of path and reasoning_gym")
    verifier = source.verifier or ("reasoning_gym" if source.reasoning_gym else data.verifier)
    try:
        check_verifier(verifier)
        name, rows = _gym_rows(source) if source.reasoning_gym else read_rows(str(source.path))
    except (VerifierError, GymError) as e:
        raise PromptError(f"prompt source {source.path or source.reasoning_gym}: {e}") from None
    names[name] += 1
    if names[name] > 1:
        name = f"{name}#{names[name]}"
    drafts = [_draft(row, f"{name}:{row.index}", name, verifier, data, tokenizer) for row in rows]
    check_truths([(d.where, d.prompt.answer) for d in drafts], verifier, str(source.path or source.reasoning_gym))
    return drafts


def _gym_rows(source: PromptSource) -> tuple[str, list[Row]]:
    name = str(source.reasoning_gym)
    items = make_items(name, source.params, seed=source.seed, size=source.size)
    rows = []
    for i, item in enumerate(items):
        ref = {"name": name, "params": source.params, "seed": source.seed, "size": source.size, "index": i}
        extra = {"reasoning_gym": ref, "entry": item}
        values = {"prompt": item["question"], "answer": item["answer"], "data_source": name, "extra_info": extra}
        rows.append(Row(f"reasoning_gym {name}, item {i}", i, values))
    return name, rows


def _draft(row: Row, prompt_id: str, source: str, verifier: str, data: DataConfig, tokenizer: Any) -> _Draft:
    prompt = _first(row, "prompt", data.input_key, PROMPT_KEYS)
    truth = _first(row, "answer", data.label_key, ANSWER_KEYS)
    answer = truth_text(truth, verifier, row.where)
    text, templated = _render(prompt, data, tokenizer, row.where)
    if isinstance(prompt, str) and not prompt.strip():
        raise PromptError(f"{row.where}: the prompt is empty: nothing but white space ({prompt[:20]!r})")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise PromptError(f"{row.where}: the prompt is not valid Unicode: {e}") from None
    extra = row.values.get("extra_info") or {}
    if not isinstance(extra, dict):
        raise PromptError(f"{row.where}: extra_info is {type(extra).__name__}, expected a mapping")
    try:
        json.dumps(extra)
    except (TypeError, ValueError) as e:
        raise PromptError(f"{row.where}: extra_info cannot be sent to a grader: {e}") from None
    data_source = str(row.values.get("data_source") or source)
    reference = _reference(row, data.reference_key, truth)
    return _Draft(Prompt(prompt_id, text, [], answer, verifier, data_source, extra, reference), templated, row.where)


def _first(row: Row, what: str, key: str, aliases: tuple[str, ...]) -> Any:
    """The value of `key`, or of the first alias that is there if `key` is the default. Empty counts as missing."""
    aliases = aliases if key == aliases[0] else ()  # a key that somebody chose is not guessed around
    for k in (key, *aliases):
        value = lookup(row.values, k)
        if value is not MISSING and value is not None and value != "" and value != []:
            return value
    raise PromptError(describe_missing(row, what, key, aliases))


def _reference(row: Row, key: str, truth: Any) -> str:
    """The row's reference text, or nothing. A value that is no text is refused only under a key that was chosen."""
    chosen = key != REFERENCE_KEYS[0]
    for k in (key,) if chosen else REFERENCE_KEYS:
        value = lookup(row.values, k)
        if isinstance(value, str) and value.strip():
            return value
        if chosen and value is not MISSING and value is not None and not isinstance(value, str):
            raise PromptError(f"{row.where}: {k} is {type(value).__name__}, expected a text (data.reference_key)")
    has_reasoning = isinstance(truth, str) and truth_text(truth, "", row.where) != truth
    return truth if has_reasoning and not chosen else ""


def _render(prompt: Any, data: DataConfig, tokenizer: Any, where: str) -> tuple[str, bool]:
    """(text, whether the chat template wrote it)."""
    if isinstance(prompt, str):
        text = prompt + data.prompt_suffix
        if not data.apply_chat_template:
            if data.system_prompt is not None:
                raise PromptError(
                    f"{where}: data.system_prompt needs data.apply_chat_template or prompts made of messages"
                )
            return text, False
        messages = [{"role": "user", "content": text}]
    else:
        messages = _messages(prompt, data.prompt_suffix, where)
    if data.system_prompt is not None:
        rest = messages[1:] if messages[0]["role"] == "system" else messages
        messages = [{"role": "system", "content": data.system_prompt}, *rest]
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            f"{where}: the tokenizer has no chat template, which a prompt made of messages needs. Give the model "
            "directory a chat_template.jinja, or leave data.apply_chat_template out and give prompts as text"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), True
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        hint = "; leave data.system_prompt out" if data.system_prompt is not None else ""
        raise PromptError(f"{where}: the chat template refuses messages of {roles}: {error}{hint}") from None


def _messages(prompt: Any, suffix: str, where: str) -> list[dict[str, str]]:
    good = isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    )
    if not good:
        raise PromptError(
            f"{where}: the prompt is neither a string nor a list of messages with string 'role' and 'content' "
            f"(got {str(prompt)[:80]!r})"
        )
    messages = [{"role": m["role"], "content": m["content"]} for m in prompt]
    if messages[-1]["role"] != "user":
        raise PromptError(f"{where}: the last message is from {messages[-1]['role']!r}; expected 'user'")
    messages[-1]["content"] += suffix
    return messages


def _tokenize(drafts: list[_Draft], tokenizer: Any) -> list[list[int]]:
    eos = getattr(tokenizer, "eos_token_id", None)
    out: list[list[int]] = [[] for _ in drafts]
    for templated in (False, True):
        which = [i for i, d in enumerate(drafts) if d.templated is templated]
        if not which:
            continue
        encoded = tokenizer([drafts[i].prompt.text for i in which], add_special_tokens=not templated)["input_ids"]
        for i, ids in zip(which, encoded, strict=True):
            tokens = list(ids)
            if not templated and len(tokens) > 1 and tokens[-1] == eos and not _ends_in_eos(drafts[i], tokenizer):
                tokens = tokens[:-1]
            if not tokens:
                raise PromptError(f"{drafts[i].where}: the prompt has no tokens")
            out[i] = tokens
    return out


def _ends_in_eos(draft: _Draft, tokenizer: Any) -> bool:
    return bool(tokenizer.eos_token) and draft.prompt.text.endswith(tokenizer.eos_token)


class PromptCursor:
    """Endless epochs over a prompt set, each in an order that depends on (seed, epoch) alone.

    The position is (epoch, index), whatever the world size: every rank holds the same cursor, takes the global
    batch and keeps its share.
    """

    def __init__(self, prompts: PromptSet | Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        self._prompts = list(prompts)
        if not self._prompts:
            raise PromptError("PromptCursor: no prompts")
        self._seed, self._shuffle = seed, shuffle
        self._epoch = self._index = 0
        self._order = self._make_order()
        self.fingerprint = self._make_fingerprint()

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts. From the second epoch on their ids end in `@<epoch>`: ids never repeat in a run."""
        out = []
        for _ in range(n):
            if self._index == len(self._order):
                self._epoch, self._index = self._epoch + 1, 0
                self._order = self._make_order()
            prompt = self._prompts[self._order[self._index]]
            out.append(replace(prompt, id=f"{prompt.id}@{self._epoch}") if self._epoch else prompt)
            self._index += 1
        return out

    def state_dict(self) -> dict[str, Any]:
        """`{"epoch", "index", "fingerprint"}`, JSON-safe."""
        return {"epoch": self._epoch, "index": self._index, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any], *, source: str = "the checkpoint") -> None:
        """Go on where `state`, of checkpoint `source`, was taken.

        Raises PromptError when the data or its order is no longer the same.
        """
        if state["fingerprint"] != self.fingerprint:
            raise PromptError(
                f"cannot resume: the prompts changed since the checkpoint (it had {_explain(state['fingerprint'])}; "
                f"now {_explain(self.fingerprint)}). Restore data.*, train.seed, data.shuffle and the tokenizer, or "
                f"begin a new run from its weights with model.load={source} checkpoint.load=null and another "
                "logging.run_dir"
            )
        self._epoch, self._index = int(state["epoch"]), int(state["index"])
        self._order = self._make_order()

    def _make_order(self) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(derive_seed(self._seed, "prompts", self._epoch)).shuffle(order)
        return order

    def _make_fingerprint(self) -> str:
        """`<n>:<order>:<hash>`: the number of prompts, the rule of their order, and what they say."""
        h = hashlib.blake2b(digest_size=8)
        for p in self._prompts:
            h.update(json.dumps([p.id, p.tokens, p.answer, p.verifier]).encode())
        rule = f"seed {self._seed}" if self._shuffle else "unshuffled"
        return f"{len(self._prompts)}:{rule}:{h.hexdigest()}"


def _explain(fingerprint: str) -> str:
    n, rule, digest = fingerprint.split(":")
    return f"{n} prompts, {rule}, contents {digest}"
