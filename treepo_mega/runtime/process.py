"""How a rank's process ends: not after its launcher, and with an exit code that says who can mend it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from treepo_mega.errors import TreepoError
from treepo_mega.runtime import dist
from treepo_mega.runtime.kin import end_with_launcher


def run_and_leave(run: Callable[[], int]) -> None:
    """End this process with what `run` returns. An error on one rank ends it at once; the launcher ends the others.

    Exit codes: 2 after a TreepoError, printed as one message; 1 after anything else, with its traceback.
    """
    code = 1
    end_with_launcher()
    try:
        code = run()
    except TreepoError as error:
        print(f"error (rank {dist.rank()}): {error}", file=sys.stderr, flush=True)
        code = 2
    # Also SystemExit and KeyboardInterrupt: a rank that ends alone would leave others waiting.
    except BaseException:
        traceback.print_exc()
    dist.leave(code)
