"""The tree sampler as a pure state machine: it says which segments it wants and takes them, in any order.

    search = TreeSearch("p0", prompt_tokens, cfg.rollout, seed=derive_seed(run_seed, step, "p0"), stop=rules)
    while not search.done:
        for want in search.wants():             # new ones since the last call
            search.take(want.node_id, Segment(*sample(want)))
    search.tree                                 # n_samples_per_prompt leaves, or tree.shortfall says why not

It knows nothing of engines. The driver may keep many trees in flight, and delay, batch and reorder segments as it
likes: the tree does not change. `tree/README.md` says why, and gives the algorithm (TreePO, section 2.2, arXiv
2508.17445) and what its leaves are samples of.

`tree.counts` (per tree): `segments`; `generated_tokens` (all that were sampled); `dropped_tokens` (of those, the ones
cut off after an answer); `levels` (under quota: rounds, 1 + how often it fell back); `fallbacks` (nodes made by
fallback); `forks` (branches that started at a fork) and `fork_uncertainty` (their sum over forks, nats); `duplicates`
(leaves whose response equals an earlier leaf's); `budget_decisions` and `budget_divergence` (of `tree/budget.py`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from treepo_mega.config import RolloutConfig
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.budget import Split
from treepo_mega.tree.carry import check_rule, generator_state, set_generator
from treepo_mega.tree.fallback import CANDIDATES, cut
from treepo_mega.tree.fork import Fork, decisions, followers, open_forks, weigh_branches
from treepo_mega.tree.history import Observation
from treepo_mega.tree.look_alikes import Families
from treepo_mega.tree.node import ROOT, Node, Tree
from treepo_mega.tree.regrow import ungraded
from treepo_mega.tree.stop import StopRules, TurnRules
from treepo_mega.tree.transfer import ForkTransfer, make_transfer
from treepo_mega.tree.turns import Turns, look, looked
from treepo_mega.tree.wants import Segment, Want, check_segment

COUNTS = (
    "segments",
    "generated_tokens",
    "dropped_tokens",
    "peeked_tokens",
    "levels",
    "fallbacks",
    "forks",
    "fork_uncertainty",
    "duplicates",
    "look_alikes",
    "look_alike_tokens",
    "budget_decisions",
    "budget_divergence",
)
"""Names in `tree.counts`."""


class TreeSearch:
    """Grows one tree. `seed` names the tree (run seed, step, prompt id); see the module docstring.

    `split` divides branches where `rollout.branching.budget` names a plug-in. `begun`: a graded tree of the same prompt
    and seed to grow on, with fewer leaves than `rollout` asks for. `turns`: an environment answers turns (`observe`).
    """

    def __init__(
        self,
        prompt_id: str,
        prompt_tokens: list[int],
        rollout: RolloutConfig,
        *,
        seed: int,
        stop: StopRules,
        policy_version: int = 0,
        align: int = 0,
        split: Split | None = None,
        begun: Tree | None = None,
        turns: TurnRules | None = None,
    ) -> None:
        if not prompt_tokens:
            raise ValueError(f"prompt {prompt_id!r} has no tokens: there is nothing to condition on")
        self.tree = Tree.start(prompt_id, prompt_tokens) if begun is None else ungraded(begun)
        begun_leaves = len(self.tree.leaves)
        self._cfg = rollout
        self.seed = seed
        self._stop = stop
        self._version = policy_version
        self._align = align
        # A tree that grows on must not draw again what it drew before.
        self._rng = random.Random(derive_seed(seed, "tree", *([begun_leaves] if begun_leaves else [])))
        self._new: list[Want] = []
        # rollout.partial_rollout: wanted in a later step.
        self._beyond_reach: list[Want] = []
        # The reach of a tree that grows on is that of its own paths, which may have taken several steps.
        self._step = 1 if begun is None else 1 + policy_version - min(node.policy_version for node in begun.nodes[1:])
        self.rests = 0
        """How often all paths had ended: nodes got new names then."""
        # Node id -> max_tokens of every want whose segment has not arrived, those beyond reach included.
        self._running: dict[int, int] = {}
        self._turns = Turns(turns, stop)
        self._families = Families(rollout)
        self._transfer = make_transfer(rollout, seed, self._rng, self._affordable, split)
        self.tree.counts = dict.fromkeys(COUNTS + self._turns.counts, 0) | self.tree.counts
        missing = rollout.n_samples_per_prompt - begun_leaves
        if missing <= 0:
            raise ValueError(f"prompt {prompt_id!r}: {begun_leaves} leaves already, {missing} to grow")
        # Forks start on what was sampled; a tree that branches at borders gets more branches of the prompt.
        if begun_leaves and rollout.forks:
            self._come_to_rest()
            return
        width = self._initial_width(missing)
        self._transfer.begin(width, missing)
        self._grow(self.tree.nodes[ROOT], width)

    @property
    def done(self) -> bool:
        """True once no segment is wanted any more: the tree is complete or its shortfall is recorded."""
        return not self._running and not self._turns.unanswered

    @property
    def paused(self) -> bool:
        """True when nothing is running and all that is left lies beyond this step's reach (partial_rollout)."""
        waits = bool(self._turns.unanswered) or len(self._beyond_reach) < len(self._running)
        return bool(self._beyond_reach) and not waits

    def resume(self, policy_version: int, rollout: RolloutConfig) -> None:
        """Begin another step of a carried-over tree: its paths may grow on, sampled by the weights of now.

        `rollout` is the configuration of the run as it is now (its budget temperature may have moved on).
        """
        self._step += 1
        self._version = policy_version
        self._cfg = rollout
        self._transfer.rollout = rollout
        waiting = self._beyond_reach
        # Emptied before the loop: `_ask` puts a want back that lies beyond the reach of this step as well.
        self._beyond_reach = []
        # A segment is sampled by one policy; those still waiting belong to the new one.
        for want in waiting:
            self.tree.nodes[want.node_id].policy_version = policy_version
            self._ask(want)

    def wants(self) -> list[Want]:
        """Segments wanted since the last call; none while a decision waits for segments that have not arrived."""
        new = self._new
        self._new = []
        return new

    def take(self, node_id: int, segment: Segment) -> None:
        """Accept the segment of `node_id`. What follows from it (a level, a node's children) is wanted from now on.

        Raises ValueError for a node that is not waited for, a second delivery, an empty or too long segment, or
        logprobs or entropies that do not match the tokens: a driver's error, never the model's.
        """
        where = f"prompt {self.tree.prompt_id!r}, node {node_id}"
        if (most := self._running.get(node_id)) is None:
            if 0 < node_id < len(self.tree.nodes) and self.tree.nodes[node_id].tokens:
                raise ValueError(f"{where}: its segment was already delivered")
            raise ValueError(f"{where}: no segment is wanted; waiting for {sorted(self._running)}")
        check_segment(segment, most, where, entropies=self._cfg.entropy_top_k > 0, experts=self._cfg.notes_routing)
        del self._running[node_id]
        node = self.tree.nodes[node_id]
        if node.observation:
            self._arrived(looked(self.tree, node, segment), None)
        elif isinstance(self._transfer, ForkTransfer) and self._transfer.draws_at(node_id):
            for branch, token in self._transfer.draw(node_id, segment, self._seed_of(node)):
                self.tree.nodes[branch].policy_version = node.policy_version
                self._receive(self.tree.nodes[branch], token, None)
            if node.fork == "threshold":
                weigh_branches(self.tree, node.parent)
        else:
            # Asked before the segment counts: then the node's quota is gone.
            self._receive(node, segment, node_id if self._goes_on_alone(node) else None)
        if self.done:
            self._come_to_rest()

    def turns_ended(self) -> list[int]:
        """Nodes that ended a turn since the last call; each waits for `observe`."""
        return self._turns.take_ended()

    def observe(self, node_id: int, observation: Observation | None, *, lost: bool = False) -> None:
        """What the environment answered to the turn that ended at `node_id`; None: nothing, so the path has ended.

        `lost`: the trajectory has no reward. Raises ValueError for a node that waits for no answer, or an empty one.
        """
        node = self._turns.answer(self.tree, node_id, observation, lost=lost)
        if node.stop is None and self._cfg.peek and not (self._transfer.full or self._goes_on_alone(node)):
            want = look(self.tree, node, self._cfg.peek, self._seed_of(self.tree.nodes[self.tree.below(node_id)]))
            self._running[want.node_id] = 1
            self._ask(want)
            return
        self._arrived(node, None)
        if self.done:
            self._come_to_rest()

    def _receive(self, node: Node, segment: Segment, after: int | None) -> None:
        """Keep the segment of `node`, and let those branch who may now. `after`: see `Want`."""
        self._settle(node, segment)
        if node.id not in self._turns.unanswered:
            self._arrived(node, after)

    def _arrived(self, node: Node, after: int | None) -> None:
        """Let those branch who may, now that it is known how `node` goes on."""
        for settled in self._families.arrived(node, self.tree):
            for parent, width in self._transfer.arrived(settled, self.tree):
                self._grow(parent, width, after)

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on, JSON-safe: the tree, its generator, what it waits for.

        The stop rules and the configuration are the run's, not the tree's. Raises ValueError unless `paused`.
        """
        if not self.paused:
            raise ValueError(f"prompt {self.tree.prompt_id!r}: only a paused tree can be carried over")
        return {
            "tree": self.tree.to_dict(),
            "seed": self.seed,
            "align": self._align,
            "step": self._step,
            "rng": generator_state(self._rng),
            "running": list(self._running.items()),
            "beyond_reach": [asdict(want) for want in self._beyond_reach],
            "families": self._families.state_dict(),
            "transfer": {"kind": self._rule, "state": self._transfer.state_dict()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the paused search that `state_dict` wrote down, over ranks, steps and restarts.

        Raises CarriedTreeError when the state was written under another rule.
        """
        check_rule(state["tree"]["prompt_id"], state["transfer"]["kind"], self._rule)
        set_generator(self._rng, state["rng"])
        self.tree = Tree.from_dict(state["tree"])
        # A tree of an older version lacks the counts that came later.
        self.tree.counts = dict.fromkeys(COUNTS, 0) | self.tree.counts
        self.seed = state["seed"]
        self._align = state["align"]
        self._step = state["step"]
        self._new = []
        self._running = {int(node_id): max_tokens for node_id, max_tokens in state["running"]}
        self._beyond_reach = [Want(**want) for want in state["beyond_reach"]]
        # A state of before look-alikes could be cut has no families.
        self._families.load_state_dict(state.get("families", {"families": [], "waiting": []}))
        self._transfer.load_state_dict(state["transfer"]["state"], self.tree.nodes)

    @property
    def _rule(self) -> str:
        """What the saved state of the transfer rule belongs to."""
        return "fork" if self._cfg.forks else self._cfg.branching.transfer

    def _initial_width(self, width: int) -> int:
        """New branches of the prompt, which are to become `width` leaves."""
        if self._cfg.mode == "sequential":
            return width
        between = self._cfg.branching.initial
        usual = width // 4 if self._cfg.forks else self._cfg.branching.factor
        drawn = usual if between is None else self._rng.randint(*between)
        return max(1, min(width, drawn, self._affordable(width)))

    def _affordable(self, most: int) -> int:
        """New segments that the token budget still holds, at most `most`."""
        if self._cfg.token_budget is None:
            return most
        left = self._cfg.token_budget - int(self.tree.counts["generated_tokens"])
        return max(0, min(most, left // self._cfg.segment.length))

    def _size(self, prefix_len: int, room: int) -> int:
        """Tokens of the next segment of a path of `prefix_len` tokens (prompt included) with `room` left."""
        size = self._cfg.segment_tokens
        # The last token of a segment is computed with the next one: what is cached ends one token earlier.
        if self._align:
            size += (1 - prefix_len - size) % self._align
        return min(size, room)

    def _grow(self, parent: Node, width: int, after: int | None = None) -> None:
        """Give `parent` children by decision of the transfer rule. `after`: see `Want`."""
        children = self._branch(parent.id, width)
        self._transfer.started(parent, children)
        self._families.started(children)
        self._let_run(children, after)

    def _goes_on_alone(self, node: Node) -> bool:
        """True when the running `node` waits for nobody, and nobody will branch from its path."""
        return self._transfer.is_single(node) and not self._families.holds(node)

    def _branch(
        self, parent: int, children: int, *, fallback_level: int | None = None, fork: Fork | None = None
    ) -> list[Node]:
        """Give `parent` that many children and want a segment for each; returns them."""
        parent = self.tree.below(parent)
        prefix = self.tree.prefix(parent)
        room = self._stop.max_response_len - self.tree.response_length(parent)
        size = self._size(len(prefix), room)
        depth = self.tree.sampled_depth(parent) + 1
        # No decision needs what comes after the last token of a path.
        ends = size == room or depth >= self._stop.max_depth
        peek = 0 if ends or self._transfer.full else self._cfg.peek
        shortest = self._cfg.segment.min_length if self._cfg.ends_at_text else self._cfg.segment_tokens
        entropy = self._cfg.entropy_top_k
        new = []
        for _ in range(children):
            node = self.tree.add_child(
                parent,
                fallback=fallback_level is not None,
                policy_version=self._version,
                level=fallback_level,
            )
            node.fork = fork.rule if fork else None
            new.append(node)
            self._running[node.id] = size
            self._ask(Want(node.id, prefix, size, self._seed_of(node), peek, min(shortest, size), entropy=entropy))
        self.tree.counts["fallbacks"] += children * (fallback_level is not None)
        return new

    def _seed_of(self, node: Node) -> int:
        """The seed of a new node's segment."""
        # Of the path, not of the id: ids follow the order of arrival.
        if not self._cfg.forks:
            return derive_seed(self.seed, *node.path)
        # Forks cut segments, and a later node would get the path, and the seed, of an earlier one.
        before = len(self.tree.response(node.parent))
        return derive_seed(self.seed, "fork", *decisions(self.tree, node.id), before)

    def _let_run(self, nodes: Sequence[Node], after: int | None = None) -> None:
        """Mark the wants of new nodes that will not branch: they may be sampled to the end of their path."""
        if not self._cfg.continues:
            return
        single = {node.id for node in nodes if self._goes_on_alone(node)}
        for i, want in enumerate(self._new):
            if want.node_id in single:
                room = self._stop.max_response_len - self.tree.response_length(self.tree.nodes[want.node_id].parent)
                segments = self._stop.max_depth - self.tree.sampled_depth(want.node_id) + 1
                run = min(room, segments * want.max_tokens)
                self._new[i] = replace(want, run=run, after=after, peek=0)

    def _ask(self, want: Want) -> None:
        """Want a segment now, or in a later step when its path has grown enough in this one."""
        reach = self._cfg.partial_rollout
        grown = self.tree.response_length(self.tree.nodes[want.node_id].parent)
        within_reach = reach is None or grown < reach * self._step
        (self._new if within_reach else self._beyond_reach).append(want)

    def _come_to_rest(self) -> None:
        """Every path has ended: number the nodes as if none had overtaken another, and fill up by fallback, or be done.

        Nodes keep no trace of the order in which their segments arrived.
        """
        tree = self.tree
        self.rests += 1
        # Before anything is drawn: fallback and its generator must not depend on which segment arrived first.
        tree.renumber()
        tree.counts["levels"] = max(node.level for node in tree.nodes)
        missing = self._cfg.n_samples_per_prompt - len(tree.leaves)
        if missing:
            made = self._fork(missing) if self._cfg.forks else self._fall_back()
            self._transfer.started_anew(made, missing)
            self._let_run(made)
        if self.done:
            leaves = tree.leaves
            tree.counts["duplicates"] = len(leaves) - len({tuple(tree.response(leaf)) for leaf in leaves})

    def _settle(self, node: Node, segment: Segment) -> None:
        """Apply the stop rules to a node's segment and store what is kept of it."""
        verdict = self._turns.judge(self.tree, node, segment)
        node.tokens = segment.tokens[: verdict.keep]
        node.logprobs = segment.logprobs[: verdict.keep]
        node.entropies = segment.entropies[: verdict.keep]
        self.tree.note(node.id, segment.experts, segment.experts_from)
        node.stop = verdict.reason
        # An ended path has no next token, even where the engine reported one.
        node.peek = list(segment.peek) if verdict.reason is None else []
        if not self._turns.ends(self.tree, node) and node.stop is not None:
            self.tree.leaves.append(node.id)
        self.tree.counts["segments"] += 1
        self.tree.counts["generated_tokens"] += len(segment.tokens)
        self.tree.counts["dropped_tokens"] += len(segment.tokens) - verdict.keep
        self.tree.counts["peeked_tokens"] += bool(segment.peek)

    def _fork(self, missing: int) -> list[Node]:
        """Every path ended, leaves are missing: branch where the paths were uncertain, or give up and say so."""
        assert isinstance(self._transfer, ForkTransfer)
        affordable = self._affordable(missing)
        forks = self._transfer.choose(self.tree, missing, affordable) if affordable else []
        if not forks:
            self._fall_short(missing, bool(affordable))
        made: list[Node] = []
        for parent, fork in open_forks(self.tree, forks):
            made += self._start_fork(parent, fork)
            self.tree.counts["forks"] += fork.branches
            self.tree.counts["fork_uncertainty"] += fork.branches * fork.uncertainty
        return made

    def _start_fork(self, parent: int, fork: Fork) -> list[Node]:
        """Want what the branches of a fork begin with; returns those that are wanted whole."""
        if self._cfg.branching.fork.draw == "again":
            return self._branch(parent, fork.branches, fork=fork)
        assert isinstance(self._transfer, ForkTransfer)
        # Trunks stay independent of one another where leaves are to be fair: only siblings avoid each other's tokens.
        there = followers(self.tree, parent)
        siblings = {self.tree.nodes[child].tokens[0] for child in self.tree.nodes[parent].children}
        taken = there if fork.rule == "rank" else siblings
        prefix = self.tree.prefix(parent)
        made = [self.tree.add_child(parent, policy_version=self._version) for _ in range(fork.branches)]
        for node in made:
            node.fork = fork.rule
        # One token is asked for, and all branches choose theirs from its likeliest.
        first = made[0]
        self._running[first.id] = 1
        self._transfer.await_draw([node.id for node in made], taken)
        top_k = self._cfg.branching.fork.top_k
        self._ask(Want(first.id, prefix, 1, self._seed_of(first), entropy=self._cfg.entropy_top_k, top=top_k))
        return []

    def _fall_short(self, missing: int, affordable: bool) -> None:
        """Say in the tree why it keeps fewer leaves than were asked for."""
        budget = f"rollout.token_budget {self._cfg.token_budget} is spent"
        why = "rollout.fallback.from is none" if affordable else budget
        self.tree.shortfall = f"{missing} of {self._cfg.n_samples_per_prompt} leaves missing: all paths ended, {why}"

    def _fall_back(self) -> list[Node]:
        """Every path ended, leaves are missing: sample again from borders of ended paths, or give up and say so.

        Returns the new children: as many as leaves are missing, or fewer when candidates are few (they branch).
        """
        tree = self.tree
        width = self._cfg.n_samples_per_prompt
        missing = width - len(tree.leaves)
        left = self._affordable(missing)
        if self._cfg.fallback.from_ == "none" or not left:
            self._fall_short(missing, bool(left))
            return []
        # A full tree may have lost branches that repeated a sibling: what begins now may have to be decided on.
        self._transfer.full = False
        made: list[Node] = []
        level = max(node.level for node in tree.nodes) + 1
        candidates = CANDIDATES[self._cfg.fallback.from_](tree, self._rng)
        cuts = [cut(tree, leaf, self._cfg.fallback.cut, self._rng) for leaf in candidates]
        # Candidates in turn until the budget is spent; without a candidate, start over from the prompt.
        for node_id in cuts or [ROOT]:
            observed = tree.nodes[tree.below(node_id)].observation
            children = min(self._cfg.branching.width(observed=observed), left)
            if children == 0:
                break
            made += self._branch(node_id, children, fallback_level=level)
            left -= children
        return made
