"""Prompts: read, checked, templated and tokenized once.

    prompts = load_prompts(cfg.data.train, cfg.data, tokenizer, vocab_size=32000)
    cursor = PromptCursor(prompts, seed=cfg.train.seed, shuffle=cfg.data.shuffle)     # data/cursor.py

A source is files, a Hub data set (data/files.py, data/hub.py) or a reasoning-gym task. Its rows have a prompt and an
answer (data/columns.py), and perhaps a reference text for perplexity. `data_source` and `extra_info` columns are passed
on to the verifier, as in verl's data. The verifier of a prompt is its source's own, else `reasoning_gym` for
reasoning-gym sources, else `data.verifier`. It is checked here, before anything is sampled.

Ids. A prompt is called `<file stem or task>:<row>`, with `#2` after the name for a second file of that name.

What is refused: a malformed line, a missing prompt or answer, a token that the model does not have, a truth that its
verifier cannot grade (data/truths.py). What is dropped and counted: a prompt longer than `data.max_prompt_len` tokens,
and repeated prompts under `data.drop_duplicates`. `PromptSet.notes` says it, for the console.

Traps. (1) The chat template writes the special tokens, so templated text is tokenized without adding them again; plain
text with. (2) Some tokenizers append EOS to plain text, which would end the response before it began: it is taken off.
(3) A text that begins with BOS gets a second one from the tokenizer: one of them is taken off. (4) Data sets repeat
rows a hundred times: equal prompts are tokenized once and share one list of tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NoReturn

from treepo_mega.config import DataConfig, PromptSource
from treepo_mega.data.chat import SOLUTION_DROPPED, Renderer, Said, looks_like_messages
from treepo_mega.data.columns import Columns, reference
from treepo_mega.data.files import Part, find_parts
from treepo_mega.data.gym import GymError, make_items
from treepo_mega.data.hub import find_hub_parts, hub_id
from treepo_mega.data.openings import Opener, sendable, with_opening
from treepo_mega.data.rewards.verifiers import VerifierError, check_verifier
from treepo_mega.data.rows import PromptError, Row
from treepo_mega.data.truths import Truths, truth_text
from treepo_mega.text.reward_name import REWARD
from treepo_mega.text.tokenizer import PromptTokenizer

CHUNK_ROWS = 4096
"""Rows that are tokenized in one call and in memory at once."""


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
    row: dict[str, Any] | None = None
    """What an environment's reset(**row) gets; None without one. `text` ends with what it returned, `opening`."""
    opening: str | None = None


@dataclass(slots=True)
class PromptSet:
    """The prompts that are used, how many were dropped for which reason, and what people should know."""

    prompts: list[Prompt]
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Sentences for the console."""
    weights: list[tuple[int, float]] = field(default_factory=list)
    """(prompts, weight) of each source in turn, where sources have weights; empty otherwise."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)


def load_prompts(
    sources: Sequence[PromptSource],
    data: DataConfig,
    tokenizer: PromptTokenizer,
    *,
    vocab_size: int | None = None,
    opener: Opener | None = None,
) -> PromptSet:
    """Read all `sources` in order; `vocab_size`: of the model, whose ids a prompt's tokens have to be among.

    `opener`: the environment, whose tools stand in the prompts, and whose reset says how they end. Raises PromptError
    naming file, line and key for what cannot be used, and when no prompt is left.
    """
    loader = _Loader(data, tokenizer, vocab_size, opener)
    weights = []
    for source in sources:
        before = len(loader.prompts)
        loader.read(source)
        if source.weight is not None:
            weights.append((len(loader.prompts) - before, source.weight))
            if len(loader.prompts) == before:
                raise PromptError(
                    f"{name_of(source)}: weight {source.weight:g}, but no prompt of this source is left: dropped "
                    f"{dict(loader.dropped)}"
                )
    if not loader.prompts:
        raise PromptError(
            f"no prompt is left of {loader.total}: dropped {dict(loader.dropped)} (data.max_prompt_len "
            f"{data.max_prompt_len}{loader.too_long})"
        )
    return PromptSet(loader.prompts, dict(loader.dropped), loader.notes(), weights)


