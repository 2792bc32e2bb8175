"""Who samples which prompt: dealt to engines by expected cost, stolen when one runs dry.

    costs = CostModel();  deal = deal_by_cost([costs.expected(p) for p in prompts], engines)
    queue = LocalQueue(range(len(prompts)))                      # one engine, or no sharing
    queue = SharedQueue(store, "step 7", deal, costs, engine)    # engines over a torch.distributed store
    while (i := queue.take(dry=nothing_runs)) is not None: ...   # index of the next prompt to begin

Lengths are not known before they are sampled. A tree's cost is expected to be that of the last tree of the same
prompt, else the running mean of its data source, plus its prompt. A wrong guess costs time, never a sample: trees do
not depend on where they grow.

An engine takes from its own list until that is empty. When all it began is finished too, it is dry, and takes from
the list with the most left. A tree that was begun is not moved: its prefix cache is where it is. What goes on after an
earlier step or round is *pinned* to the engine that alone has its tokens: it comes first there, and is on no list.

Prompts that begin in place of trees without signal (`refill.py`) are on no list. The k-th tree without signal of all
engines says which position begins, and the engine on which it ended takes it before its list, which others can take
from. k comes from a counter of the store: nobody polls, and no two engines get one position.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol

from treepo_mega.errors import RankLost
from treepo_mega.rollout.refill import RefillRule
from treepo_mega.runtime.balance import balance
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.node import Tree

if TYPE_CHECKING:
    from treepo_mega.data.prompts import Prompt

MEMORY = 0.8
"""Share of the old value in a source's running mean."""


class DealingTimeout(RankLost):
    """A rank waited for its engine's first rank to take a prompt; the message says which, and how long."""


