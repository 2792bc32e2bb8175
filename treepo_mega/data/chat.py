"""Messages and chat templates: from what a row holds to the text that is tokenized.

    renderer = Renderer(data, tokenizer)
    said = renderer.normalize(prompt, where)     # a text, or messages as (role, content) pairs: hashable
    text, templated = renderer.render(said, where)

Messages may be given as a list, as JSON text or as Python's own text of such a list. Roles and contents may be called
`from` and `value`, and a content may be a list of text parts. A closing assistant turn is a solution: it never becomes
part of a prompt.

Every place that renders prompts does it here, with `data.chat_template` and `data.chat_template_kwargs`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError

from treepo_mega.config import DataConfig
from treepo_mega.data.rows import PromptError
from treepo_mega.errors import nearest
from treepo_mega.text.tokenizer import PromptTokenizer

Said = str | tuple[tuple[str, str], ...]
"""A prompt before its template: plain text, or (role, content) pairs."""

MAX_LITERAL = 100_000
"""Characters of Python text that are read as a list of messages; JSON has no limit, as its reader is linear."""

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

SET_BY_TRAINER = (
    *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    "tokenizer_kwargs",
)
"""Names that `data.chat_template_kwargs` cannot have: they steer the call, and the trainer sets them."""

SOLUTION_DROPPED = "their closing assistant turn, which holds the solution, is left out of the prompt"


def messages_in(value: Any) -> list[dict[str, Any]] | None:
    """The messages that `value` is, or that it spells as JSON or Python text; None for anything else.

    >>> messages_in('[{"role": "user", "content": "hi"}]')
    [{'role': 'user', 'content': 'hi'}]
    """
    if isinstance(value, str):
        value = _decoded(value)
    if not isinstance(value, list) or not value:
        return None
    out = []
    for message in value:
        if not isinstance(message, dict):
            return None
        role = message.get("role", message.get("from"))
        content = _content(message.get("content", message.get("value")))
        if not isinstance(role, str) or content is None:
            return None
        out.append({"role": SHAREGPT_ROLES.get(role, role), "content": content})
    return out


def _decoded(text: str) -> Any:
    if not text.lstrip().startswith("["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if len(text) > MAX_LITERAL:
        return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _content(value: Any) -> str | None:
    """A message's text: itself, or its text parts joined; None when there is another kind of part."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        return None
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None  # type: ignore[arg-type]


def closes_with_assistant(messages: list[dict[str, Any]]) -> bool:
    """Whether the last message is the assistant's."""
    return bool(messages[-1]["role"] == "assistant")


def looks_like_messages(text: str) -> bool:
    """Whether a text that is not a list of messages begins as if it were one: cut off, perhaps.

    >>> looks_like_messages('[{"role": "user", "content": "h')
    True
    """
    head = text.lstrip()[:200]
    return head.startswith("[") and head[1:].lstrip().startswith("{") and "role" in head and "content" in head