def name_of(source: PromptSource) -> str:
    """How messages call a source."""
    return str(source.reasoning_gym or ", ".join(source.paths))


def source_parts(source: PromptSource) -> list[Part]:
    """The files or tables of a source. Raises PromptError for what is not there; Hub data sets are downloaded."""
    if (source.path is None) == (source.reasoning_gym is None):
        raise PromptError("a prompt source needs exactly one of path and reasoning_gym")
    if source.reasoning_gym is not None:
        return [_gym_part(source)]
    refuse_hub_keys(source)
    parts = []
    for spec in source.paths:
        name = hub_id(spec)
        parts += find_parts(spec) if name is None else find_hub_parts(spec, name, source.subset, source.split)
    return parts


def refuse_hub_keys(source: PromptSource) -> None:
    """Raises PromptError for keys of a Hub data set on a source that is none: they would have no effect."""
    if source.subset is None and source.split == "train":
        return
    if not any(hub_id(spec) for spec in source.paths):
        raise PromptError(
            f"{name_of(source)}: subset and split choose from a Hub data set, and these are files; leave them out"
        )


def refuse_empty(name: str) -> NoReturn:
    """Raises PromptError for a source, or one path of it, without rows."""
    raise PromptError(f"{name}: {'the slice has no rows' if '@[' in name else 'no rows'}")


def _gym_part(source: PromptSource) -> Part:
    name = str(source.reasoning_gym)
    try:
        items = make_items(name, source.params, seed=source.seed, size=source.size)
    except GymError as e:
        raise PromptError(f"prompt source {name}: {e}") from None

    def read(start: int, stop: int | None) -> Iterator[Row]:
        for i, item in islice(enumerate(items), start, stop):
            ref = {"name": name, "params": source.params, "seed": source.seed, "size": source.size, "index": i}
            extra = {"reasoning_gym": ref, "entry": item}
            values = {"prompt": item["question"], "answer": item["answer"], "data_source": name, "extra_info": extra}
            yield Row(f"reasoning_gym {name}, item {i}", i, values)

    return Part(name, f"reasoning_gym {name}", read)


def verifier_of(source: PromptSource, data: DataConfig) -> str:
    """The verifier of a source's prompts. Raises PromptError when there is none of that name."""
    verifier = source.verifier or ("reasoning_gym" if source.reasoning_gym else data.verifier)
    try:
        check_verifier(verifier)
    except VerifierError as e:
        raise PromptError(f"prompt source {name_of(source)}: {e}") from None
    return verifier


