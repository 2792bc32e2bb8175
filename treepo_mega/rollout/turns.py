"""Asks environments on behalf of the trees in flight: tools while paths grow, rewards when a tree is complete.

    agent = Agent(environment, cfg, tokenizer, eos_token_ids)      # proves the chat template, once a run
    turns = TurnsInFlight(agent)                                   # once a rollout
    turns.begin(rank, prompt, seed)
    turns.ask(rank, tree, node_id)                   # a turn has ended: read its calls, and make them
    for answered in turns.poll(): ...                # what tools answered, by tree and node
    turns.grade(rank, tree)                          # a tree is complete: what its leaves earned
    for rank, rewards in turns.take_graded(): ...

Nothing here blocks but `wait`. While tools run, the engine goes on with all other paths.

States. A tree's first state is opened when it is first needed. A turn acts on a copy of the state behind the last
observation above it, and the copy becomes the state behind the new observation. So siblings never share one, and a
fallback can branch behind any observation of the tree. States are freed when the tree has its rewards. How a copy is
made, and when a state is rebuilt, is the pool's matter (`environment/pool.py`).

Determinism. What a tool draws is seeded by the run, the prompt and the path of the turn. So trees are the same in any
order of answers, on any number of ranks, and after a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from treepo_mega.config import Config
from treepo_mega.data.dialogue import Dialogue
from treepo_mega.engine.tool_calls import Malformed, ToolCallReader
from treepo_mega.environment import Reply, State, ToolCall
from treepo_mega.environment.setup import Environment
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.text.tokenizer import Tokenizer
from treepo_mega.tree.node import Tree
from treepo_mega.tree.stop import TurnRules

if TYPE_CHECKING:
    from treepo_mega.data.prompts import Prompt

Path = tuple[int, ...]

COUNTS = ("tool_calls", "tool_errors")
"""What is counted in a tree's `counts`: calls, and those that were answered with an error."""

SUMS = ("env_answers", "env_s", "env_wait_s", "env_copies", "env_replays", "env_restarts", "env_lost")
"""What is counted over a rollout: turns that tools answered, and their seconds from call to answer; seconds in which
the engine had nothing else to do; and what became of states and workers."""

OF_POOL = ("copies", "replays", "restarts", "lost")


class Agent:
    """What turns need that is the same for a whole run: the environment, and how calls and answers are written."""

    def __init__(
        self, environment: Environment, cfg: Config, tokenizer: Tokenizer, eos_token_ids: Sequence[int]
    ) -> None:
        """Raises DialogueError and ToolParserError for a chat template and a parser that cannot be used."""
        settings = cfg.environment
        self.environment = environment
        self.rules = TurnRules(settings.max_turns, settings.max_observation_len)
        self.dialogue = Dialogue(tokenizer, cfg.data, environment.tools, eos_token_ids, history=settings.history)
        self.reader = ToolCallReader(settings.tool_parser, tokenizer, environment.tools)
        # Calls may be written in special tokens, which the text for graders leaves out; the mark of the end is no part.
        self._tokenizer = tokenizer
        self._ends = frozenset(eos_token_ids)

    def calls(self, turn: Sequence[int]) -> list[ToolCall | Malformed]:
        """The calls of a turn's tokens, in order; none when the turn is the last."""
        tokens = [token for token in turn if token not in self._ends]
        return self.reader.read(self._tokenizer.decode(tokens, skip_special_tokens=False))


@dataclass(frozen=True, slots=True)
class Answered:
    """What came of a turn: the `tokens` of the observation, or that the trajectory is lost."""

    rank: int
    node_id: int
    tokens: list[int] | None
    lost: bool = False


@dataclass(slots=True)
class _Turn:
    """A turn that waits for its tools. `said`: None where a call is made, else what is answered in its place."""

    rank: int
    tree: Tree
    node_id: int
    seed: int
    calls: list[ToolCall]
    said: list[str | None]
    state: State | None = None


