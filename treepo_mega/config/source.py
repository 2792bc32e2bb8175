"""What people wrote, read by the type of the key: text stays text, `None` is null, a key stands once.

YAML guesses types from how a value looks: `12e4567` becomes infinity, `0123` an octal number, and of two sections
with one name the first vanishes. A key whose type is text takes what was written instead. A mapping that names a key
twice is an error with both lines.
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from treepo_mega.config.section import Section
from treepo_mega.errors import TreepoError
from treepo_mega.text.function_path import FORM, is_function_path

NULL_WORDS = frozenset({"", "~", "null", "Null", "NULL", "None", "none"})
"""What people write for "not set" in a key that can be null. Inside quotes these are words."""


class SourceError(TreepoError):
    """A configuration text that cannot be read as meant; the message names the line or the key."""


def members(annotation: Any) -> tuple[Any, ...]:
    """The types that `annotation` allows: the members of a union, else itself.

    >>> [member.__name__ for member in members(str | None)]
    ['str', 'NoneType']
    """
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return tuple(inner for member in typing.get_args(annotation) for inner in members(member))
    return (annotation,)


def is_text(annotation: Any) -> bool:
    """Whether the key takes any text (and perhaps null), and nothing else."""
    allowed = set(members(annotation)) - {type(None)}
    return allowed == {str}


def scalar_is_text(annotation: Any) -> bool:
    """Whether a single value of the key is text: the key takes text, or a list in its place."""
    allowed = {member for member in members(annotation) if typing.get_origin(member) is not list}
    return allowed - {type(None)} == {str}


def choices(annotation: Any) -> list[Any]:
    """The values that the key names one by one.

    >>> choices(Literal["off", "all"] | None)
    ['off', 'all']
    """
    literals = [member for member in members(annotation) if typing.get_origin(member) is Literal]
    return [choice for member in literals for choice in typing.get_args(member)]


def may_be_null(annotation: Any) -> bool:
    """Whether the key can be null, and the word `none` is not one of its choices."""
    return type(None) in members(annotation) and "none" not in choices(annotation)


def annotation_at(root: type[Section], path: tuple[Any, ...]) -> Any:
    """The type of the key at `path` below `root`; None for an unknown key or inside a free-form mapping."""
    annotation: Any = root
    for part in path:
        if isinstance(part, int):
            inner = [typing.get_args(member) for member in members(annotation) if typing.get_origin(member) is list]
            annotation = inner[0][0] if inner and inner[0] else None
            continue
        sections = [
            member for member in members(annotation) if isinstance(member, type) and issubclass(member, Section)
        ]
        if not sections or part not in sections[0].key_names():
            return None
        annotation = sections[0].model_fields[sections[0].key_names()[part]].annotation
    return annotation


def read_mapping(text: str, source: str, root: type[Section]) -> Any:
    """The plain data of YAML `text`, with text keys as written. Raises SourceError for a key that stands twice."""
    node = _compose(text, source)
    if node is None:
        return {}
    data = yaml.safe_load(text)
    return _as_written(node, data, root, (), source)


def read_value(text: str, path: tuple[str, ...], root: type[Section]) -> Any:
    """The value of an override: `text` is all that stands after `=`.

    A text key keeps it blank for blank; quotes around the whole are taken off. Other keys are read as YAML.
    """
    annotation = annotation_at(root, path)
    source = f"override {'.'.join(path)}={text}"
    if annotation is not None and is_text(annotation):
        if text.strip()[:1] in ("'", '"') and text.strip()[-1:] == text.strip()[:1] and len(text.strip()) > 1:
            return yaml.safe_load(text.strip())
        return _plain_text(text, annotation, ".".join(path), source)
    if annotation is not None and may_be_null(annotation) and text.strip() in NULL_WORDS:
        return None
    if not text:
        return ""
    node = _compose(text, source)
    return None if node is None else _as_written(node, yaml.safe_load(text), root, path, source)


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        hint = "; quote a path that has a slice: {path: 'FILE@[a:b]'}" if "@[" in text else ""
        raise SourceError(f"{source}: not valid YAML: {error}{hint}") from None


def _as_written(node: yaml.Node, data: Any, root: type[Section], path: tuple[Any, ...], source: str) -> Any:
    """`data`, as YAML read `node`, with every text key replaced by what was written."""
    if isinstance(node, yaml.MappingNode) and isinstance(data, dict):
        out = dict(data)
        for name, value in _entries(node, path, source):
            # YAML reads a key such as `on` as true and resolves `<<`: neither stands in `data` under its written name.
            if name in out:
                out[name] = _as_written(value, out[name], root, (*path, name), source)
        return out
    if isinstance(node, yaml.SequenceNode) and isinstance(data, list):
        return [
            _as_written(child, item, root, (*path, index), source)
            for index, (child, item) in enumerate(zip(node.value, data, strict=True))
        ]
    annotation = annotation_at(root, path)
    if annotation is None or not isinstance(node, yaml.ScalarNode):
        return data
    # A plain scalar has no style; a quoted one means the characters inside, whatever they look like.
    is_plain = node.style is None
    if scalar_is_text(annotation):
        return _plain_text(node.value, annotation, _dotted(path), source) if is_plain else node.value
    if is_plain and may_be_null(annotation) and node.value in NULL_WORDS:
        return None
    # `off` is false to YAML, and the word of a key that has it among its choices.
    return node.value if is_plain and node.value in choices(annotation) else data


def _entries(node: yaml.MappingNode, path: tuple[Any, ...], source: str) -> Iterator[tuple[str, yaml.Node]]:
    """Key and value nodes of a mapping; SourceError when a key stands in it twice."""
    first_line: dict[str, int] = {}
    for key, value in node.value:
        name = str(key.value)
        line = key.start_mark.line + 1
        if name in first_line and name != "<<":
            raise SourceError(
                f"{source}:{line}: {_dotted((*path, name))} stands here a second time, after line {first_line[name]}; "
                "YAML would drop the first without a word. Join the two"
            )
        first_line[name] = line
        yield name, value


def _plain_text(text: str, annotation: Any, key: str, source: str) -> str | None:
    if text.strip() not in NULL_WORDS or text == "":
        return text
    if may_be_null(annotation):
        return None
    if text.strip() in ("~", ""):
        return text
    raise SourceError(f"{source}: {key} cannot be null; leave it out for its default, or quote it to mean the word")


def expand_path(text: str) -> str:
    """`text` with a leading `~` and `$VAR` replaced, as a shell would. Raises ValueError for an unset variable.

    >>> expand_path("runs/demo")
    'runs/demo'
    """
    expanded = os.path.expanduser(os.path.expandvars(text))
    if "$" in expanded:
        raise ValueError(f"{text!r} names an environment variable that is not set")
    if expanded.startswith("~"):
        raise ValueError(f"{text!r} names a user's home that is not known here")
    return expanded


def _function_path(text: str) -> str:
    if not is_function_path(text):
        raise PydanticCustomError("function_path", f"Input should be {FORM}")
    return expand_path(text)


FunctionPath = Annotated[str, AfterValidator(_function_path)]
"""A function of people's own, `path/to/file.py:function`; `~` and `$VAR` are expanded."""


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)
