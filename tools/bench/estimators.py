"""Every advantage estimator against the exact policy gradient, on processes small enough to enumerate.

    python tools/bench/estimators.py [--quick] [--trees 2500] [--seed 3]

The process has three tokens (one ends the response) and responses of at most five, so all 31 states can be written
down: the expected reward J and its gradient in the logits are exact. Responses of at most three tokens are likely
right (0.8), longer ones are not (0.25), so that length and reward go together; the content moves both by up to 0.2.
`TreeSearch` samples trees of 16 leaves with segments of one token, as in training: binary trees and bushy roots, with
and without early stops, under both transfer rules, with and without fallback. Rewards are binary or real. Two samplers
more: branches that repeat a sibling are cut, and trees of 4 leaves grow on to 28 when their rewards differ.

For each estimator and leaf weight: the cosine of the mean gradient to the exact one; its scale at the first token and
from the fourth on (1 is unbiased); the mean reward that the weights give minus J; and the number of
trees. `exact` is R - J, which no run can know, and says what the sampler alone does. Advantages are not whitened.

Then the share of (trajectory, token) pairs of full trees that get no credit under `segment`: by node, as V(child) -
V(parent) has it, and from branch to branch, as it is computed. Trees have 16 leaves of 7, 14 or 28 segments and random
0/1 rewards.

Last line, JSON: {"cases": [{"estimator", "leaf_weight", "branch", "stops", "transfer", "fallback", "look_alikes",
"leaves", "rewards", "trees", "cos", "scale", "scale_deep", "mean_reward_bias", "standard_error"}],
"zero_credit": [{"segments", "branch", "by_node", "branch_to_branch"}], "descent_met"}. --quick: 300 trees a case and
fewer cases, so noisier; the bars (cosine 0.99, bias 0.01) are then not judged.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from dataclasses import dataclass, field

import numpy as np

from treepo_mega.config import RolloutConfig
from treepo_mega.tree.advantage import leaf_advantages
from treepo_mega.tree.budget import top_k_entropy
from treepo_mega.tree.descent import fair_leaves, leaf_shares
from treepo_mega.tree.node import Tree
from treepo_mega.tree.node_advantage import NODE_ESTIMATORS, node_advantages
from treepo_mega.tree.regrow import new_leaves, with_grades
from treepo_mega.tree.search import Segment, TreeSearch
from treepo_mega.tree.stop import StopRules

END = 0
TOKENS = 3
LONGEST = 5
WIDTH = 16
MOST = 28
"""Leaves of a tree that grew on: those of a settled one go to one that is mixed."""
ESTIMATORS = ("exact", "rloo", "reinforce_pp_baseline", "grpo", "treepo", "treepo_size_weighted", "segment")
PLAIN = ("exact", "rloo")
"""Baselines that the token has no part in: with them descent promises the gradient of the policy."""
COSINE_BAR = 0.99
BIAS_BAR = 0.01
State = tuple[int, ...]


@dataclass
class Process:
    """Logits by state, rewards by response, and what follows from them exactly.

    `probabilities` [states, tokens]; `gradient` of the expected reward in the logits, of the same shape.
    """

    stops: bool
    binary: bool
    seed: int
    states: dict[State, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._draw = np.random.default_rng(self.seed)
        logits: list[np.ndarray] = []
        self._add_states((), logits)
        odds = np.exp(np.stack(logits))
        self.probabilities = odds / odds.sum(1, keepdims=True)
        self.gradient = np.zeros_like(self.probabilities)
        self.expected_reward = self._visit((), 1.0)

    def _add_states(self, prefix: State, logits: list[np.ndarray]) -> None:
        if len(prefix) == LONGEST:
            return
        self.states[prefix] = len(logits)
        row = self._draw.normal(0, 0.7, TOKENS)
        # A response rarely ends at once, and ends more readily the longer it is.
        row[END] = 0.3 * len(prefix) - (1.9 if not prefix else 0.4) if self.stops else -50.0
        logits.append(row)
        for token in range(1, TOKENS):
            self._add_states((*prefix, token), logits)

    def over(self, response: State) -> bool:
        """Whether nothing comes after `response`."""
        return response[-1] == END or len(response) == LONGEST

    def reward(self, response: State) -> float:
        """Probability that the response is right."""
        usual = 0.8 if len(response) <= 3 else 0.25
        content = math.sin(7 * sum((place + 1) * token for place, token in enumerate(response)))
        return min(1.0, max(0.0, usual + 0.2 * content))

    def _visit(self, prefix: State, reached: float) -> float:
        """Expected reward from `prefix` on; adds to the gradient what a state reached so often has in it."""
        state = self.states[prefix]
        chances = self.probabilities[state]
        values = np.zeros(TOKENS)
        for token in range(TOKENS):
            response = (*prefix, token)
            ended = self.over(response)
            values[token] = self.reward(response) if ended else self._visit(response, reached * chances[token])
        mean = float(chances @ values)
        # Policy gradient theorem: visits times pi(token) times the advantage of the token.
        self.gradient[state] = reached * chances * (values - mean)
        return mean

    def grow(self, rollout: RolloutConfig, rng: random.Random) -> Tree:
        """One tree with its rewards; with leaves adaptive it grows on when its first rewards differ."""
        if rollout.leaves == "fixed":
            return self._grow(rollout, rng)
        handful = self._grow(rollout.replace({"n_samples_per_prompt": rollout.first_leaves}), rng)
        if len(set(handful.rewards)) < 2:
            return handful
        return with_grades(self._grow(rollout.replace({"n_samples_per_prompt": MOST}), rng, handful), handful)

    def _grow(self, rollout: RolloutConfig, rng: random.Random, begun: Tree | None = None) -> Tree:
        """One tree with the rewards of its new leaves."""
        rules = StopRules(frozenset([END]), lambda ids: "", LONGEST, LONGEST, answer_box=False, repetition_window=0)
        search = TreeSearch("p", [TOKENS], rollout, seed=rng.randrange(2**31), stop=rules, begun=begun)
        while not search.done:
            for want in search.wants():
                chances = self.probabilities[self.states[tuple(want.prefix[1:])]]
                token = rng.choices(range(TOKENS), chances)[0]
                reason = "stop" if token == END else "length"
                logprobs = np.log(np.maximum(chances, 1e-300)).tolist()
                entropies = [top_k_entropy(logprobs)] if want.entropy else []
                top = sorted(enumerate(logprobs), key=lambda one: -one[1])[: want.top]
                after = (*want.prefix[1:], token)
                peek = [] if self.over(after) else sorted(np.log(self.probabilities[self.states[after]]).tolist())
                peek = peek[::-1][: want.peek]
                search.take(want.node_id, Segment([token], [logprobs[token]], reason, peek, entropies, top))
        tree = search.tree if begun is None else new_leaves(search.tree, begun)
        right = [self.reward(tuple(tree.response(leaf))) for leaf in tree.leaves]
        tree.rewards = [float(rng.random() < chance) for chance in right] if self.binary else right
        tree.verdicts = list(tree.rewards)
        return tree


def credit_by_node(tree: Tree, estimator: str, shares: list[float], expected_reward: float) -> dict[int, float]:
    """Node -> sum over the leaves at or below it of share x advantage: what pushes its token at ratio 1."""
    below = tree.leaves_below()
    if estimator in NODE_ESTIMATORS:
        by_node = node_advantages(tree, estimator, shares=shares)
        return {node: by_node[node] * math.fsum(shares[leaf] for leaf in group) for node, group in below.items()}
    if estimator == "exact":
        by_leaf = [reward - expected_reward for reward in tree.rewards]
    else:
        by_leaf = leaf_advantages(tree, estimator, shares=shares)
    return {node: math.fsum(shares[leaf] * by_leaf[leaf] for leaf in group) for node, group in below.items()}


def judge(process: Process, trees: list[Tree], estimator: str, leaf_weight: str) -> dict[str, float]:
    """The columns of one row; see the module docstring."""
    total = np.zeros_like(process.probabilities)
    means = []
    for grown in trees:
        tree = fair_leaves(grown) if leaf_weight == "descent" else grown
        shares = leaf_shares(tree, leaf_weight) or [1 / len(tree.leaves)] * len(tree.leaves)
        means.append(math.fsum(share * reward for share, reward in zip(shares, tree.rewards, strict=True)))
        for node, credit in credit_by_node(tree, estimator, shares, process.expected_reward).items():
            if node == 0:
                continue
            state = process.states[tuple(tree.response(tree.nodes[node].parent))]
            total[state] -= credit * process.probabilities[state]
            total[state, tree.nodes[node].tokens[0]] += credit
    found = total / len(trees)
    exact = process.gradient
    depth = np.array([len(prefix) for prefix in process.states])

    def scale(rows: np.ndarray) -> float:
        return float((found[rows] * exact[rows]).sum() / (exact[rows] ** 2).sum())

    return {
        "trees": len(trees),
        "cos": float((found * exact).sum() / np.linalg.norm(found) / np.linalg.norm(exact)),
        "scale": scale(depth == 0),
        "scale_deep": scale(depth >= 3),
        "mean_reward_bias": float(np.mean(means)) - process.expected_reward,
        "standard_error": float(np.std(means, ddof=1) / math.sqrt(len(means))),
    }


FORK: dict[str, object] = {"branching.at": "fork", "branching.fork.distance": 1, "branching.initial": [4, 4]}

SAMPLERS: dict[str, dict[str, object]] = {
    "independent": {"mode": "sequential"},
    "level, no fallback": {"fallback.from": "none"},
    "level, fallback": {"fallback.from": "finished"},
    "quota, no fallback": {"branching.transfer": "quota", "fallback.from": "none"},
    "quota, fallback": {"branching.transfer": "quota", "fallback.from": "finished"},
    "level, look-alikes cut": {"branching.look_alikes": "cut", "fallback.from": "none"},
    "adaptive, no fallback": {"leaves": "adaptive", "branching.initial": [4, 4], "fallback.from": "none"},
    "level, root of 8": {"branching.initial": [8, 8], "fallback.from": "finished"},
    "fork, rank": FORK,
    "fork, rank, logprob": FORK | {"branching.fork.signal": "logprob"},
    "fork, rank, other": FORK | {"branching.fork.draw": "other"},
    "fork, threshold": FORK | {"branching.fork.threshold": 0.8, "fallback.from": "none"},
    "fork, threshold, other": FORK
    | {"branching.fork.threshold": 0.8, "branching.fork.draw": "other", "fallback.from": "none"},
}


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """All rows, printed as they come."""
    base = RolloutConfig().replace({"segment.length": 1, "n_samples_per_prompt": WIDTH, "max_response_len": LONGEST})
    cases: list[dict[str, object]] = []
    settings = [(True, True), (False, True), (True, False)]
    for stops, binary in settings[: 1 if args.quick else None]:
        process = Process(stops=stops, binary=binary, seed=args.seed)
        # Without early stops no path is over-represented and nothing falls back: two samplers say all.
        chosen = SAMPLERS if stops else {name: SAMPLERS[name] for name in ("independent", "level, no fallback")}
        chosen = {name: changes for name, changes in chosen.items() if args.only in name}
        print(f"\nearly stops {stops}, rewards {'binary' if binary else 'real'}: J = {process.expected_reward:.4f}")
        print(f"{'sampler':24}{'estimator':23}{'weight':9}{'cos':>7}{'scale':>7}{'deep':>7}{'bias':>9}")
        for name, changes in chosen.items():
            rollout = base.replace(changes)
            rng = random.Random(args.seed)
            trees = [process.grow(rollout, rng) for _ in range(args.trees)]
            for estimator in ESTIMATORS:
                for leaf_weight in ("uniform", "descent"):
                    row = judge(process, trees, estimator, leaf_weight)
                    print(
                        f"{name:24}{estimator:23}{leaf_weight:9}{row['cos']:7.3f}{row['scale']:7.2f}"
                        f"{row['scale_deep']:7.2f}{row['mean_reward_bias']:+9.4f}"
                    )
                    cases.append(
                        {
                            "estimator": estimator,
                            "leaf_weight": leaf_weight,
                            "branch": (rollout.branching.initial or [rollout.branching.factor])[0],
                            "stops": stops,
                            "sampler": name,
                            "transfer": rollout.branching.transfer if rollout.mode == "tree" else "independent",
                            "fallback": rollout.fallback.from_,
                            "look_alikes": rollout.branching.look_alikes,
                            "leaves": rollout.leaves,
                            "rewards": "binary" if binary else "real",
                            **row,
                        }
                    )
    return cases


def full_tree(segments: int, branch: int, rng: random.Random) -> Tree:
    """A tree whose paths branch until it has all leaves, and then go on alone; random rewards that differ."""
    tree = Tree.start("p", [TOKENS])
    ends = [0]
    for _ in range(segments):
        width = branch if len(ends) < WIDTH else 1
        ends = [tree.add_child(end).id for end in ends for _ in range(width)][: max(WIDTH, len(ends))]
    tree.leaves = ends
    while len(set(tree.rewards)) < 2:
        tree.rewards = [float(rng.random() < 0.5) for _ in ends]
    return tree


def zero_credit(seed: int) -> list[dict[str, float]]:
    """Shares of pairs without credit under `segment`; all segments have one length, so pairs count nodes on paths."""
    rng = random.Random(seed)
    rows = []
    for segments, branch in ((7, 2), (14, 2), (28, 2), (14, 4)):
        pairs = by_node = repaired = 0
        for _ in range(100):
            tree = full_tree(segments, branch, rng)
            values = node_advantages(tree, "segment")
            mean = {
                node: math.fsum(tree.rewards[i] for i in group) / len(group)
                for node, group in tree.leaves_below().items()
            }
            for leaf in tree.leaves:
                for node in tree.ancestry(leaf)[1:]:
                    pairs += 1
                    by_node += mean[node] == mean[tree.nodes[node].parent]
                    repaired += values[node] == 0.0
        rows.append(
            {
                "segments": segments,
                "branch": branch,
                "by_node": by_node / pairs,
                "branch_to_branch": repaired / pairs,
            }
        )
    return rows


def descent_met(cases: list[dict[str, object]]) -> bool:
    """Whether descent with the plain baselines has the policy's gradient and mean reward with fixed leaves."""
    judged = [
        case
        for case in cases
        if case["leaf_weight"] == "descent" and case["estimator"] in PLAIN and case["leaves"] == "fixed"
    ]
    return all(
        float(str(case["cos"])) >= COSINE_BAR and abs(float(str(case["mean_reward_bias"]))) <= BIAS_BAR
        for case in judged
    )


def main() -> int:
    """Measure and print; returns the exit status: 1 when a bar is missed in a full run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="300 trees a case, binary rewards with early stops only")
    parser.add_argument("--trees", type=int, help="trees a case (2500, with --quick 300)")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--only", default="", help="samplers whose names hold this")
    args = parser.parse_args()
    args.trees = args.trees or (300 if args.quick else 2500)
    cases = measure(args)
    met = None if args.quick else descent_met(cases)
    print(f"\n{'segments':>9}{'branch':>8}{'zero by node':>14}{'branch to branch':>18}")
    zeros = zero_credit(args.seed)
    for row in zeros:
        print(f"{row['segments']:9}{row['branch']:8}{row['by_node']:14.2f}{row['branch_to_branch']:18.2f}")
    print(json.dumps({"cases": cases, "zero_credit": zeros, "descent_met": met}))
    return 1 if met is False else 0


if __name__ == "__main__":
    sys.exit(main())