@dataclass(slots=True)
class _Distinct:
    """One distinct prompt, and the truths that rows give for it."""

    text: str
    templated: bool
    where: str
    tokens: list[int] = field(default_factory=list)
    truths: list[tuple[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class _Draft:
    """A row on its way to a prompt."""

    row: Row
    prompt_id: str
    distinct: _Distinct
    answer: str
    data_source: str
    extra: dict[str, Any]
    reference: str
    opening: str | None = None
    sent: dict[str, Any] | None = None


def _prompt_id(name: str, row: Row) -> str:
    return f"{name}:{row.index}"


class Drafter:
    """Turns rows into prompts. Distinct prompts are rendered and tokenized once, whatever the number of rows."""

    def __init__(
        self, data: DataConfig, tokenizer: PromptTokenizer, vocab_size: int | None, opener: Opener | None = None
    ) -> None:
        self.data = data
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.opener = opener
        self.renderer = Renderer(data, tokenizer, opener.tools if opener is not None else ())
        self.columns = Columns(data.input_key, data.label_key)
        self.said: Counter[str] = Counter()
        self.first_said: dict[str, str] = {}
        self.second_bos = 0
        self._distinct: dict[Said, _Distinct] = {}
        self._texts: dict[str, str] = {}

    def draft(self, rows: Iterable[Row], name: str, verifier: str) -> list[_Draft]:
        """Drafts of `rows` with their tokens, in order. Raises PromptError that names the row."""
        known = len(self._distinct)
        rows = list(rows)
        sent = [sendable(row) for row in rows] if self.opener is not None else []
        named = [(_prompt_id(name, row), values) for row, values in zip(rows, sent, strict=False)]
        openings = self.opener.openings(named) if self.opener is not None else [None] * len(rows)
        drafts = [self._draft(row, name, verifier, opening) for row, opening in zip(rows, openings, strict=True)]
        for draft, values in zip(drafts, sent, strict=False):
            draft.sent = values
        self._tokenize(list(islice(self._distinct.values(), known, None)))
        return drafts

    def _draft(self, row: Row, name: str, verifier: str, opening: str | None) -> _Draft:
        prompt, choice = self.columns.prompt(row)
        if choice:
            self._note(choice, row.where)
        # The environment knows from its row what it rewards.
        truth = "" if verifier == REWARD else self.columns.truth(row, verifier)
        answer = truth_text(truth, verifier, row.where)
        said = with_opening(self.renderer.normalize(prompt, row.where), opening)
        distinct = self._distinct.get(said)
        if distinct is None:
            distinct = self._distinct[said] = _Distinct(*self.renderer.render(said, row.where), row.where)
            if isinstance(said, str) and looks_like_messages(said):
                self._note("the prompt begins like a list of messages, but is neither JSON nor Python: text", row.where)
        extra = row.values.get("extra_info") or {}
        if not isinstance(extra, dict):
            raise PromptError(f"{row.where}: extra_info is {type(extra).__name__}, expected a mapping")
        try:
            json.dumps(extra)
        except (TypeError, ValueError) as e:
            raise PromptError(f"{row.where}: extra_info cannot be sent to a grader: {e}") from None
        data_source = self._shared(str(row.values.get("data_source") or name))
        reference_text = self._shared(reference(row, self.data.reference_key, truth))
        return _Draft(
            *(row, _prompt_id(name, row), distinct, self._shared(answer), data_source, extra, reference_text),
            opening=opening,
        )

    def _shared(self, text: str) -> str:
        """The one object for equal texts: repeated rows then cost no memory for them."""
        return self._texts.setdefault(text, text)

    def _note(self, text: str, where: str) -> None:
        self.said[text] += 1
        self.first_said.setdefault(text, where)

    def _tokenize(self, fresh: list[_Distinct]) -> None:
        eos = getattr(self.tokenizer, "eos_token_id", None)
        bos = getattr(self.tokenizer, "bos_token_id", None)
        for templated in (False, True):
            which = [one for one in fresh if one.templated is templated]
            if not which:
                continue
            # The chat template wrote the special tokens already; plain text still needs them.
            encoded = self.tokenizer([one.text for one in which], add_special_tokens=not templated)["input_ids"]
            for one, ids in zip(which, encoded, strict=True):
                tokens = list(ids)
                # Some tokenizers append EOS to plain text, which would end the response before it began.
                if not templated and len(tokens) > 1 and tokens[-1] == eos and not self._ends_in_eos(one.text):
                    tokens.pop()
                if bos is not None and tokens[:2] == [bos, bos]:
                    # Text and tokenizer both wrote one; no model has seen two.
                    del tokens[0]
                    self.second_bos += 1
                if not tokens:
                    raise PromptError(f"{one.where}: the prompt has no tokens")
                self._check_vocabulary(tokens, one.where)
                one.tokens = tokens

    def _ends_in_eos(self, text: str) -> bool:
        eos = self.tokenizer.eos_token
        return bool(eos and text.endswith(eos))

    def _check_vocabulary(self, tokens: list[int], where: str) -> None:
        # Megatron pads the embedding: an id in the padding would be looked up without an error.
        if self.vocab_size is None or max(tokens) < self.vocab_size:
            return
        token = next(token for token in tokens if token >= self.vocab_size)
        raise PromptError(
            f"{where}: the prompt has token {token} ({self.tokenizer.decode([token])!r}), and the model knows ids "
            f"below {self.vocab_size} (config.json: vocab_size). Use the tokenizer and chat template that belong to "
            "the model, or enlarge its embedding"
        )

    def notes(self) -> list[str]:
        """What was decided on the way, a sentence each."""
        out = [f"{self.first_said[text]} and {count - 1} more rows: {text}" for text, count in self.said.items()]
        renderer = self.renderer
        if renderer.solutions_dropped:
            more = renderer.solutions_dropped - 1
            out.append(f"{renderer.first_dropped} and {more} more rows: {SOLUTION_DROPPED}")
        if self.second_bos:
            out.append(
                f"{self.second_bos} prompts began with two BOS tokens, one of the text and one of the tokenizer or "
                "template: one is kept"
            )
        unused = [key for key in ("chat_template", "chat_template_kwargs") if getattr(self.data, key)]
        if unused and not renderer.templated:
            out.append(
                f"data.{unused[0]} has no effect: the prompts are plain text, and data.apply_chat_template is off"
            )
        return out


class _Loader:
    """Collects the prompts of all sources, and what to say about them."""

    def __init__(
        self, data: DataConfig, tokenizer: PromptTokenizer, vocab_size: int | None, opener: Opener | None
    ) -> None:
        self.data = data
        self.tokenizer = tokenizer
        self.drafter = Drafter(data, tokenizer, vocab_size, opener)
        self.prompts: list[Prompt] = []
        self.dropped: Counter[str] = Counter()
        self.total = 0
        self.too_long = ""
        self._names: Counter[str] = Counter()
        self._repeats = self._conflicts = 0
        self._first_repeat = self._first_conflict = ""

    def read(self, source: PromptSource) -> None:
        """Take the prompts of `source`. Raises PromptError for a row that cannot be used, by file and line."""
        verifier = verifier_of(source, self.data)
        truths = Truths(verifier, name_of(source))
        rows_read = 0
        for part in source_parts(source):
            self._names[part.name] += 1
            count = self._names[part.name]
            name = f"{part.name}#{count}" if count > 1 else part.name
            rows = part.rows()
            while chunk := list(islice(rows, CHUNK_ROWS)):
                rows_read += len(chunk)
                for draft in self.drafter.draft(chunk, name, verifier):
                    if verifier != REWARD:
                        truths.add(draft.row.where, draft.answer)
                    self._take(draft, verifier)
        if not rows_read:
            refuse_empty(name_of(source))
        self.total += rows_read
        truths.check()

    def _take(self, draft: _Draft, verifier: str) -> None:
        one = draft.distinct
        if len(one.tokens) > self.data.max_prompt_len:
            self.dropped["too_long"] += 1
            self.too_long = self.too_long or f"; such as {draft.row.where}: {len(one.tokens)} tokens"
            return
        truth = (draft.answer, verifier)
        if truth in one.truths:
            self._repeats += 1
            self._first_repeat = self._first_repeat or f"{draft.row.where} ({one.where} has it first)"
            if self.data.drop_duplicates:
                self.dropped["duplicate"] += 1
                return
        else:
            if one.truths:
                self._conflicts += 1
                self._first_conflict = self._first_conflict or f"{draft.row.where} and {one.where}"
            one.truths.append(truth)
        text, tokens = one.text, one.tokens
        self.prompts.append(
            Prompt(
                *(draft.prompt_id, text, tokens, draft.answer, verifier, draft.data_source, draft.extra),
                *(draft.reference, draft.sent, draft.opening),
            )
        )

    def notes(self) -> list[str]:
        """Sentences for the console."""
        out = self.drafter.notes()
        total = self.total
        if self.dropped["too_long"]:
            out.append(
                f"{self.dropped['too_long']} of {total} prompts dropped: longer than data.max_prompt_len = "
                f"{self.data.max_prompt_len} tokens{self.too_long}"
            )
        if self._repeats:
            done = (
                "they are left out (data.drop_duplicates)"
                if self.data.drop_duplicates
                else "each is trained on as often as it stands there; data.drop_duplicates=true keeps the first of each"
            )
            out.append(
                f"{self._repeats} of {total} prompts repeat an earlier one with the same answer, such as "
                f"{self._first_repeat}: {done}"
            )
        if self._conflicts:
            out.append(
                f"{self._conflicts} of {total} prompts repeat an earlier one with another answer or verifier, such as "
                f"{self._first_conflict}: one of the two is likely wrong"
            )
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown is not None:
            blurred = [p.id for p in self.prompts if unknown in p.tokens]
            if blurred:
                out.append(
                    f"{len(blurred)} of {total} prompts hold text that the tokenizer cannot spell (unknown token), "
                    f"such as {blurred[0]}"
                )
        return out
