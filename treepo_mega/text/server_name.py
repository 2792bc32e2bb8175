"""The text `http:NAME`, by which a verifier key names a reward server of `reward.servers`."""

from __future__ import annotations

import re

FORM = "http:NAME of reward.servers"
_NAME = re.compile(r"http:([\w-]+)")


def server_of(verifier: str) -> str | None:
    """The server that a verifier's name asks; None when it is no such text.

    >>> server_of("http:judge")
    'judge'
    >>> server_of("http://judge") is None and server_of("math") is None
    True
    """
    found = _NAME.fullmatch(verifier)
    return found[1] if found else None
