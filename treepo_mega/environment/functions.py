"""Plain functions as tools: an environment without a state, made of a function or of a list of functions.

def add(a: int, b: int) -> str: ...
TOOLS = [add, subtract]             # data.environment: path/to/file.py:TOOLS, or path/to/file.py:add
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

Function = Callable[..., Any]


class NoFunction(TypeError):
    """What was found is neither a function nor a list of functions; the message says what it is."""


class Stateless:
    """The base of environments that are made of functions: nothing to reset, and a branch needs no copy of anything."""

    def reset(self, **row: Any) -> None:
        """Nothing begins."""

    def fork(self) -> Stateless:
        """Another one."""
        return type(self)()


def functions_in(found: Any) -> list[Function]:
    """The functions that were named, in their order. Raises NoFunction.

    >>> [function.__name__ for function in functions_in(functions_in)]
    ['functions_in']
    """
    listed: Sequence[Any] = found if isinstance(found, list | tuple) else [found]
    for each in listed:
        if not inspect.isfunction(each):
            raise NoFunction(f"expected a class, a function or a list of functions, found {type(each).__name__}")
    names = [each.__name__ for each in listed]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or not names:
        raise NoFunction(f"two functions are called {twice!r}" if names else "the list of functions is empty")
    return list(listed)


def class_of(functions: Sequence[Function]) -> type:
    """An environment whose tools are these functions, with their names, types and docstrings."""
    return type("Functions", (Stateless,), {function.__name__: _as_method(function) for function in functions})


def _as_method(function: Function) -> Function:
    @functools.wraps(function)
    def method(self: Any, *args: Any, **arguments: Any) -> Any:
        return function(*args, **arguments)

    # What reads a tool's parameters leaves the first one out, and must not look behind this wrapper.
    signature = inspect.signature(function)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    whole = signature.replace(parameters=[own, *signature.parameters.values()])
    method.__signature__ = whole  # type: ignore[attr-defined]
    del method.__wrapped__
    return method
