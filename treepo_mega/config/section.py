"""The base of every section of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every section: unknown keys are refused, and the docstring of a field is its documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    def replace(self, changes: Mapping[str, Any]) -> Self:
        """A copy in which dotted keys have other values, such as {"segment.length": 32}.

        Values are taken as they are, as `model_copy` does. Raises KeyError for a key that the section does not have.
        """
        copy = self.model_copy()
        for key, value in changes.items():
            name, _, rest = key.partition(".")
            attribute = type(self).attribute_of(name)
            # A shallow copy shares its sections with `self`: one that changes is copied as well.
            old = getattr(copy, attribute)
            setattr(copy, attribute, old.replace({rest: value}) if rest else value)
        return copy

    @classmethod
    def attribute_of(cls, key: str) -> str:
        """The attribute that holds `key`: `from` is a word of Python, so that key is the attribute `from_`.

        Raises KeyError when the section has no such key.
        """
        for name, field in cls.model_fields.items():
            if key == (field.alias or name):
                return name
        raise KeyError(f"{cls.__name__} has no key {key!r}")

    @classmethod
    def key_names(cls) -> dict[str, str]:
        """Every key of the section, as people write it, to its attribute."""
        return {field.alias or name: name for name, field in cls.model_fields.items()}
