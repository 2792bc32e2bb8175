"""Calls of plug-ins: each looks at what came back, and its message names plug-in, prompt and place.

Whatever a plug-in raises, returns or changes that it should not is a PluginError. Nothing is mended in silence.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

from treepo_mega.config import AlgoConfig, RolloutConfig
from treepo_mega.errors import TreepoError
from treepo_mega.plugins.contracts import CONTRACTS
from treepo_mega.runtime.user_code import UserCodeError, check_parameters, describe, import_function, parameters_of
from treepo_mega.text.function_path import is_function_path
from treepo_mega.tree.budget import Split
from treepo_mega.tree.node import Node, Tree


class PluginError(TreepoError):
    """A plug-in cannot be used, or broke its contract; the message names it, the prompt and what was expected."""


class Plugin:
    """An imported function with the contract of its kind."""

    def __init__(self, kind: str, name: str) -> None:
        """Import it. Raises PluginError for a file, a function or parameters that do not fit."""
        contract = CONTRACTS[kind]
        self.title = contract.title(name)
        try:
            self._function = import_function(name, self.title)
            parameters = parameters_of(self._function)
            self._passed = check_parameters(parameters, contract.required, contract.optional, self.title)
        except UserCodeError as error:
            raise PluginError(str(error)) from error.__cause__

    def __call__(self, where: str, /, **arguments: Any) -> Any:
        """What the function returns for those `arguments` that it takes; `where` names the case for people."""
        passed = {name: value for name, value in arguments.items() if name in self._passed}
        try:
            returned = self._function(**passed)
        except Exception as error:
            raise PluginError(f"{self.title} raised {describe(error)} for {where}") from error
        if inspect.isawaitable(returned):
            if inspect.iscoroutine(returned):
                # Else Python warns later that nobody awaited it, far from this message.
                returned.close()
            raise self.wrong(
                where, f"returned {type(returned).__name__}, which nothing awaits; expected a plain function"
            )
        return returned

    def wrong(self, where: str, what: str) -> PluginError:
        """The error that says `what` the plug-in did, and for which case."""
        return PluginError(f"{self.title} {what}, for {where}")


@functools.cache
def load(kind: str, name: str) -> Plugin:
    """The plug-in `name`, imported once in a process. Raises PluginError."""
    return Plugin(kind, name)


def of_prompt(tree: Tree) -> str:
    """How messages name a tree."""
    return f"prompt {tree.prompt_id!r}"


def is_per_node(values: Sized, tree: Tree) -> bool:
    """Whether advantages of a tree are per node; else they are per leaf. A tree has more nodes than leaves."""
    return len(values) == len(tree.nodes)


def plugin_advantages(name: str, tree: Tree, *, shares: Sequence[float] | None, algo: AlgoConfig) -> list[float]:
    """What the advantage plug-in `name` says of a graded tree: one number a leaf, or one a node.

    Raises PluginError for another number of values, a value that is no finite number, and a changed tree.
    """
    plugin = load("advantage", name)
    where = of_prompt(tree)
    with_tree = _unchanged(plugin, tree)
    found = with_tree(lambda: plugin(where, tree=tree, shares=None if shares is None else list(shares), algo=algo))
    values = _listed(plugin, where, found, "a list of numbers")
    if len(values) not in (len(tree.leaves), len(tree.nodes)):
        raise plugin.wrong(
            where,
            f"returned {len(values)} values; expected one for each of the {len(tree.leaves)} leaves, or one for each "
            f"of the {len(tree.nodes)} nodes (the root included)",
        )
    of_nodes = is_per_node(values, tree)
    return [
        _number(plugin, where, value, f"[{index}] (node {index if of_nodes else tree.leaves[index]})")
        for index, value in enumerate(values)
    ]


def plugin_keeps(name: str, tree: Tree, *, step: int) -> bool:
    """Whether the filter plug-in `name` lets the step train on a graded tree.

    Raises PluginError for what is no bool.
    """
    plugin = load("filter", name)
    where = of_prompt(tree)
    kept = _unchanged(plugin, tree)(lambda: plugin(where, tree=tree, step=step))
    # numpy's bool is no bool of Python; only it has this name.
    if isinstance(kept, bool) or type(kept).__name__ in ("bool_", "bool"):
        return bool(kept)
    raise plugin.wrong(where, f"returned {_shown(kept)}; expected True or False")


def split_of(rollout: RolloutConfig, prompt_id: str) -> Split | None:
    """What divides the branches of that prompt's tree; None where `rollout.branching.budget` is no plug-in."""
    name = rollout.branching.budget.kind
    if not is_function_path(name):
        return None

    def split(total: int, living: Sequence[Node], now: RolloutConfig) -> list[int]:
        return plugin_split(name, total, living, temperature=now.branching.budget.temperature, prompt_id=prompt_id)

    return split


