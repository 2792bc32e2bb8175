"""The keys of the configuration as tests need them: all names, which names exist, and which a YAML file sets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from treepo_mega.config import Config, Section, section_in
from treepo_mega.config.describe import keys

KEY = re.compile(rf"(?<![\w./-])((?:{'|'.join(Config.model_fields)})(?:\.[a-z_0-9]+)+)(?![\w/(])")
"""A dotted word in prose that begins with a section's name."""

ALL_KEYS = [key.name.replace(".<i>", "") for key in keys()]
"""Every key by its dotted name; a key of a list of sections without its place in the list."""


def fields_of(section: type[Section]) -> dict[str, object]:
    """The name that people write -> the type of each field."""
    return {field.alias or name: field.annotation for name, field in section.model_fields.items()}


def is_key(dotted: str) -> bool:
    """Whether `dotted` names a key or a section of the configuration."""
    section: type[Section] | None = Config
    for part in dotted.split("."):
        if section is None or part not in fields_of(section):
            return False
        section = section_in(fields_of(section)[part])
    return True


def keys_set(raw: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every key that plain data sets, sections in lists included."""
    if isinstance(raw, dict) and (not prefix or prefix[:-1] not in ALL_KEYS):
        for name, value in raw.items():
            yield from keys_set(value, f"{prefix}{name}.")
    elif isinstance(raw, list) and prefix[:-1] not in ALL_KEYS:
        for item in raw:
            yield from keys_set(item, prefix)
    else:
        yield prefix[:-1], raw
