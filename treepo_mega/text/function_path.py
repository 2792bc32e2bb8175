"""The text `path/to/file.py:function`, by which configuration keys name a function of people's own. Nothing is read."""

from __future__ import annotations

FORM = "path/to/file.py:function"


def split_function_path(name: str) -> tuple[str, str] | None:
    """(file, function) of `path/to/file.py:function`; None when `name` is no such text.

    >>> split_function_path("rewards/mine.py:score")
    ('rewards/mine.py', 'score')
    >>> split_function_path("math") is None
    True
    """
    path, colon, function = name.rpartition(":")
    return (path, function) if colon and path.endswith(".py") and function else None


def is_function_path(name: str) -> bool:
    """Whether `name` has the form `path/to/file.py:function`."""
    return split_function_path(name) is not None
