"""Python's search for reference cycles, put off while many objects are made that have none."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collection_put_off() -> Iterator[None]:
    """No cycle is searched for in the block; afterwards as before.

    The search looks at all that is alive whenever enough is new. Making 50,000 nodes then takes five times as long.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
