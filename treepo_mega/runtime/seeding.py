"""Seeds by name: every random choice in a run has a seed that is a hash of what it is for.

No generator is shared between uses, so a choice does not depend on how many others were made before it:
trees do not depend on completion order, world size or restart.
"""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) from the parts, in order; (1, "a") and ("1", "a") differ.

    Raises TypeError for a part that is neither int nor str (floats have no canonical spelling).
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"derive_seed takes int and str parts, got {part!r}")
        # Length and type first: ("ab", "c") and ("a", "bc") are different names.
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "big") + text)
    return int.from_bytes(digest.digest(), "big") >> 1
