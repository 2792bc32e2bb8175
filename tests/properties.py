"""How many examples a property is tried on, and which: profiles of hypothesis.

    @examples(60)
    @given(...)
    def test_x(...): ...

The profile `ci` is the default everywhere: the same examples in every run, so a red lane is red again when it is
repeated. `--hypothesis-profile=nightly` draws others every night, and NIGHTLY_FACTOR times as many.
"""

from __future__ import annotations

from hypothesis import settings

NIGHTLY_FACTOR = 5
_FULL = 100
"""`max_examples` of the profile `ci`: what the counts of `examples` are relative to."""


def register_profiles() -> None:
    """Make `ci` the profile of this process; pytest's option `--hypothesis-profile` loads another one afterwards."""
    # A deadline for one example would measure how busy the machine is.
    settings.register_profile("ci", derandomize=True, deadline=None, max_examples=_FULL)
    settings.register_profile(
        "nightly", derandomize=False, deadline=None, max_examples=_FULL * NIGHTLY_FACTOR, print_blob=True
    )
    settings.load_profile("ci")


def examples(count: int) -> settings:
    """`count` examples under `ci`, and as many more as another profile has."""
    return settings(max_examples=max(1, count * settings().max_examples // _FULL))
