"""Types that a generic class was made with."""

from __future__ import annotations

from typing import Any, get_args, get_origin


def concrete_type(cls: type, bound: type, *, origin: Any = None) -> Any:
    """The first type argument below `bound` among the bases of `cls`."""
    for klass in cls.__mro__:
        for base in getattr(klass, "__orig_bases__", ()):
            for argument in get_args(base) if origin is None or get_origin(base) is origin else ():
                if isinstance(argument, type) and issubclass(argument, bound):
                    return argument
    return None