@dataclass(slots=True)
class _Episode:
    """The states of one tree, by the path of the observation that they stand behind; () is the first one."""

    rank: int
    prompt: Prompt
    seed: int
    states: dict[Path, State] = field(default_factory=dict)
    opening: int | None = None
    """The ticket of the first state, while its reset is not answered."""
    failed: str | None = None
    """Why the first state cannot be had."""
    wanting: list[Callable[[], None]] = field(default_factory=list)
    """What waits for the first state."""
    missing: int = 0
    rewards: dict[int, float | str] | None = None
    """Leaf -> its reward, or why it has none; None until they are asked for."""


class TurnsInFlight:
    """The turns of one rollout on one engine. See the module docstring."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.counts: dict[str, float] = dict.fromkeys(SUMS, 0.0)
        self._pool = agent.environment.pool
        self._before = dict(self._pool.counts)
        self._episodes: dict[int, _Episode] = {}
        self._turns: dict[int, _Turn] = {}
        self._openings: dict[int, int] = {}
        self._gradings: dict[int, tuple[int, list[int]]] = {}
        self._answered: list[Answered] = []
        self._graded: list[int] = []

    @property
    def waiting(self) -> bool:
        """Whether anything is asked that is not answered, or answered and not taken."""
        return bool(self._turns or self._openings or self._gradings or self._answered or self._graded)

    def begin(self, rank: int, prompt: Prompt, seed: int) -> None:
        """A tree begins; nothing is opened yet. `seed`: of the tree."""
        self._episodes[rank] = _Episode(rank, prompt, seed)

    def ask(self, rank: int, tree: Tree, node_id: int) -> bool:
        """Read the calls of the turn that ended at `node_id`, and make them. False: it has none, and is the last."""
        node = tree.nodes[node_id]
        read = self.agent.calls(tree.turn(node_id))
        if not read:
            return False
        said = [f"Error: {call.reason}" if isinstance(call, Malformed) else None for call in read]
        calls = [call for call in read if isinstance(call, ToolCall)]
        tree.counts["tool_calls"] += len(read)
        tree.counts["tool_errors"] += len(read) - len(calls)
        episode = self._episodes[rank]
        seed = derive_seed(episode.seed, "tools", *node.path)
        turn = _Turn(rank, tree, node_id, seed, calls, said)
        if calls:
            self._with_first_state(episode, lambda: self._act(turn))
        else:
            self._answer(turn, [])
        return True

    def grade(self, rank: int, tree: Tree) -> None:
        """Ask what the leaves of a complete tree earned; `take_graded` names it when all have answered.

        Without get_reward there is nothing to ask, and its states are freed at once.
        """
        episode = self._episodes[rank]
        episode.rewards = {leaf: "the environment lost it" for leaf in tree.leaves if tree.nodes[leaf].stop == "lost"}
        asked = [leaf for leaf in tree.leaves if leaf not in episode.rewards]
        if asked and self.agent.environment.manifest.has_reward:
            self._with_first_state(episode, lambda: self._grade(episode, tree, asked))
        else:
            self._graded.append(rank)

    def take_graded(self) -> list[tuple[int, dict[int, float | str]]]:
        """(rank, leaf -> reward or the reason why there is none) of trees whose leaves are all graded; each once."""
        graded = self._graded
        self._graded = []
        out = []
        for rank in graded:
            episode = self._episodes.pop(rank)
            for state in episode.states.values():
                self._pool.free(state)
            assert episode.rewards is not None
            out.append((rank, episode.rewards))
        return out

    def poll(self) -> list[Answered]:
        """What has been answered since the last call. Raises EnvironmentClassError for a class that cannot be used."""
        self._take(self._pool.poll())
        return self._hand_over()

    def wait(self) -> list[Answered]:
        """As `poll`, once something is answered; the deadlines of calls bound the time."""
        if not (self._answered or self._graded):
            self._take(self._pool.wait_any())
        return self._hand_over()

    def sums(self) -> dict[str, float]:
        """SUMS of this rollout; additive over engines."""
        for name in OF_POOL:
            self.counts[f"env_{name}"] = self._pool.counts[name] - self._before[name]
        return dict(self.counts)

    def end(self) -> None:
        """Free the states of trees that did not come to their end: after an error."""
        for episode in self._episodes.values():
            for state in episode.states.values():
                self._pool.free(state)
        self._pool.wait()

    def _with_first_state(self, episode: _Episode, act: Callable[[], None]) -> None:
        """Call `act` once the tree's first state can be used, or cannot be had."""
        if () in episode.states and episode.opening is None:
            act()
            return
        episode.wanting.append(act)
        if episode.opening is None:
            state, ticket = self.agent.environment.open(episode.prompt.row or {}, episode.prompt.id)
            episode.states[()] = state
            episode.opening = ticket
            self._openings[ticket] = episode.rank

    def _act(self, turn: _Turn) -> None:
        episode = self._episodes[turn.rank]
        if episode.failed is not None:
            self._answered.append(Answered(turn.rank, turn.node_id, None, lost=True))
            return
        turn.state = self._pool.branch(episode.states[_behind(episode, turn.tree, turn.node_id)])
        self._turns[self._pool.act(turn.state, turn.calls, seed=turn.seed)] = turn

    def _grade(self, episode: _Episode, tree: Tree, leaves: list[int]) -> None:
        assert episode.rewards is not None
        if episode.failed is not None:
            episode.rewards |= dict.fromkeys(leaves, episode.failed)
            self._graded.append(episode.rank)
            return
        by_state: dict[Path, list[int]] = {}
        for leaf in leaves:
            by_state.setdefault(_behind(episode, tree, leaf), []).append(leaf)
        episode.missing = len(by_state)
        for base, earned in by_state.items():
            seed = derive_seed(episode.seed, "reward", *base)
            self._gradings[self._pool.grade(episode.states[base], seed=seed)] = (episode.rank, earned)

    def _set_rewards(self, rank: int, leaves: list[int], reward: float | str) -> None:
        episode = self._episodes[rank]
        assert episode.rewards is not None
        episode.rewards |= dict.fromkeys(leaves, reward)
        episode.missing -= 1
        if not episode.missing:
            self._graded.append(rank)

    def _take(self, replies: dict[int, Reply]) -> None:
        for ticket, reply in replies.items():
            if ticket in self._openings:
                self._opened(self._openings.pop(ticket), reply)
            elif ticket in self._gradings:
                rank, leaves = self._gradings.pop(ticket)
                score = reply.score
                self._set_rewards(rank, leaves, score if score is not None else str(reply.error))
            else:
                self._acted(self._turns.pop(ticket), reply)

    def _opened(self, rank: int, reply: Reply) -> None:
        episode = self._episodes[rank]
        episode.opening = None
        if reply.lost:
            episode.failed = str(reply.error)
        elif reply.text != episode.prompt.opening:
            episode.failed = (
                f"reset returned {reply.text!r:.60} where it returned {episode.prompt.opening!r:.60} at the start: "
                "draw from `random` or numpy.random, which are seeded"
            )
        waiting = episode.wanting
        episode.wanting = []
        for act in waiting:
            act()

    def _acted(self, turn: _Turn, reply: Reply) -> None:
        self.counts["env_answers"] += 1
        self.counts["env_s"] += reply.seconds
        turn.tree.counts["tool_errors"] += reply.failed_calls
        assert turn.state is not None
        # By the path that the observation below the turn will have.
        self._episodes[turn.rank].states[*turn.tree.nodes[turn.node_id].path, 0] = turn.state
        if reply.lost:
            self._answered.append(Answered(turn.rank, turn.node_id, None, lost=True))
        else:
            self._answer(turn, reply.texts)

    def _answer(self, turn: _Turn, texts: Sequence[str]) -> None:
        made = iter(texts)
        every = [next(made) if said is None else said for said in turn.said]
        tokens = self.agent.dialogue.answer(every)
        self._answered.append(Answered(turn.rank, turn.node_id, tokens))

    def _hand_over(self) -> list[Answered]:
        answered = self._answered
        self._answered = []
        return answered


def _behind(episode: _Episode, tree: Tree, node_id: int) -> Path:
    """The key of the state that the path of a node has come to.

    Observations that no tool made have no state of their own. A leaf whose observation was too long has one.
    """
    path = tree.nodes[node_id].path
    keys = [(*path, 0), *(path[:size] for size in range(len(path), 0, -1))]
    return next((key for key in keys if key in episode.states), ())