class CostModel:
    """Expected tokens of a tree: its prompt and its unique response tokens. Ranks that see all trees agree on it."""

    def __init__(self) -> None:
        self._by_prompt: dict[str, float] = {}
        self._by_source: dict[str, float] = {}

    def update(self, prompts: Sequence[Prompt], trees: Sequence[Tree]) -> None:
        """Learn from finished trees, in the order of their prompts."""
        self.learn(prompts, [tree.unique_tokens() for tree in trees])

    def learn(self, prompts: Sequence[Prompt], tokens: Sequence[float]) -> None:
        """Learn from the unique response tokens of finished trees, in the order of their prompts."""
        for prompt, seen in zip(prompts, map(float, tokens), strict=True):
            self._by_prompt[_name(prompt)] = seen
            old = self._by_source.get(prompt.data_source, seen)
            self._by_source[prompt.data_source] = MEMORY * old + (1 - MEMORY) * seen

    def expected(self, prompt: Prompt) -> float:
        """Tokens; only their order and rough proportion matter."""
        mean = self._by_source.get(prompt.data_source, 0.0)
        return len(prompt.tokens) + self._by_prompt.get(_name(prompt), mean)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """What it has learnt, JSON-safe: a resumed run deals as the uninterrupted one would."""
        return {"prompts": dict(self._by_prompt), "sources": dict(self._by_source)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """The inverse of `state_dict`."""
        self._by_prompt = dict(state["prompts"])
        self._by_source = dict(state["sources"])


def _name(prompt: Prompt) -> str:
    """The same for the same tokens, in every epoch (ids differ) and every process."""
    return f"{derive_seed(*prompt.tokens):x}"


def deal_by_cost(
    costs: Sequence[float], engines: int, pinned: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """Indices for each engine, most expensive first: each goes to the engine with the least so far (LPT).

    `pinned`: indices that each engine has already (`deal_to`), which are not dealt again.

    >>> deal_by_cost([5.0, 1.0, 9.0], 2), deal_by_cost([5.0, 1.0, 9.0], 2, [[], [2]])
    ([[2], [0, 1]], [[0, 1], []])
    """
    held = pinned or [[] for _ in range(engines)]
    taken = {index for own in held for index in own}
    free = [index for index in range(len(costs)) if index not in taken]
    dealt = balance([costs[index] for index in free], engines, [sum(costs[index] for index in own) for own in held])
    # Longest first: a long tree begun last is a tail that every other engine waits for.
    return [sorted((free[i] for i in part), key=lambda index: (-costs[index], index)) for part in dealt]


def deal_to(engine_of: Sequence[int | None], costs: Sequence[float], engines: int) -> list[list[int]]:
    """Indices for each engine, most expensive first: `engine_of[i]` gets i, for what it has of it; None: nobody.

    >>> deal_to([1, 0, None, 1], [5.0, 1.0, 7.0, 9.0], 2)
    [[1], [3, 0]]
    """
    by_cost = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
    return [[index for index in by_cost if engine_of[index] == engine] for engine in range(engines)]


News = Literal["begin", "end", "late"]
BEGIN: News = "begin"
"""A prompt begins: `take` hands it out."""
END: News = "end"
"""Nothing more begins on this engine."""
LATE: News = "late"
"""The deadline has passed while graders had trees that might be replaced."""


class Queue(Protocol):
    """Hands out prompts to begin. `stolen`: how many of them were dealt to another engine."""

    stolen: int

    def take(self, dry: bool = False) -> int | None:
        """Index of the next prompt; None when there are no more of this engine's, or, when it is `dry`, of anyone's."""
        ...

    def no_signal(self) -> None:
        """A tree that ended on this engine has no signal. To be told to the queue of the engine's first rank alone."""
        ...

    def more(self, settle: Callable[[], bool], late: Callable[[], bool]) -> News:
        """What comes after all that this engine took has ended; asked for by all its ranks.

        The first rank calls `settle`, which waits for graders, until a prompt begins, nothing is left to wait for
        (`settle` returns False), or it is `late`.
        """
        ...

    def deadline_passed(self, passed: bool) -> bool:
        """What the engine's first rank says of its own `passed`. The ranks of an engine ask at the same steps."""
        ...

    @property
    def leads(self) -> bool:
        """Whether this is the engine's first rank."""
        ...

    def agree(self, own: Any, what: str) -> Any:
        """`own` of the engine's first rank, a JSON value. The ranks of an engine ask at the same steps.

        `what` it is to do, for the message about a rank that does not.
        """
        ...


DEADLINE_STEPS = 16
"""Engine steps between two words of an engine's first rank about the deadline, and about prompts that begin."""

WORDS_A_BLOCK = 16
"""Words of a first rank between two moments at which it makes sure that its engine's other ranks have read older ones.
At most two blocks stay in the store."""


class LocalQueue:
    """All of `order`, one after the other, and what `rule` begins in place of trees without signal."""

    def __init__(self, order: Sequence[int], rule: RefillRule | None = None) -> None:
        self._rest = iter(order)
        self._rule = rule
        self._empty = 0
        self._granted: deque[int] = deque()
        self.stolen = 0

    def take(self, dry: bool = False) -> int | None:
        """A prompt that replaces another, else the next of `order`."""
        return self._granted.popleft() if self._granted else next(self._rest, None)

    def no_signal(self) -> None:
        """Count it; a prompt may begin."""
        self._empty += 1
        position = None if self._rule is None else self._rule.replaces(self._empty)
        if position is not None:
            self._granted.append(position)

    def more(self, settle: Callable[[], bool], late: Callable[[], bool]) -> News:
        """Wait for graders until a prompt begins, or none can."""
        if self._rule is None or not self._rule.may_replace:
            return END
        return await_news(self._granted, settle, late)

    def deadline_passed(self, passed: bool) -> bool:
        """`passed`: this process has the engine for itself."""
        return passed

    @property
    def leads(self) -> bool:
        """This process has the engine for itself."""
        return True

    def agree(self, own: Any, what: str) -> Any:
        """`own`."""
        return own


def await_news(granted: Sequence[int], settle: Callable[[], bool], late: Callable[[], bool]) -> News:
    """`settle` until there is something in `granted`; see `Queue.more`."""
    while not granted:
        if not settle():
            return END
        if not granted and late():
            return LATE
    return BEGIN


class Store(Protocol):
    """What of torch.distributed's stores is used (a PrefixStore over the launcher's TCPStore)."""

    def add(self, key: str, amount: int) -> int: ...
    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def delete_key(self, key: str) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...


class SharedQueue:
    """One engine's view of the lists of all engines; see the module docstring.

    `name` must be new for every rollout; `rank` is this process's among the `ranks` that share the engine. `rule`: what
    begins in place of trees without signal. `pinned`: what this engine begins first, and no other may take.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        deal: Sequence[Sequence[int]],
        costs: Sequence[float],
        engine: int,
        *,
        rule: RefillRule | None = None,
        pinned: Sequence[int] = (),
        rank: int = 0,
        ranks: int = 1,
        timeout_s: float = 600.0,
    ) -> None:
        self._store = store
        self._name = name
        self._deal = deal
        self._costs = costs
        self._engine = engine
        self._rule = rule
        self._rank = rank
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._taken = 0
        self._asked = 0
        self._words = 0
        self._own_done = not deal[engine]
        self._all_done = False
        # Positions that begin on this engine; `staged`: its other ranks do not know of them yet.
        self._granted: deque[int] = deque(pinned)
        self._staged: list[int] = []
        self._left = [self._remaining(owner, 0) for owner in range(len(deal))]
        self.stolen = 0
        """Prompts that this engine took from others' lists."""

    def take(self, dry: bool = False) -> int | None:
        """The next prompt: one that is pinned here or replaces another, else of this engine's list.

        Once that is empty and it is `dry`, of the list with the most left.

        Raises DealingTimeout when the engine's first rank does not say in time what it took.
        """
        # Before the engine's own list: of that others can take what this engine has no room for.
        if self._granted:
            return self._granted.popleft()
        # An engine that is still busy steals nothing: its neighbour may only be a little late.
        if self._all_done or (self._own_done and not dry):
            return None
        key = f"{self._name}/engine {self._engine}/{self._taken}"
        self._taken += 1
        # Ranks that share an engine must make the same moves: one takes and writes it down, the others read that.
        found = self._claim(key) if self._rank == 0 else self._hear(key)
        if found is None:
            self._all_done = self._own_done
            self._own_done = True
        return found

    def no_signal(self) -> None:
        """Count it among those of all engines; a prompt may begin on this one."""
        if self._rule is None:
            return
        # `add` is atomic in the store: each number is got once, so each position begins once.
        position = self._rule.replaces(self._store.add(f"{self._name}/without signal", 1))
        if position is None:
            return
        if self._ranks == 1:
            self._granted.append(position)
        else:
            self._staged.append(position)

    def more(self, settle: Callable[[], bool], late: Callable[[], bool]) -> News:
        """What the engine's first rank finds, once graders have told it.

        Raises DealingTimeout when it says nothing in time.
        """
        if self._rule is None or not self._rule.may_replace:
            return END
        if self._ranks == 1:
            return await_news(self._granted, settle, late)
        # Ranks that share an engine must make the same moves: the first one alone knows what graders say.
        news = await_news(self._staged, settle, late) if self._rank == 0 else END
        return self._word(news, "say what its graders found")

    def deadline_passed(self, passed: bool) -> bool:
        """What the engine's first rank says, in every DEADLINE_STEPS-th call; False in the others.

        With its word come the prompts that begin in place of others. Raises DealingTimeout when the first rank says
        nothing in time.
        """
        if self._ranks == 1:
            return passed
        # A rank that left on its own clock would leave the others in a collective of the engine's next step.
        between = self._asked % DEADLINE_STEPS
        self._asked += 1
        if between:
            return False
        return self._word(LATE if passed else BEGIN, "say whether the deadline has passed") == LATE

    @property
    def leads(self) -> bool:
        """Whether this is the engine's first rank."""
        return self._rank == 0

    def agree(self, own: Any, what: str) -> Any:
        """`own` of the engine's first rank. Raises DealingTimeout when it says nothing in time."""
        if self._ranks == 1:
            return own
        key = f"{self._name}/engine {self._engine}/word {{}}"
        read = f"{self._name}/engine {self._engine}/read {{}}"
        number = self._words
        block, place = divmod(number, WORDS_A_BLOCK)
        self._words += 1
        if self.leads:
            if place == 0 and block >= 2:
                self._forget(key, read, block - 2)
            self._store.set(key.format(number), json.dumps(own))
            return own
        said = json.loads(self._told(key.format(number), what))
        # The last of them to come to the end of a block tells the first rank.
        is_end = place == WORDS_A_BLOCK - 1
        if is_end and self._store.add(read.format(f"{block}, ranks"), 1) == self._ranks - 1:
            self._store.set(read.format(block), "all")
        return said

    def _forget(self, key: str, read: str, block: int) -> None:
        """Delete a block of words, once all ranks have read it. Raises DealingTimeout where one does not."""
        # While tools run there is no step of the engine that keeps its ranks together.
        self._told(read.format(block), "read older words")
        for number in range(block * WORDS_A_BLOCK, (block + 1) * WORDS_A_BLOCK):
            self._store.delete_key(key.format(number))
        self._store.delete_key(read.format(block))
        self._store.delete_key(read.format(f"{block}, ranks"))

    def _word(self, news: News, what: str) -> News:
        """What the engine's first rank says, and which prompts begin with it; all its ranks ask in the same order."""
        news, begin = self.agree([news, self._staged], what)
        self._granted.extend(begin)
        self._staged = []
        return news

    def _claim(self, key: str) -> int | None:
        """Take, and tell the other ranks of the engine."""
        found = self._steal() if self._own_done else self._advance(self._engine)
        if self._ranks > 1:
            self._store.set(key, "none" if found is None else str(found))
        return found

    def _hear(self, key: str) -> int | None:
        """What the engine's first rank took."""
        text = self._told(key, "take a prompt")
        return None if text == "none" else int(text)

    def _told(self, key: str, what: str) -> str:
        """What another rank of the engine set `key` to."""
        who = "its other ranks" if self.leads else "its first rank"
        try:
            self._store.wait([key], timedelta(seconds=self._timeout_s))
        except RuntimeError as e:
            raise DealingTimeout(
                f"engine {self._engine} waited {self._timeout_s:.0f} s for {who} to {what} ({key}): {e}"
                "; look at the log of such a rank, or raise rollout.timeout_s"
            ) from e
        return self._store.get(key).decode()

    def _advance(self, owner: int) -> int | None:
        """The next of `owner`'s list; None when it has none any more."""
        # `add` is atomic in the store: no two engines get one position, and none waits for another.
        position = self._store.add(f"{self._name}/list {owner}", 1) - 1
        self._left[owner] = self._remaining(owner, position + 1)
        return self._deal[owner][position] if position < len(self._deal[owner]) else None

    def _steal(self) -> int | None:
        # The list's next prompt: the longest that nobody has begun. Its owner may take it first; then look again.
        while (victim := self._richest()) is not None:
            found = self._advance(victim)
            if found is not None:
                self.stolen += 1
                return found
        return None

    def _richest(self) -> int | None:
        """The engine with the most expected left; None: nobody has anything."""
        for owner in range(len(self._deal)):
            if self._left[owner] > 0:
                # Adding 0 reads the counter; `get` would wait for a list that nobody has taken from yet.
                self._left[owner] = self._remaining(owner, self._store.add(f"{self._name}/list {owner}", 0))
        rich = max(range(len(self._deal)), key=lambda owner: (self._left[owner], -owner))
        return rich if self._left[rich] > 0 else None

    def _remaining(self, engine: int, position: int) -> float:
        # Plus one a prompt: prompts of unknown cost must still count as work.
        return sum(1.0 + self._costs[i] for i in self._deal[engine][position:])
