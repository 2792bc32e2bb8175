"""Asks environments on behalf of the trees in flight: tools while paths grow, rewards when a tree is complete.

    agent = Agent(environment, cfg, tokenizer, eos_token_ids)      # proves the chat template, once a run
    turns = TurnsInFlight(agent)                                   # once a rollout
    turns.begin(rank, prompt, seed, tree)
    turns.ask(rank, tree, node_id)                   # a turn has ended: read its calls, and make them
    for answered in turns.poll(): ...                # what tools answered, by tree and node
    turns.grade(rank, tree, leaves)                  # a tree is complete: what these leaves earned
    for rank, rewards in turns.take_graded(): ...

Nothing here blocks but `wait`. While tools run, the engine goes on with all other paths.

States. A tree's first state is opened when it is first needed. A turn acts on a copy of the state behind the last
observation above it, and the copy becomes the state behind the new observation. So siblings never share one, and a
fallback or a fork can branch behind any observation of the tree. States are freed when the tree has its rewards, or
waits for another step. How a copy is made, and when a state is rebuilt, is the pool's matter (`environment/pool.py`).

Trees that go on (`rollout.leaves: adaptive`, `rollout.partial_rollout`, a run that was killed) have turns whose states
are gone. Where one is needed, the calls of its path are made again, and what they answer is compared with the tokens
that the tree has. A replay that differs loses the trajectory, and says where.

Determinism. What a tool draws is seeded by the run, the prompt and the path of the turn. So trees are the same in any
order of answers, on any number of ranks, and after a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from treepo_mega.config import Config
from treepo_mega.data.dialogue import Dialogue, DialogueError
from treepo_mega.engine.tool_calls import Malformed, ToolCallReader
from treepo_mega.environment import Reply, State, ToolCall
from treepo_mega.environment.setup import Environment
from treepo_mega.rollout.episodes import FIRST, Episode, Name, name_of
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.text.tokenizer import Tokenizer
from treepo_mega.tree.history import Observation
from treepo_mega.tree.node import Tree
from treepo_mega.tree.stop import TurnRules

if TYPE_CHECKING:
    from treepo_mega.data.prompts import Prompt

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

    def counted_calls(self, tree: Tree, node_id: int) -> list[ToolCall | Malformed]:
        """The calls of the turn that ended at `node_id`, counted in the tree with those that cannot be read."""
        calls = self.calls(tree.turn(node_id))
        tree.counts["tool_calls"] += len(calls)
        tree.counts["tool_errors"] += sum(isinstance(call, Malformed) for call in calls)
        return calls

    def observation(self, tree: Tree, node_id: int, texts: Sequence[str]) -> Observation:
        """What comes behind the turn that ended at `node_id`, whose tools answered `texts`. Raises DialogueError."""
        if not self.dialogue.rewrites:
            return Observation(self.dialogue.answer(texts))
        behind = self.dialogue.behind(tree.prefix(node_id), tree.turn(node_id), texts)
        return Observation(behind.ids, hidden=behind.hidden, restated=behind.restated)


@dataclass(frozen=True, slots=True)
class Answered:
    """What came of a turn: the observation, or that the trajectory is lost."""

    rank: int
    node_id: int
    observation: Observation | None
    lost: bool = False
    failed_calls: int = 0
    """Calls that were answered with an error; `TurnsInFlight` has counted them."""


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
class _Replay:
    """A turn of an earlier round or step that is made again. `seen`: what the tree has; None: it did not fit."""

    turn: _Turn
    name: Name
    seen: list[int] | None
    state: State


class TurnsInFlight:
    """The turns of one rollout on one engine. See the module docstring."""

    def __init__(self, agent: Agent, *, forks: bool = False) -> None:
        """`forks`: branches start anywhere, so that paths of nodes change (rollout.branching.at)."""
        self.agent = agent
        self._forks = forks
        self.counts: dict[str, float] = dict.fromkeys(SUMS, 0.0)
        self._pool = agent.environment.pool
        self._before = dict(self._pool.counts)
        self._episodes: dict[int, Episode] = {}
        self._turns: dict[int, _Turn] = {}
        self._openings: dict[int, int] = {}
        self._gradings: dict[int, tuple[int, list[int]]] = {}
        self._replays: dict[int, _Replay] = {}
        self._replayed = 0
        self._answered: list[Answered] = []
        self._graded: list[int] = []

    @property
    def waiting(self) -> bool:
        """Whether anything is asked that is not answered, or answered and not taken."""
        asked = self._turns or self._openings or self._gradings or self._replays
        return bool(asked or self._answered or self._graded)

    def begin(self, rank: int, prompt: Prompt, seed: int, tree: Tree) -> None:
        """A tree begins, or goes on; nothing is opened yet. `seed`: of the tree."""
        had_turns = any(node.observation or node.stop == "context" for node in tree.nodes)
        self._episodes[rank] = Episode(rank, prompt, seed, goes_on=had_turns)

    def pause(self, rank: int) -> None:
        """The tree goes on in another step: its states are freed. Nothing of it may be unanswered."""
        for state in self._episodes.pop(rank).states.values():
            self._pool.free(state)

    def ask(self, rank: int, tree: Tree, node_id: int) -> bool:
        """Read the calls of the turn that ended at `node_id`, and make them. False: it has none, and is the last."""
        calls = self.agent.counted_calls(tree, node_id)
        if not calls:
            return False
        episode = self._episodes[rank]
        turn = self._turn_of(episode, tree, node_id, calls)
        if turn.calls:
            self._with_state(episode, tree, node_id, lambda: self._act(turn))
        else:
            episode.stateless.add(name_of(tree, node_id))
            self._answer(turn, [])
        return True

    def grade(self, rank: int, tree: Tree, leaves: Collection[int] | None = None) -> None:
        """Ask what leaves of a complete tree earned; `take_graded` names it when all have answered.

        `leaves`: those that are asked about; None: all. Without get_reward there is nothing to ask, and its states are
        freed at once.
        """
        episode = self._episodes[rank]
        wanted = tree.leaves if leaves is None else leaves
        episode.rewards = {
            leaf: episode.broken.get(name_of(tree, leaf), "the environment lost it")
            for leaf in wanted
            if tree.nodes[leaf].stop == "lost"
        }
        asked = [leaf for leaf in wanted if leaf not in episode.rewards]
        if not asked or not self.agent.environment.manifest.has_reward:
            self._graded.append(rank)
            return
        # All states before the first question: nothing can be replayed from a state that is being asked.
        left = set(asked)

        def found(leaf: int) -> None:
            left.discard(leaf)
            if not left:
                self._grade(episode, tree, asked)

        for leaf in asked:
            self._with_state(episode, tree, leaf, lambda leaf=leaf: found(leaf))  # type: ignore[misc]

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
        return self.counts | {"env_replays": self.counts["env_replays"] + self._replayed}

    def end(self) -> None:
        """Free the states of trees that did not come to their end: after an error."""
        # What is being made is a state like others once it is there.
        self._pool.wait()
        states = [state for episode in self._episodes.values() for state in episode.states.values()]
        states += [turn.state for turn in self._turns.values() if turn.state is not None]
        states += [replay.state for replay in self._replays.values()]
        for state in states:
            self._pool.free(state)
        self._pool.wait()

    def _turn_of(self, episode: Episode, tree: Tree, node_id: int, read: Sequence[ToolCall | Malformed]) -> _Turn:
        """The turn that ended at `node_id`, whose calls were `read` and are not made yet."""
        said = [f"Error: {call.reason}" if isinstance(call, Malformed) else None for call in read]
        path = name_of(tree, node_id) if self._forks else tree.nodes[node_id].path
        seed = derive_seed(episode.seed, "tools", *path)
        return _Turn(episode.rank, tree, node_id, seed, [call for call in read if isinstance(call, ToolCall)], said)

    def _with_state(self, episode: Episode, tree: Tree, node_id: int, act: Callable[[], None]) -> None:
        """Call `act` once the state behind the path of a node can be used, or cannot be had."""
        if FIRST not in episode.states or episode.opening is not None:
            episode.wanting.append(lambda: self._with_state(episode, tree, node_id, act))
            if episode.opening is None:
                state, ticket = self.agent.environment.open(episode.prompt.row or {}, episode.prompt.id)
                episode.states[FIRST] = state
                episode.opening = ticket
                self._openings[ticket] = episode.rank
            return
        gone = episode.first_gone(tree, node_id)
        if gone is None or episode.why_broken(tree, node_id) is not None:
            act()
            return
        self._replay(episode, tree, gone, lambda: self._with_state(episode, tree, node_id, act))

    def _replay(self, episode: Episode, tree: Tree, node_id: int, then: Callable[[], None]) -> None:
        """Make the calls of an earlier turn again, whose path is there up to it; `then` goes on."""
        name = name_of(tree, node_id)
        if name in episode.replaying:
            episode.replaying[name].append(then)
            return
        turn = self._turn_of(episode, tree, node_id, self.agent.calls(tree.turn(node_id)))
        if not turn.calls:
            episode.stateless.add(name)
            then()
            return
        self._replayed += 1
        episode.replaying[name] = [then]
        seen = None if tree.nodes[node_id].stop == "context" else tree.nodes[tree.below(node_id)].tokens
        above = tree.nodes[node_id].parent
        state = self._pool.branch(episode.states[episode.name_behind(tree, above)])
        self._replays[self._pool.act(state, turn.calls, seed=turn.seed)] = _Replay(turn, name, seen, state)

    def _replied_again(self, replay: _Replay, reply: Reply) -> None:
        episode = self._episodes[replay.turn.rank]
        episode.states[replay.name] = replay.state
        if reply.lost:
            episode.broken[replay.name] = f"its calls cannot be made again: {reply.error}"
        elif replay.seen is not None and self._observation(replay.turn, reply.texts).tokens != replay.seen:
            called = ", ".join(call.name for call in replay.turn.calls)
            episode.broken[replay.name] = (
                f"a replay differs: {called} answered otherwise than when turn {replay.name} was sampled, now "
                f"{' | '.join(reply.texts)!r:.80}. Draw random numbers from `random` or numpy.random, which are seeded"
            )
        for then in episode.replaying.pop(replay.name):
            then()

    def _act(self, turn: _Turn) -> None:
        episode = self._episodes[turn.rank]
        broken = episode.why_broken(turn.tree, turn.node_id)
        if broken is not None:
            self._lose(episode, turn, broken)
            return
        turn.state = self._pool.branch(episode.states[episode.name_behind(turn.tree, turn.node_id)])
        self._turns[self._pool.act(turn.state, turn.calls, seed=turn.seed)] = turn

    def _lose(self, episode: Episode, turn: _Turn, why: str, failed_calls: int = 0) -> None:
        episode.broken[name_of(turn.tree, turn.node_id)] = why
        self._answered.append(Answered(turn.rank, turn.node_id, None, lost=True, failed_calls=failed_calls))

    def _grade(self, episode: Episode, tree: Tree, leaves: list[int]) -> None:
        assert episode.rewards is not None
        by_state: dict[Name, list[int]] = {}
        for leaf in leaves:
            broken = episode.why_broken(tree, leaf)
            if broken is not None:
                episode.rewards[leaf] = broken
            else:
                by_state.setdefault(episode.name_behind(tree, leaf), []).append(leaf)
        episode.missing = len(by_state)
        if not by_state:
            self._graded.append(episode.rank)
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
            elif ticket in self._replays:
                self._replied_again(self._replays.pop(ticket), reply)
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
        episode = self._episodes[turn.rank]
        episode.states[name_of(turn.tree, turn.node_id)] = turn.state
        if reply.lost:
            self._lose(episode, turn, str(reply.error), reply.failed_calls)
        else:
            self._answer(turn, reply.texts, reply.failed_calls)

    def _answer(self, turn: _Turn, texts: Sequence[str], failed_calls: int = 0) -> None:
        try:
            observation = self._observation(turn, texts)
        except DialogueError as error:
            # The template is a program, and a turn may hold anything: one that it chokes on is no end of the run.
            self._lose(self._episodes[turn.rank], turn, str(error), failed_calls)
            return
        self._answered.append(Answered(turn.rank, turn.node_id, observation, failed_calls=failed_calls))

    def _observation(self, turn: _Turn, texts: Sequence[str]) -> Observation:
        """What comes behind a turn whose calls answered `texts`; those that could not be read say why."""
        made = iter(texts)
        every = [next(made) if said is None else said for said in turn.said]
        return self.agent.observation(turn.tree, turn.node_id, every)

    def _hand_over(self) -> list[Answered]:
        answered = self._answered
        self._answered = []
        return answered
