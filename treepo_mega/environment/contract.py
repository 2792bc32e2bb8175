"""What a class must be to serve as an environment, and what is read from it before anything is sampled.

The contract is TRL's `environment_factory`: a plain class.

    class Counter:
        def reset(self, **row) -> str | None:
            '''Begin an episode of a row of the data; what it returns is added to the prompt.'''
        def add(self, amount: int) -> str:
            '''Add to the count.

            Args:
                amount: How much.
            '''
        def get_reward(self) -> float: ...      # as you like; else data.verifier grades the answer

Its public methods, less those of LIFE_CYCLE, are the tools. Each has typed parameters and a docstring that says
what each is for. `fork()` returns an object in the same state, if the class knows better than copy.deepcopy.

A function, or a list of functions, is an environment without a state (`functions.py`).

    manifest = read_manifest("path/to/file.py:Counter")     # in a process of its own, with a deadline
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo_mega.data.rewards.grader import worker_environment
from treepo_mega.environment.functions import NoFunction, class_of, functions_in
from treepo_mega.errors import TreepoError, nearest
from treepo_mega.runtime.user_code import UserCodeError, import_object
from treepo_mega.text.function_path import is_function_path

LIFE_CYCLE = ("reset", "get_reward", "fork", "close")
"""Public methods that are no tools."""

BUILT_IN = {
    name: f"{Path(__file__).resolve().parent / 'builtin' / f'{file}.py'}:{title}"
    for name, file, title in (
        ("calculator", "calculator", "Calculator"),
        ("python", "python", "Python"),
        ("search", "search", "Search"),
        ("guess", "guess", "Guess"),
        ("game", "game", "Game"),
    )
}
"""Environments that come with the project, by the name that people write."""

MANIFEST_DEADLINE_S = 120.0


class EnvironmentClassError(TreepoError):
    """A class that cannot serve as an environment; the message names it, what is wrong and what is expected."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an environment offers. `tools` are JSON schemas in the form that chat templates take."""

    name: str
    tools: tuple[dict[str, Any], ...]
    has_reward: bool
    copies_by: str
    """`fork` (the class has it), `deepcopy`, or `replay` (copy.deepcopy refused a new object)."""

    @property
    def tool_names(self) -> tuple[str, ...]:
        """Names of the tools, in the order of the class."""
        return tuple(tool["function"]["name"] for tool in self.tools)


def path_of(name: str) -> str:
    """`path/to/file.py:Class` of an environment. Raises EnvironmentClassError for a name that is none.

    >>> path_of("mine.py:Counter")
    'mine.py:Counter'
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if not is_function_path(name):
        raise EnvironmentClassError(
            f"environment {name!r}: expected path/to/file.py:Class, or one of {', '.join(BUILT_IN)}"
            f"{nearest(name, BUILT_IN)}"
        )
    return name


def import_class(name: str) -> type:
    """The class, imported in this process, once it was found to keep the contract.

    Raises EnvironmentClassError that names the class, the method and what was expected.
    """
    what = f"environment {name!r}"
    try:
        found = import_object(path_of(name), what)
    except UserCodeError as error:
        raise EnvironmentClassError(str(error)) from error.__cause__
    if not inspect.isclass(found):
        try:
            found = class_of(functions_in(found))
        except NoFunction as error:
            raise EnvironmentClassError(f"{what}: {error}") from None
    _check_life_cycle(found, what)
    if not tools_of(found):
        raise EnvironmentClassError(f"{what}: it has no tools; expected at least one public method beside reset")
    return found


def tools_of(factory: type) -> dict[str, Callable[..., Any]]:
    """Name to function of the tools, in the order in which the class defines them."""
    members = {name: member for base in reversed(factory.__mro__) for name, member in vars(base).items()}
    return {
        name: member
        for name, member in members.items()
        if inspect.isfunction(member) and not name.startswith("_") and name not in LIFE_CYCLE
    }


def read_manifest(name: str, *, deadline_s: float = MANIFEST_DEADLINE_S) -> Manifest:
    """Import the class in a process of its own, check it, and return what it offers.

    Raises EnvironmentClassError for what `import_class` refuses, a tool without types or docstring, and an import
    that takes longer than `deadline_s` seconds.
    """
    command = [sys.executable, "-P", "-m", "treepo_mega.environment.manifest", path_of(name), name]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=deadline_s,
            env=worker_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentClassError(
            f"environment {name!r}: importing it and making an object took more than {deadline_s:g} s"
        ) from None
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        said = done.stderr.strip()[-400:]
        raise EnvironmentClassError(
            f"environment {name!r}: the process that imported it ended with status {done.returncode}: {said}"
        )
    # What the file prints comes before.
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise EnvironmentClassError(answer["error"])
    return Manifest(name, tuple(answer["tools"]), answer["has_reward"], answer["copies_by"])


def _check_life_cycle(factory: type, what: str) -> None:
    needed = [
        parameter.name
        for parameter in list(inspect.signature(factory.__init__).parameters.values())[1:]  # type: ignore[misc]
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    ]
    if needed:
        raise EnvironmentClassError(
            f"{what}: __init__ needs {', '.join(needed)}; expected no arguments: reset(**row) gets the row of the data"
        )
    if not inspect.isfunction(getattr(factory, "reset", None)):
        public = [name for name in vars(factory) if not name.startswith("_")]
        raise EnvironmentClassError(f"{what}: it has no method reset(**row){nearest('reset', public)}")
    for name, function in {"reset": factory.reset, **tools_of(factory)}.items():  # type: ignore[attr-defined]
        if inspect.iscoroutinefunction(function):
            raise EnvironmentClassError(f"{what}: {name} is async; expected a plain method: nothing awaits it")


def check_tool(function: Callable[..., Any], name: str, what: str) -> None:
    """Raises EnvironmentClassError for a tool whose parameters have no types, or which takes arguments by position."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    untyped = [parameter.name for parameter in parameters if parameter.annotation is inspect.Parameter.empty]
    if untyped:
        raise EnvironmentClassError(f"{what}: tool {name}: no type for {', '.join(untyped)}; expected one for each")
    by_position = [
        parameter.name
        for parameter in parameters
        if parameter.kind not in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ]
    if by_position:
        raise EnvironmentClassError(
            f"{what}: tool {name}: {', '.join(by_position)} cannot be passed by name, and a model names its arguments"
        )
    if not inspect.getdoc(function):
        raise EnvironmentClassError(
            f"{what}: tool {name} has no docstring; expected what it does, and an 'Args:' line for each parameter: the "
            "model reads them"
        )
