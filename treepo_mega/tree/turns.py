"""Turns of a tree's paths: which of them wait for what an environment answers. Pure.

An end-of-sequence token ends a turn and not the path, as long as the environment may be asked. What it answers becomes
a node without loss below the turn (`Node.observation`), and the path goes on below that.

    turns.ends(tree, node)                  # asked when a segment has arrived
    for node_id in turns.take_ended(): ...  # the driver asks the environment
    turns.answer(tree, node_id, tokens)     # and says what came of it

A budget that looks at the next token (`rollout.peek`) cannot see it with the turn: what comes next stands behind the
answer. So one token is wanted there, of which the law alone is kept (`look`).
"""

from __future__ import annotations

from treepo_mega.tree.history import Observation
from treepo_mega.tree.node import Node, Tree
from treepo_mega.tree.stop import StopRules, TurnRules, Verdict
from treepo_mega.tree.wants import Segment, Want

TURN_COUNTS = ("turns", "observation_tokens", "hidden_tokens", "restated_tokens")
"""Names in `tree.counts` where an environment answers."""


class Turns:
    """The turns of one tree. `rules` None: there is no environment, and no turn ever waits."""

    def __init__(self, rules: TurnRules | None, stop: StopRules) -> None:
        self._rules = rules
        self._stop = stop
        self.unanswered: set[int] = set()
        """Nodes whose turn has ended and whose answer has not come."""
        self._ended: list[int] = []

    @property
    def counts(self) -> tuple[str, ...]:
        """Names of what is counted."""
        return TURN_COUNTS if self._rules else ()

    def judge(self, tree: Tree, node: Node, segment: Segment) -> Verdict:
        """What becomes of the segment of `node`. Text is looked for in the present turn, and room is that of all."""
        turn = tree.turn(node.parent)
        earlier = tree.response_length(node.parent) - len(turn)
        return self._stop.judge(turn, segment.tokens, tree.sampled_depth(node.id), earlier)

    def ends(self, tree: Tree, node: Node) -> bool:
        """Whether the environment is asked how the path of `node` goes on, whose segment has just arrived.

        If so, the path has not ended. It is not asked where the answer could not be used: no room or no depth is left.
        """
        if self._rules is None or node.stop != "eos":
            return False
        room = self._stop.max_response_len - tree.response_length(node.id)
        deeper = tree.sampled_depth(node.id) < self._stop.max_depth
        if room <= 0 or not deeper or tree.turns(node.id) >= self._rules.max_turns:
            return False
        node.stop = None
        self.unanswered.add(node.id)
        self._ended.append(node.id)
        return True

    def take_ended(self) -> list[int]:
        """Nodes that ended a turn since the last call."""
        ended = self._ended
        self._ended = []
        return ended

    def answer(self, tree: Tree, node_id: int, observation: Observation | None, *, lost: bool) -> Node:
        """The node of the turn, with the observation below it or with its stop reason.

        Raises ValueError for a node that waits for no answer, and for an empty observation.
        """
        where = f"prompt {tree.prompt_id!r}, node {node_id}"
        if self._rules is None or node_id not in self.unanswered:
            raise ValueError(f"{where}: no observation is waited for, only at {sorted(self.unanswered)}")
        if observation is not None and not observation.tokens:
            raise ValueError(f"{where}: an observation has at least one token")
        self.unanswered.remove(node_id)
        node = tree.nodes[node_id]
        if lost:
            node.stop = "lost"
        elif observation is None:
            node.stop = "eos"
        elif _tokens_not_sampled(tree, node_id, observation) > self._rules.max_observation_len:
            node.stop = "context"
        else:
            hidden = observation.hidden
            tree.observe(node_id, list(observation.tokens), hidden=hidden, restated=observation.restated)
            tree.counts["turns"] += 1
            tree.counts["observation_tokens"] += len(observation.tokens) - observation.restated
            tree.counts["hidden_tokens"] += hidden
            tree.counts["restated_tokens"] += observation.restated
        if node.stop is not None:
            tree.leaves.append(node_id)
        return node


def _tokens_not_sampled(tree: Tree, node_id: int, observation: Observation) -> int:
    """Tokens of observations behind the turn of a node: what tools said, or more if the context has more of them."""
    said = tree.observed_length(node_id) + len(observation.tokens) - observation.restated
    if not observation.hidden:
        return said
    # The engine's window has room for so many beside the prompt and all sampled tokens, whichever are seen.
    context = len(tree.prefix(node_id)) - observation.hidden + len(observation.tokens)
    return max(said, context - len(tree.prompt_tokens) - tree.response_length(node_id))


def look(tree: Tree, turn: Node, likeliest: int, seed: int) -> Want:
    """One token after the observation below `turn`, for the logprobs of the `likeliest` ones in its place."""
    observation = tree.below(turn.id)
    return Want(observation, tree.prefix(observation), 1, seed, top=likeliest)


def looked(tree: Tree, observation: Node, law: Segment) -> Node:
    """The turn above `observation`, which knows now what may come next; the drawn token is dropped.

    Raises ValueError when the driver did not bring the likeliest tokens.
    """
    if not law.top:
        raise ValueError(f"node {observation.id}: a look behind an observation needs the likeliest tokens, got none")
    turn = tree.nodes[observation.parent]
    turn.peek = [logprob for _, logprob in law.top]
    tree.counts["peeked_tokens"] += 1
    return turn
