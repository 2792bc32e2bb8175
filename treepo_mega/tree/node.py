"""The tree of one prompt: nodes are token segments, leaves are trajectories.

The root is node 0 and holds the prompt. Every other node is one *segment*:
the tokens sampled in one go after its parent's. A *leaf* is a node at which sampling ended; the
root-to-leaf path is one *trajectory* with one reward. A fallback adds children to an earlier node of
a finished path, so a trajectory is always exactly a root-to-leaf path and no token is stored twice.

Nodes are stored in creation order and a parent always comes before its children. `path` (child
indices from the root) names a node independently of creation order, so seeds derived from it do not
depend on which segment finished first.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from treepo_mega.tree.alike import Alike
from treepo_mega.tree.history import context
from treepo_mega.tree.routing import NONE_NOTED, Experts

ROOT = 0

ForkRule = Literal["rank", "threshold"]
"""Why a branch started where it did; `tree/fork.py` explains both rules."""


@dataclass(slots=True)
class Node:
    """One segment. `tokens` and `logprobs` have equal length (the root has no logprobs).

    `logprobs` are the engine's processed logprobs (after temperature) of the sampled tokens, in nats.
    `stop` is None while the path may go on, else the reason it ended (see `tree/stop.py`).
    `peek`: logprobs (nats, descending) of the likeliest tokens to come next, where the budget asked for them.
    `policy_version`: the step whose weights sampled the segment. `level`: one more than its parent's;
    for nodes made by fallback one more than the highest before it.
    `entropies`: of the distribution that each token was drawn from (nats, over its likeliest tokens), where
    `rollout.branching.fork` asks for them; else empty. `fork`: the rule by which this branch started at a fork.
    `weight`: what a descent gives this branch beside its siblings; all alike unless they avoid each other's tokens,
    or one stands for siblings that were cut because they repeat it.
    `observation`: what an environment said, not the policy. Later tokens are conditioned on it, and it is neither
    trained nor counted as response; its logprobs are zeros, and its parent ended a turn.
    `hidden`: tokens of the context before an observation, counted from its end, that a chat template hides from what
    follows; `restated`: its own first tokens, which stand in their place (`tree/history.py`).
    `experts`: those that the engine sent its first tokens to, where `rollout.routing_replay` asks (`tree/routing.py`).
    """

    id: int
    parent: int
    path: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    children: list[int] = field(default_factory=list)
    stop: str | None = None
    fallback: bool = False
    policy_version: int = 0
    peek: list[float] = field(default_factory=list)
    level: int = 0
    entropies: list[float] = field(default_factory=list)
    fork: ForkRule | None = None
    weight: float = 1.0
    observation: bool = False
    experts: Experts = NONE_NOTED
    hidden: int = 0
    restated: int = 0

    @property
    def depth(self) -> int:
        """Segments from the root to this node; the root has depth 0."""
        return len(self.path)


@dataclass(slots=True)
class Tree:
    """All samples of one prompt. `leaves[i]` is a node id and `rewards[i]` its reward, once graded."""

    prompt_id: str
    nodes: list[Node]
    leaves: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    shortfall: str | None = None
    """Why the tree has fewer leaves than asked for; None when it has them all."""
    counts: dict[str, float] = field(default_factory=dict)
    """What sampling this tree cost (generated, cached, recomputed tokens, fallbacks, ...)."""
    verdicts: list[float] = field(default_factory=list)
    """What the verifier said of each leaf before any penalty, in the order of `leaves`, once graded."""
    advantages: list[float] = field(default_factory=list)
    """What the step trains with, once planned: one a leaf, in the order of `leaves`; under `segment` and `rloo` one a
    node. A tree has more nodes than leaves, so the number tells which."""
    alike: Alike | None = field(default=None, compare=False, repr=False)
    """Which of its nodes' parts are equal, where tokens may be elsewhere; no part of `to_dict`."""
    home: int | None = field(default=None, compare=False, repr=False)
    """The rank that holds its contents; None: every rank. No part of `to_dict`."""

    @classmethod
    def start(cls, prompt_id: str, prompt_tokens: list[int]) -> Tree:
        """A tree that holds only its root."""
        return cls(prompt_id, [Node(ROOT, -1, (), list(prompt_tokens))])

    def observe(self, parent: int, tokens: list[int], *, hidden: int = 0, restated: int = 0) -> Node:
        """Append what an environment answered to the turn that ended at node `parent`; `hidden` and `restated`: `Node`.

        Raises ValueError where nothing of the prompt would be seen any more.

        >>> tree = Tree.start("p", [1])
        >>> turn = tree.add_child(0)
        >>> turn.tokens, turn.logprobs = [5, 6], [-0.5, -0.6]
        >>> answer = tree.observe(turn.id, [7, 8, 9])
        >>> tree.prefix(answer.id), tree.response_length(answer.id)
        ([1, 5, 6, 7, 8, 9], 2)
        """
        up = self.nodes[parent]
        if hidden and not context(self, parent, hidden):
            raise ValueError(f"an observation behind node {parent} hides {hidden} tokens, which is all of its context")
        node = self.add_child(parent, policy_version=up.policy_version)
        node.observation = True
        node.hidden = hidden
        node.restated = restated
        node.tokens = list(tokens)
        node.logprobs = [0.0] * len(tokens)
        # Nothing was drawn there: it is as sure as can be, where that is noted.
        node.entropies = [0.0] * len(tokens) if up.entropies else []
        return node

    def add_child(
        self, parent: int, *, fallback: bool = False, policy_version: int = 0, level: int | None = None
    ) -> Node:
        """Append an empty child segment to node `parent` and return it; `level` None: one more than the parent's."""
        up = self.nodes[parent]
        node = Node(
            len(self.nodes),
            parent,
            (*up.path, len(up.children)),
            fallback=fallback,
            policy_version=policy_version,
            level=up.level + 1 if level is None else level,
        )
        up.children.append(node.id)
        self.nodes.append(node)
        return node

    def split(self, node_id: int, offset: int) -> Node:
        """Cut a segment in two before its token `offset`; returns the second part, the only child of the first.

        The first part keeps the id. The second takes over the stop reason, the leaf and the children, and `renumber`
        must follow: it comes after its children. Raises ValueError when a part would be empty or the node is the root.

        >>> tree = Tree.start("p", [1])
        >>> child = tree.add_child(0)
        >>> child.tokens, child.logprobs, tree.leaves = [5, 6, 7], [-0.5, -0.6, -0.7], [1]
        >>> tree.split(1, 2).tokens, child.tokens, tree.leaves, tree.nodes[2].path
        ([7], [5, 6], [2], (0, 0))
        """
        first = self.nodes[node_id]
        if first.observation:
            raise ValueError(f"node {node_id} is an observation: no branch starts within it")
        if node_id == ROOT or not 0 < offset < len(first.tokens):
            raise ValueError(f"node {node_id} of {len(first.tokens)} tokens cannot be cut before token {offset}")
        second = replace(
            first,
            id=len(self.nodes),
            parent=node_id,
            path=(*first.path, 0),
            tokens=first.tokens[offset:],
            logprobs=first.logprobs[offset:],
            entropies=first.entropies[offset:],
            experts=first.experts[offset:],
            fork=None,
            weight=1.0,
        )
        first.tokens = first.tokens[:offset]
        first.logprobs = first.logprobs[:offset]
        first.entropies = first.entropies[:offset]
        first.experts = first.experts[:offset]
        first.children = [second.id]
        first.stop = None
        first.peek = []
        self.nodes.append(second)
        self.leaves = [second.id if leaf == node_id else leaf for leaf in self.leaves]
        for child in second.children:
            self.nodes[child].parent = second.id
        # A path names the children on the way, and there is one more now.
        below = list(second.children)
        while below:
            node = self.nodes[below.pop()]
            node.path = (*second.path, *node.path[len(first.path) :])
            below += node.children
        return second

    def noted(self, node_id: int) -> int:
        """Tokens of `prefix(node_id)`, from its first one on, whose experts are noted without a gap."""
        total = 0
        for each, seen in context(self, node_id):
            noted = len(self.nodes[each].experts)
            total += min(noted, seen)
            if noted < seen:
                break
        return total

    def note(self, node_id: int, experts: Experts | None, begin: int) -> None:
        """Note experts, if any, of `prefix(node_id)` from its place `begin` on (prompt included).

        What is noted stays.

        >>> import numpy as np
        >>> tree = Tree.start("p", [1, 2])
        >>> tree.add_child(0).tokens = [5, 6]
        >>> tree.note(1, Experts(np.arange(3, dtype=np.uint8).reshape(3, 1, 1)), 0)
        >>> [node.experts.ids.ravel().tolist() for node in tree.nodes], tree.noted(1)
        ([[0, 1], [2]], 3)
        """
        if experts is None:
            return
        start = 0
        for each, seen in context(self, node_id):
            node = self.nodes[each]
            first = start + len(node.experts) - begin
            end = start + seen - begin
            if 0 <= first < min(end, len(experts)):
                node.experts = node.experts.followed_by(experts[first:end])
            start += seen

    def ancestry(self, node_id: int) -> list[int]:
        """Node ids from the root to `node_id`, both included."""
        out = []
        while node_id >= 0:
            out.append(node_id)
            node_id = self.nodes[node_id].parent
        return out[::-1]

    def prefix(self, node_id: int) -> list[int]:
        """Prompt and response tokens up to and including `node_id`: what its children are conditioned on.

        What a chat template hides from them is left out (`tree/history.py`).
        """
        return [token for node, seen in context(self, node_id) for token in self.nodes[node].tokens[:seen]]

    def response(self, node_id: int) -> list[int]:
        """What follows the prompt, up to and including `node_id`: sampled tokens, and observations between them."""
        return [token for node in self.ancestry(node_id)[1:] for token in self.nodes[node].tokens]

    def response_length(self, node_id: int) -> int:
        """Sampled tokens up to and including `node_id`, counted; observations are left out."""
        length = 0
        while node_id > ROOT:
            node = self.nodes[node_id]
            if not node.observation:
                length += len(node.tokens)
            node_id = node.parent
        return length

    def observed_length(self, node_id: int) -> int:
        """Tokens of observations up to and including `node_id`, counted; what they restate is left out."""
        above = [self.nodes[node] for node in self.ancestry(node_id)[1:]]
        return sum(len(node.tokens) - node.restated for node in above if node.observation)

    def turn(self, node_id: int) -> list[int]:
        """Sampled tokens since the last observation (or the prompt), up to and including `node_id`."""
        tokens: list[int] = []
        for node in reversed([self.nodes[each] for each in self.ancestry(node_id)[1:]]):
            if node.observation:
                break
            tokens = node.tokens + tokens
        return tokens

    def turns(self, node_id: int) -> int:
        """Observations up to and including `node_id`: turns that the environment has answered."""
        return sum(self.nodes[node].observation for node in self.ancestry(node_id))

    @property
    def prompt_tokens(self) -> list[int]:
        """The prompt's token ids."""
        return self.nodes[ROOT].tokens

    def answered(self, node_id: int) -> bool:
        """Whether a turn ended at `node_id` that the environment has answered: its path goes on after what it said."""
        children = self.nodes[node_id].children
        return len(children) == 1 and self.nodes[children[0]].observation

    def below(self, node_id: int) -> int:
        """Where a path goes on that reached `node_id`: after the observation, if its turn was answered."""
        return self.nodes[node_id].children[0] if self.answered(node_id) else node_id

    def sampled_depth(self, node_id: int) -> int:
        """Sampled segments from the root to this node; observations are left out."""
        return self.nodes[node_id].depth - self.turns(node_id)

    def leaves_below(self) -> dict[int, list[int]]:
        """Node id -> indices into `leaves` of the leaves at or below that node; nodes without one are absent.

        >>> tree = Tree.start("p", [1])
        >>> tree.leaves = [tree.add_child(0).id, tree.add_child(0).id]
        >>> tree.leaves_below()
        {0: [0, 1], 1: [0], 2: [1]}
        """
        below: dict[int, list[int]] = {}
        for index, leaf in enumerate(self.leaves):
            for node in self.ancestry(leaf):
                below.setdefault(node, []).append(index)
        return below

    def only(self, indices: Sequence[int]) -> Tree:
        """The tree with the leaves at these indices alone; nodes are shared, rewards and verdicts are kept in order.

        Advantages go: they were of all leaves.

        >>> tree = Tree.start("p", [1])
        >>> tree.leaves = [tree.add_child(0).id, tree.add_child(0).id]
        >>> tree.rewards = [1.0, 0.0]
        >>> tree.only([1]).leaves, tree.only([1]).rewards
        ([2], [0.0])
        """
        return replace(
            self,
            leaves=[self.leaves[index] for index in indices],
            rewards=[self.rewards[index] for index in indices] if self.rewards else [],
            verdicts=[self.verdicts[index] for index in indices] if self.verdicts else [],
            advantages=[],
        )

    def unique_tokens(self) -> int:
        """Sampled tokens of the nodes on some trajectory, each once (neither the prompt nor observations)."""
        used = {i for leaf in self.leaves for i in self.ancestry(leaf)[1:]}
        return sum(len(self.nodes[i].tokens) for i in used if not self.nodes[i].observation)

    def observation_tokens(self) -> int:
        """Tokens of observations on some trajectory, each once."""
        used = {i for leaf in self.leaves for i in self.ancestry(leaf)[1:]}
        return sum(len(self.nodes[i].tokens) for i in used if self.nodes[i].observation)

    def flat_tokens(self) -> int:
        """Sampled tokens of all trajectories one by one: shared tokens count once a trajectory."""
        return sum(map(self.response_length, self.leaves))

    def renumber(self) -> dict[int, int]:
        """Give the nodes new ids by level, in a level by path; sort `leaves` so; parents precede children.

        Returns the new id of each old one.
        Nodes made by fallback keep their order: they were all made at once, while the tree was at rest. Two trees that
        hold the same paths are equal afterwards, whatever order their nodes were made in. Call it before rewards are
        assigned and while nobody outside holds a node id: raises ValueError if graded.
        """
        if self.rewards:
            raise ValueError(f"tree of prompt {self.prompt_id!r} is graded: its nodes keep their ids")
        # Leaves before nodes: their ids are still places in the old order.
        self.leaves.sort(key=lambda i: (self.nodes[i].level, self.nodes[i].path))
        self.nodes.sort(key=lambda n: (n.level, n.id if n.fallback else 0, n.path))
        new = {node.id: i for i, node in enumerate(self.nodes)}
        for node in self.nodes:
            node.id = new[node.id]
            node.parent = new.get(node.parent, -1)
            node.children = [new[i] for i in node.children]
        self.leaves = [new[i] for i in self.leaves]
        return new

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe dict; `from_dict` is its inverse."""
        entries = {**_entries(self), "nodes": [_entries(node) for node in self.nodes]}
        # Nearly all nodes are sampled; text for each of them would outweigh short segments.
        for node in entries["nodes"]:
            for name in ("observation", "hidden", "restated"):
                if not node[name]:
                    del node[name]
            experts: Experts = node.pop("experts")
            if len(experts):
                node["experts"] = experts.to_dict()
        # Where it is sampled and kept is no part of what a tree is.
        del entries["alike"], entries["home"]
        return entries

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Tree:
        """Rebuild a tree from `to_dict` (JSON turns tuples into lists; this turns them back)."""
        nodes = [Node(**{**fields_, "path": tuple(fields_["path"])}) for fields_ in stored["nodes"]]
        for node in nodes:
            if isinstance(node.experts, dict):
                node.experts = Experts.from_dict(node.experts)
        return cls(**{**stored, "nodes": nodes})


def _entries(record: Tree | Node) -> dict[str, Any]:
    """The fields of a record by name, with lists and dicts of its own."""
    # Not dataclasses.asdict: it copies each entry of a list by itself, a microsecond a token.
    return {spec.name: copy(getattr(record, spec.name)) for spec in fields(record)}