def plugin_split(name: str, total: int, paths: Sequence[Node], *, temperature: float, prompt_id: str) -> list[int]:
    """`total` over `paths`, as the budget plug-in `name` says. Raises PluginError for a split that does not add up."""
    plugin = load("budget", name)
    where = f"prompt {prompt_id!r} (total {total}, {len(paths)} paths)"
    found = plugin(where, total=total, paths=list(paths), temperature=temperature)
    values = _listed(plugin, where, found, "a list of whole numbers")
    if len(values) != len(paths):
        raise plugin.wrong(where, f"returned {len(values)} numbers; expected one for each of the {len(paths)} paths")
    out = []
    for index, value in enumerate(values):
        number = _number(plugin, where, value, f"[{index}] (path {paths[index].path})")
        if number != int(number) or number < 1:
            raise plugin.wrong(where, f"returned [{index}] = {number:g}; expected a whole number of at least 1")
        out.append(int(number))
    if sum(out) != total:
        raise plugin.wrong(where, f"returned {out}, which add up to {sum(out)}; expected {total}")
    return out


def open_sinks(names: Sequence[str]) -> list[Callable[[int, Mapping[str, float | None]], None]]:
    """The sinks `names` in order: each takes a step and its metrics, and raises PluginError when it raises."""

    def sink_of(name: str) -> Callable[[int, Mapping[str, float | None]], None]:
        """The sink `name`, loaded; it gets a step and that step's metrics."""
        plugin = load("logger", name)

        def sink(step: int, metrics: Mapping[str, float | None]) -> None:
            # A copy: what one sink does to it must not reach the next.
            plugin(f"step {step}", step=step, metrics=dict(metrics))

        return sink

    return [sink_of(name) for name in names]


def _unchanged(plugin: Plugin, tree: Tree) -> Callable[[Callable[[], Any]], Any]:
    """Run a call and see that the tree is as it was: a changed reward would be trained on by all that follow."""

    def state() -> tuple[Any, ...]:
        return (tree.leaves[:], tree.rewards[:], tree.verdicts[:], len(tree.nodes))

    def run(call: Callable[[], Any]) -> Any:
        before = state()
        found = call()
        if state() != before:
            raise plugin.wrong(of_prompt(tree), "changed the tree that it was given; expected a new list")
        return found

    return run


def _listed(plugin: Plugin, where: str, found: Any, expected: str) -> list[Any]:
    """A list, a tuple, or whatever has `tolist` (NumPy's arrays, torch's tensors), as a list."""
    if hasattr(found, "tolist"):
        found = found.tolist()
    if isinstance(found, Iterable) and not isinstance(found, str | bytes | Mapping):
        return list(found)
    raise plugin.wrong(where, f"returned {_shown(found)}; expected {expected}")


def _number(plugin: Plugin, where: str, value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise plugin.wrong(where, f"returned {_shown(value)} at {place}; expected a number")
    number = float(value)
    if not math.isfinite(number):
        raise plugin.wrong(where, f"returned {number} at {place}; expected a finite number")
    return number


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"