class Renderer:
    """Renders prompts with the configuration's template and variables, or the tokenizer's own template.

    Raises PromptError on construction for a template file that cannot be read and for unknown variables.
    """

    def __init__(self, data: DataConfig, tokenizer: PromptTokenizer, tools: Sequence[dict[str, Any]] = ()) -> None:
        """`tools`: JSON schemas that the template shows."""
        self._data = data
        self._tokenizer = tokenizer
        self._tools = list(tools)
        self._template = read_template(data.chat_template) if data.chat_template is not None else None
        self.solutions_dropped = 0
        self.first_dropped = ""
        self.templated = 0
        if data.chat_template_kwargs:
            check_template_kwargs(data.chat_template_kwargs, self._template or template_text(tokenizer))

    def normalize(self, prompt: Any, where: str) -> Said:
        """`prompt` as text or as checked messages, without a closing assistant turn."""
        if isinstance(prompt, str):
            return prompt
        messages = messages_in(prompt)
        if messages is None:
            raise PromptError(
                f"{where}: the prompt is neither a string nor a list of messages with string 'role' and 'content' "
                f"(got {str(prompt)[:80]!r})"
            )
        asked = list(messages)
        while len(asked) > 1 and closes_with_assistant(asked):
            asked.pop()
        if asked[-1]["role"] != "user":
            raise PromptError(f"{where}: the last message is from {messages[-1]['role']!r}; expected 'user'")
        if len(asked) < len(messages):
            self.solutions_dropped += 1
            self.first_dropped = self.first_dropped or where
        return tuple((message["role"], message["content"]) for message in asked)

    def render(self, said: Said, where: str) -> tuple[str, bool]:
        """(text, whether the chat template wrote it). Raises PromptError, with a refusing template's own words."""
        text, templated = self._render(said, where)
        self.templated += templated
        if isinstance(said, str) and not said.strip():
            raise PromptError(f"{where}: the prompt is empty: nothing but white space ({said[:20]!r})")
        try:
            # JSON may spell half a surrogate pair. The tokenizer would refuse it later without naming a row.
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise PromptError(f"{where}: the prompt is not valid Unicode: {e}") from None
        return text, templated

    def _render(self, said: Said, where: str) -> tuple[str, bool]:
        data = self._data
        if isinstance(said, str):
            if not data.apply_chat_template:
                if data.system_prompt is not None:
                    raise PromptError(
                        f"{where}: data.system_prompt needs data.apply_chat_template or prompts made of messages"
                    )
                return said + data.prompt_suffix, False
            messages = [{"role": "user", "content": said}]
        else:
            messages = [{"role": role, "content": content} for role, content in said]
        messages[-1]["content"] += data.prompt_suffix
        if data.system_prompt is not None:
            rest = messages[1:] if messages[0]["role"] == "system" else messages
            messages = [{"role": "system", "content": data.system_prompt}, *rest]
        return self._templated(messages, where), True

    def _templated(self, messages: list[dict[str, str]], where: str) -> str:
        if self._template is None and not getattr(self._tokenizer, "chat_template", None):
            raise PromptError(
                f"{where}: the tokenizer has no chat template, which a prompt made of messages needs, and one under "
                "data.apply_chat_template. Set data.chat_template to a Jinja file, give the model directory a "
                "chat_template.jinja, or, for a base model, leave data.apply_chat_template out and give prompts as text"
            )
        options = dict(self._data.chat_template_kwargs)
        if self._template is not None:
            options["chat_template"] = self._template
        if self._tools:
            options["tools"] = self._tools
        try:
            return str(
                self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
            )
        except Exception as error:  # a template is a program: it fails in any way it likes
            roles = ", ".join(message["role"] for message in messages)
            hint = "; leave data.system_prompt out" if self._data.system_prompt is not None else ""
            raise PromptError(f"{where}: the chat template refuses messages of {roles}: {error}{hint}") from None


def read_template(path: str) -> str:
    """The text of a Jinja file. Raises PromptError when it cannot be read, is empty or is no Jinja."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"data.chat_template: {path} is not UTF-8: {error}") from None
    except OSError as error:
        folder = Path(path).parent
        names = [str(p) for p in folder.iterdir()] if folder.is_dir() else []
        hint = nearest(str(path), names, cutoff=0.7)
        raise PromptError(f"data.chat_template: cannot read {path}: {error.strerror or error}{hint}") from None
    if not text.strip():
        raise PromptError(f"data.chat_template: {path} is empty; expected a Jinja chat template")
    _names(text, f"data.chat_template: {path}")
    return text


def template_text(tokenizer: PromptTokenizer) -> str | None:
    """The tokenizer's chat template; of several named ones the default, which is the one that renders."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template or None


def check_template_kwargs(kwargs: dict[str, Any], template: str | None) -> None:
    """Raises PromptError for variables that the trainer sets itself or that the template never mentions."""
    if taken := [name for name in kwargs if name in SET_BY_TRAINER]:
        raise PromptError(f"data.chat_template_kwargs.{taken[0]}: the trainer sets this itself; leave it out")
    if template is None:
        raise PromptError(
            f"data.chat_template_kwargs ({', '.join(kwargs)}) needs a chat template, and the tokenizer has none; set "
            "data.chat_template to a Jinja file"
        )
    mentioned = _names(template, "the tokenizer's chat template")
    if unknown := [name for name in kwargs if name not in mentioned]:
        raise PromptError(
            f"data.chat_template_kwargs.{unknown[0]}: the chat template never mentions this variable"
            f"{nearest(unknown[0], mentioned)}; it would have no effect"
        )


def _names(template: str, what: str) -> set[str]:
    """Names and quoted words in the program parts of a template. Read from tokens: templates may extend the syntax."""
    try:
        tokens = list(Environment().lex(template))
    except TemplateError as error:
        raise PromptError(f"{what}: not a Jinja template: {error}") from None
    return {text.strip("'\"") for _, kind, text in tokens if kind in ("name", "string")}
