"""An environment's object in a worker: begun, called, copied and graded, with every outcome as a JSON-safe answer.

Random numbers of `random` and NumPy are seeded before each call, by a seed that the trainer gives. So what a tool
answers depends on neither the worker nor the other trajectories, as long as it draws from these two.
"""

from __future__ import annotations

import copy
import json
import math
import numbers
import random
import sys
from collections.abc import Callable
from typing import Any

from pydantic import ConfigDict, ValidationError, validate_call

from treepo_mega.environment.contract import import_class, tools_of
from treepo_mega.environment.state import cut_middle
from treepo_mega.errors import nearest
from treepo_mega.runtime.user_code import describe

Answer = dict[str, Any]


class Episodes:
    """The objects of one class that live in this process, by the trainer's number of their state."""

    def __init__(self, name: str, max_chars: int) -> None:
        """Import the class. Raises EnvironmentClassError."""
        self._factory = import_class(name)
        self._max_chars = max_chars
        # Checks and converts what a model gave: "5" becomes 5 where an int is expected, and a wrong type is named.
        checked = validate_call(config=ConfigDict(arbitrary_types_allowed=True))
        self._tools: dict[str, Callable[..., Any]] = {
            tool: checked(function) for tool, function in tools_of(self._factory).items()
        }
        self._alive: dict[int, Any] = {}

    def open(self, state: int, row: dict[str, Any], seed: int) -> Answer:
        """A new object in its first state: `text` is what reset returned, or None."""
        _seed(seed)
        try:
            instance = self._factory()
            returned = instance.reset(**row)
        except MemoryError:
            return _out_of_memory()
        except BaseException as error:
            return {"error": f"reset raised {describe(error)}"}
        self._alive[state] = instance
        return {"text": None if returned is None else self._text(returned)}

    def call(self, state: int, tool: str, arguments: Any, seed: int) -> Answer:
        """`text`: the observation. `failed`: that it says what went wrong, which is no reason to end anything."""
        instance = self._alive[state]
        function = self._tools.get(tool)
        if function is None:
            known = ", ".join(self._tools)
            return _failed(f"there is no tool {tool!r}{nearest(tool, self._tools)}; the tools are: {known}")
        if not isinstance(arguments, dict):
            return _failed(f"{tool}: the arguments are no JSON object")
        _seed(seed)
        try:
            return {"text": self._text(function(instance, **arguments))}
        except ValidationError as error:
            return _failed(f"{tool}: {_what_is_wrong(error)}")
        except MemoryError:
            return _out_of_memory()
        # Also SystemExit and KeyboardInterrupt: a tool must not end the worker without a word.
        except BaseException as error:
            return _failed(f"{tool} raised {type(error).__name__}: {cut_middle(str(error), self._max_chars)}")

    def copy(self, state: int, to: int) -> Answer:
        """A second object in the same state, by fork() if the class has it. `error`: it has to be rebuilt instead."""
        instance = self._alive[state]
        try:
            copied = instance.fork() if hasattr(instance, "fork") else copy.deepcopy(instance)
        except MemoryError:
            return _out_of_memory()
        except BaseException as error:
            return {"error": f"copying raised {describe(error)}"}
        if copied is instance or not isinstance(copied, self._factory):
            what = "itself" if copied is instance else type(copied).__name__
            return {"error": f"fork() returned {what}; expected another {self._factory.__name__}"}
        self._alive[to] = copied
        return {}

    def replay(self, state: int, row: dict[str, Any], seed: int, opening: str | None, history: list[Answer]) -> Answer:
        """Rebuild a state from its history. `error`: an answer differs from the one that the trajectory has seen."""
        begun = self.open(state, row, seed)
        if "text" not in begun:
            return begun
        if begun["text"] != opening:
            return self._differs(state, "reset", opening, begun["text"])
        for step, done in enumerate(history):
            answer = self.call(state, done["tool"], done["arguments"], done["seed"])
            if answer.get("retire"):
                return answer
            if answer["text"] != done["text"]:
                return self._differs(state, f"call {step} ({done['tool']})", done["text"], answer["text"])
        return {}

    def grade(self, state: int, seed: int) -> Answer:
        """`score`: what get_reward says now, a finite number."""
        _seed(seed)
        try:
            returned = self._alive[state].get_reward()
        except MemoryError:
            return _out_of_memory()
        except BaseException as error:
            return {"error": f"get_reward raised {describe(error)}"}
        if isinstance(returned, bool):
            returned = float(returned)
        if not isinstance(returned, numbers.Real) or not math.isfinite(float(returned)):
            return {
                "error": f"get_reward returned {type(returned).__name__} {returned!r:.60}; expected a finite number"
            }
        return {"score": float(returned)}

    def free(self, state: int) -> Answer:
        """Forget a state; its close() is called if the class has one."""
        instance = self._alive.pop(state, None)
        try:
            if hasattr(instance, "close"):
                instance.close()
        except BaseException as error:
            return {"error": f"close raised {describe(error)}"}
        return {}

    def _differs(self, state: int, where: str, before: Any, now: Any) -> Answer:
        self.free(state)
        return {
            "error": f"a replay differs at {where}: it answered {before!r:.80} and answers {now!r:.80} now. Draw "
            "random numbers from `random` or numpy.random, which are seeded, or give the class fork()"
        }

    def _text(self, returned: Any) -> str:
        """What a tool returned, as text: a str as it is, anything else as JSON or by str()."""
        if returned is None:
            return ""
        if not isinstance(returned, str):
            returned = json.dumps(returned, ensure_ascii=False, default=str)
        # Half a surrogate pair has no UTF-8, and would stop the tokenizer later.
        return cut_middle(returned, self._max_chars).encode("utf-8", "replace").decode("utf-8")


def _failed(what: str) -> Answer:
    return {"text": f"Error: {what}".encode("utf-8", "replace").decode("utf-8"), "failed": True}


def _out_of_memory() -> Answer:
    # What filled the memory may be what earlier calls left behind: this process must take no more of them.
    return {"error": "ran out of memory", "retire": True}


def _what_is_wrong(error: ValidationError) -> str:
    problems = [
        f"{'.'.join(str(part) for part in problem['loc']) or 'arguments'}: {problem['msg']}"
        for problem in error.errors(include_url=False)
    ]
    return "; ".join(problems)[:1000]


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
