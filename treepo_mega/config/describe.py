"""Every configuration key for people: name, values, default and documentation, read from the sections themselves.

    for line in help_config(): print(line)        # treepo-mega train --help-config

`keys(Config)` walks all keys; `docs/configuration.md` is made of the same walk (tools/docs/generate.py).
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic.fields import FieldInfo

from treepo_mega.config.everyday import EVERYDAY
from treepo_mega.config.load import section_in
from treepo_mega.config.root import Config
from treepo_mega.config.section import Section
from treepo_mega.config.source import FunctionPath
from treepo_mega.text.function_path import FORM


@dataclass(frozen=True, slots=True)
class Key:
    """A key as people write it; `<i>` stands for the place in a list of sections: `data.train.<i>.path`."""

    name: str
    field: FieldInfo
    section: type[Section]

    @property
    def values(self) -> str:
        """What may be set: `str | null`, or the words that are allowed."""
        return type_name(self.field.annotation)

    @property
    def default(self) -> str:
        """The default as Python shows it, or that there is none."""
        if self.field.is_required():
            return "required"
        return f"default {self.field.get_default(call_default_factory=True)!r}"

    @property
    def documentation(self) -> str:
        """The docstring below the field, in one line; empty when the name says all."""
        return " ".join((self.field.description or "").split())


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[Key]:
    """Every key below `section`: its own first, then those of the sections inside, so that blocks stay together."""
    for name, field in section.model_fields.items():
        if section_in(field.annotation) is None:
            yield Key(f"{prefix}{field.alias or name}", field, section)
    for name, field in section.model_fields.items():
        if inner := section_in(field.annotation):
            place = ".<i>" if typing.get_origin(field.annotation) is list else ""
            yield from keys(inner, f"{prefix}{field.alias or name}{place}.")


def type_name(annotation: object, separator: str = " | ") -> str:
    """A field's type as people write its values, alternatives with `separator` between.

    >>> type_name(typing.Literal["fp32", "bf16"] | None)
    'fp32 | bf16 | null'
    """
    if typing.get_origin(annotation) is typing.Literal:
        return separator.join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return separator.join(type_name(member, separator) for member in typing.get_args(annotation))
    if annotation is type(None):
        return "null"
    if annotation == FunctionPath:
        return FORM
    if typing.get_origin(annotation) is list:
        return f"list[{type_name(typing.get_args(annotation)[0], separator)}]"
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def help_config() -> list[str]:
    """All keys as lines: those of every day first, then the others under their sections."""
    everyday = {key.name: key for key in keys() if key.name in EVERYDAY}
    lines = [f"{len(everyday)} keys that most runs set. The others follow, section by section."]
    for name in EVERYDAY:
        lines += _lines(everyday[name])
    section = ""
    for key in keys():
        if key.name in everyday:
            continue
        if key.name.rpartition(".")[0] != section:
            section = key.name.rpartition(".")[0]
            lines += ["", f"{section}: {(key.section.__doc__ or '').strip().splitlines()[0]}"]
        lines += _lines(key)
    return lines


def _lines(key: Key) -> list[str]:
    head = f"  {key.name}: {key.values}, {key.default}"
    return [head, f"      {key.documentation}"] if key.documentation else [head]
