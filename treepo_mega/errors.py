"""One root for every error whose message says all that people need, and one way to name the nearest valid name.

    raise ConfigError(f"train.lrr: unknown key{nearest('lrr', known)}")

`treepo_mega.train` and `treepo_mega.evaluate` print a TreepoError as one message and exit with 2. Any other exception
is a defect of ours: it shows where it happened, and the exit code is 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TreepoError(Exception):
    """Something that people can mend: the message names the file, line or key, what was expected, and what to do."""


class RankLost(TreepoError):
    """Other ranks did not come in time or died; the message names them and what was waited for."""


def nearest_name(name: str, known: Iterable[str], *, cutoff: float = 0.4) -> str | None:
    """The known name most like `name`; None if none is like it.

    >>> nearest_name("lerning_rate", ["learning_rate", "seed"])
    'learning_rate'
    """
    return next(iter(difflib.get_close_matches(name, sorted(set(known)), n=1, cutoff=cutoff)), None)


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.4) -> str:
    """` (did you mean 'x'?)` for the known name most like `name`, or nothing if none is like it.

    >>> nearest("lerning_rate", ["learning_rate", "seed"])
    " (did you mean 'learning_rate'?)"
    >>> nearest("zzz", ["learning_rate"])
    ''
    """
    found = nearest_name(name, known, cutoff=cutoff)
    return f" (did you mean {found!r}?)" if found else ""
