"""The first prompts of every file, read, rendered and tokenized before anything is started: all problems at once.

    problems, notes = try_sources(cfg.data.train, cfg.data, hf_dir, vocab_size, tokenizer_needed=True)

Only what is cheap: `FIRST_ROWS` rows a file, no reasoning-gym task, no download, no computer algebra for truths. The
loader (data/prompts.py) looks at every row; this says early what it would say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from treepo_mega.config import DataConfig, PromptSource
from treepo_mega.data.chat import read_template
from treepo_mega.data.columns import Columns
from treepo_mega.data.files import Part, find_parts
from treepo_mega.data.hub import hub_id, require_datasets
from treepo_mega.data.light_tokenizer import LightTokenizer, read_light_tokenizer
from treepo_mega.data.prompts import Drafter, name_of, refuse_empty, refuse_hub_keys, verifier_of
from treepo_mega.data.rows import PromptError
from treepo_mega.data.tokenizer import describe_size, require_tokenizer_files
from treepo_mega.data.truths import Truths, truth_text
from treepo_mega.errors import TreepoError

FIRST_ROWS = 20
"""Rows of a prompt file that are read here: enough to see that it is one, cheap for a large one."""

Found = TypeVar("Found")


def try_sources(
    sources: Sequence[PromptSource],
    data: DataConfig,
    hf_dir: str | Path,
    vocab_size: int | None,
    *,
    tokenizer_needed: bool,
) -> tuple[list[str], list[str]]:
    """(problems, notes). `tokenizer_needed`: a model directory without tokenizer is a problem, not a note."""
    trial = _Trial(data)
    trial.find_tokenizer(hf_dir, vocab_size, tokenizer_needed)
    for source in sources:
        trial.attempt(lambda source=source: trial.source(source))  # type: ignore[misc]  # mypy infers no default
    return trial.problems, trial.notes


class _Trial:
    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.drafter: Drafter | None = None

    def attempt(self, look: Callable[[], Found]) -> Found | None:
        """What `look` returns; None after a TreepoError, whose message joins the problems once."""
        try:
            return look()
        except TreepoError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None

    def find_tokenizer(self, hf_dir: str | Path, vocab_size: int | None, needed: bool) -> None:
        """Set the drafter, or say why prompts are read but not rendered."""
        data = self.data
        tokenizer: LightTokenizer | None = self.attempt(lambda: read_light_tokenizer(hf_dir))
        if tokenizer is not None:
            self.drafter = self.attempt(lambda: Drafter(data, tokenizer, vocab_size))
            if vocab_size is not None and (note := describe_size(len(tokenizer), vocab_size)):
                self.notes.append(note)
            return
        if data.chat_template is not None:
            template = data.chat_template
            self.attempt(lambda: read_template(template))
        if needed:
            self.attempt(lambda: require_tokenizer_files(hf_dir))
        if not self.problems:
            self.notes.append(f"{hf_dir} has no tokenizer.json: prompts are read here, but not rendered or tokenized")

    def source(self, source: PromptSource) -> None:
        """Try the files of one source; each names its first problem."""
        try:
            verifier = verifier_of(source, self.data)
        except PromptError as error:
            # A wrong data.verifier is named once, by preflight; the files are tried all the same.
            if source.verifier is not None:
                self.problems.append(str(error))
            verifier = "exact"
        if source.reasoning_gym is not None:
            return
        for spec in source.paths:
            name = hub_id(spec)
            if name is not None:
                self.attempt(lambda name=name: require_datasets(name))  # type: ignore[misc]  # as above
                continue
            counts = [
                self.attempt(lambda part=part: self._part(part, verifier, name_of(source)))  # type: ignore[misc]
                for part in self.attempt(lambda spec=spec: find_parts(spec)) or []  # type: ignore[misc]  # as above
            ]
            if counts and not any(count is None or count > 0 for count in counts):
                self.attempt(lambda spec=spec: refuse_empty(spec))  # type: ignore[misc]  # as above
        refuse_hub_keys(source)

    def _part(self, part: Part, verifier: str, source: str) -> int:
        """Rows that were read. Raises PromptError for the first that cannot be used."""
        rows = list(part.rows(FIRST_ROWS))
        truths = Truths(verifier, source)
        if self.drafter is not None:
            for draft in self.drafter.draft(rows, part.name, verifier):
                truths.add(draft.row.where, draft.answer)
        else:
            columns = Columns(self.data.input_key, self.data.label_key)
            for row in rows:
                columns.prompt(row)
                truths.add(row.where, truth_text(columns.truth(row, verifier), verifier, row.where))
        truths.check(read_formulas=False)
        return len(rows)
