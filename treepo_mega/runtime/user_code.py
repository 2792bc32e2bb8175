"""Functions of people's own, named `path/to/file.py:function`: found, imported, and their parameters compared.

    check_defined(name, what)                  # parsed, never run: file, function and parameters
    function = import_function(name, what)     # runs the file
    passed = check_parameters(parameters_of(function), ("tree",), ("step",), what)

`what` begins every message. Paths are relative to the working directory. Only the standard library is imported here:
a grader process imports this module.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from treepo_mega.errors import TreepoError, nearest
from treepo_mega.text.function_path import FORM, split_function_path

ANY_NAME = inspect.Parameter.VAR_KEYWORD
_GIVEN = inspect.Parameter.empty
MAX_TEXT = 500
"""Characters of an exception that stand in a message."""


class UserCodeError(TreepoError):
    """A function of people's own that cannot be used; the message names it, what is wrong and the nearest name."""


def check_defined(name: str, what: str, *, may_be_async: bool = False) -> list[inspect.Parameter] | None:
    """The parameters of the function that `name` names, read from its file without running it.

    None when they cannot be known so: the name is imported, assigned or decorated there. Raises UserCodeError for a
    name of another form, a missing file or function, text that is no Python, and an async function where none may be.
    """
    path, function = _split(name, what)
    tree = _parse(path, what)
    defined = _names(tree)
    if function not in defined:
        hint = nearest(function, defined) or f"; it defines: {', '.join(sorted(defined)) or 'nothing'}"
        raise UserCodeError(f"{what}: {path} defines no {function!r}{hint}")
    last = _last_definition(tree, function)
    if isinstance(last, ast.AsyncFunctionDef) and not may_be_async:
        raise UserCodeError(_async(what, function))
    if isinstance(last, ast.FunctionDef | ast.AsyncFunctionDef) and not last.decorator_list:
        return _written_parameters(last.args)
    return None


def is_written_async(name: str, what: str) -> bool:
    """Whether the file of `name` defines it by `async def`; nothing is run. Raises what `check_defined` raises."""
    path, function = _split(name, what)
    return isinstance(_last_definition(_parse(path, what), function), ast.AsyncFunctionDef)


def import_object(name: str, what: str, *, may_be_async: bool = True) -> Any:
    """Whatever `name` names, such as a list; its file is run once in this process.

    Raises UserCodeError for all that `check_defined` refuses, and for a file whose import raises.
    """
    check_defined(name, what, may_be_async=may_be_async)
    path, attribute = _split(name, what)
    try:
        module = _import(path.resolve(), hashlib.sha256(path.read_bytes()).hexdigest())
    # Also SystemExit: a script without a main guard must not end the run without a word.
    except (Exception, SystemExit) as error:
        raise UserCodeError(f"{what}: {path} cannot be imported: {describe(error)}") from error
    return getattr(module, attribute, None)


def import_function(name: str, what: str, *, asynchronous: bool = False) -> Callable[..., Any]:
    """The function that `name` names; its file is run once in this process.

    Raises UserCodeError for all that `check_defined` refuses, for a file whose import raises, for what is not
    callable, and for what is async where that is not asked for, or the other way round.
    """
    found = import_object(name, what, may_be_async=asynchronous)
    _, function = _split(name, what)
    if not callable(found):
        raise UserCodeError(f"{what}: {function!r} is {type(found).__name__}, expected a function")
    call = getattr(found, "__call__", None)  # noqa: B004 - callable objects count as what their __call__ is
    if (inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(call)) != asynchronous:
        if asynchronous:
            raise UserCodeError(
                f"{what}: {function!r} is written async, but its decorator makes a plain function of it"
            )
        raise UserCodeError(_async(what, function))
    return found


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """The parameters of a function; None for callables of C, which do not say."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def check_parameters(
    parameters: Sequence[inspect.Parameter] | None, required: Sequence[str], optional: Sequence[str], what: str
) -> tuple[str, ...]:
    """The names to pass, all by keyword: every required one, and the optional ones that the function has.

    Raises UserCodeError for a required name that the function does not take, and for a parameter without default that
    nothing is passed for.
    """
    if parameters is None:
        return tuple(required)
    expected = f"; expected the parameters {', '.join(required)}"
    expected += f", and as you like {', '.join(optional)}" if optional else ""
    offered = (*required, *optional)
    named = {p.name: p for p in parameters if p.kind not in (ANY_NAME, inspect.Parameter.VAR_POSITIONAL)}
    takes_any = any(p.kind is ANY_NAME for p in parameters)
    for name, parameter in named.items():
        if parameter.default is not _GIVEN:
            continue
        if name not in offered:
            raise UserCodeError(
                f"{what}: nothing is passed for its parameter {name!r}{nearest(name, offered)}{expected}"
            )
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise UserCodeError(f"{what}: its parameter {name!r} is positional-only, but all are passed by name")
    for name in required:
        if name not in named and not takes_any:
            raise UserCodeError(f"{what}: it has no parameter {name!r}{nearest(name, named)}{expected}")
    return tuple(name for name in offered if name in required or name in named)


def describe(error: BaseException) -> str:
    """An exception in one line, with the last place in people's own code.

    >>> describe(ValueError("no box"))
    'ValueError: no box'
    """
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:MAX_TEXT]}{where}"


def _split(name: str, what: str) -> tuple[Path, str]:
    parts = split_function_path(name)
    if parts is None:
        raise UserCodeError(f"{what}: expected {FORM}")
    return Path(parts[0]), parts[1]


def _parse(path: Path, what: str) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except OSError as error:
        near = nearest(path.name, (other.name for other in path.parent.glob("*.py")))
        raise UserCodeError(f"{what}: cannot read {path}: {error.strerror or error}{near}") from None
    except (SyntaxError, ValueError) as error:
        raise UserCodeError(f"{what}: {path} is not valid Python: {error}") from None


def _last_definition(tree: ast.Module, function: str) -> ast.AST | None:
    # The last definition of a name is the one that an import would find.
    found = [node for node in tree.body if getattr(node, "name", None) == function]
    return found[-1] if found else None


def _names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _async(what: str, function: str) -> str:
    return f"{what}: {function!r} is async, expected a plain function: nothing awaits it"


def _written_parameters(arguments: ast.arguments) -> list[inspect.Parameter]:
    """The parameters as they stand in a `def`. A default is there or not; its value is not computed."""
    kinds = inspect.Parameter
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    found = [
        kinds(
            argument.arg,
            kinds.POSITIONAL_ONLY if index < len(arguments.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD,
            default=None if index >= first_default else _GIVEN,
        )
        for index, argument in enumerate(positional)
    ]
    if arguments.vararg:
        found.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(kinds(argument.arg, kinds.KEYWORD_ONLY, default=_GIVEN if default is None else None))
    if arguments.kwarg:
        found.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return found


@functools.cache
def _import(path: Path, digest: str) -> ModuleType:
    """The module of a file, run once. `digest` is of its text: a file that changed is run anew."""
    # The path is in the name: two files called reward.py would otherwise replace each other in sys.modules.
    name = f"treepo_mega_user_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{digest[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"Python knows no loader for {path}")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and the like look their module up.
    sys.modules[name] = module
    # The file's neighbours can be imported, after everything else.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module
