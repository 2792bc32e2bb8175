"""How many children the living paths of a level get: TreePO's branching budget transfer.

At the end of a level a tree has A living paths, F finished ones (f of them finished in this level) and may
have w leaves in all. With branch factor N the level's budget is (paper section 2.2, "budget transfer")

    total = max(A, min(w - F, N * (A + f)))

so the branches of paths that stopped go to their living siblings, and a tree never promises more than w
leaves. By induction A <= w - F always holds, hence no living path is ever dropped and no leaf is too many.

The total is split equally. What does not divide evenly goes to paths drawn by the tree's own generator, not
to the last ones in the list: a fixed choice would favour paths for their position.
"""

from __future__ import annotations

import random


def level_budget(active: int, finished: int, just_finished: int, width: int, branch_factor: int) -> int:
    """Children to make after a level: `active` = A, `finished` = F (with this level's), `just_finished` = f.

    Raises ValueError when the paths alive and finished are already more than `width`.
    """
    if active + finished > width:
        raise ValueError(f"{active} living + {finished} finished paths exceed the width {width}")
    return max(active, min(width - finished, branch_factor * (active + just_finished)))


def split_equally(total: int, paths: int, rng: random.Random) -> list[int]:
    """`total` children over `paths` paths, at least one each, differing by at most one.

    The paths must come in path order: then `rng` makes the same choice whatever order segments arrived in.
    Raises ValueError when `total < paths`.
    """
    if total < paths:
        raise ValueError(f"{total} children cannot give each of {paths} paths one")
    base, extra = divmod(total, paths) if paths else (0, 0)
    lucky = set(rng.sample(range(paths), extra))
    return [base + (i in lucky) for i in range(paths)]
