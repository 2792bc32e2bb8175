"""`python -m treepo_mega.environment.manifest PATH NAME`: one JSON line about a class, for `contract.read_manifest`.

A process of its own, because the file is people's own code, and because transformers, which writes the schemas that
chat templates expect, imports torch: no worker carries that.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

from treepo_mega.environment.contract import EnvironmentClassError, check_tool, import_class, tools_of
from treepo_mega.runtime.user_code import describe


def describe_class(path: str, what: str) -> dict[str, Any]:
    """Tools as JSON schemas, whether it has get_reward, and how its objects are copied.

    Raises EnvironmentClassError for a class that breaks the contract.
    """
    from transformers.utils import get_json_schema

    factory = import_class(path)
    schemas = []
    for name, function in tools_of(factory).items():
        check_tool(function, name, what)
        try:
            schemas.append(get_json_schema(function))
        except Exception as error:
            raise EnvironmentClassError(f"{what}: tool {name}: {error}") from None
    try:
        instance = factory()
    except Exception as error:
        raise EnvironmentClassError(f"{what}: making an object of it raised {describe(error)}") from None
    return {"tools": schemas, "has_reward": hasattr(factory, "get_reward"), "copies_by": _copies_by(instance)}


def _copies_by(instance: object) -> str:
    if hasattr(instance, "fork"):
        return "fork"
    try:
        copy.deepcopy(instance)
    except Exception:
        return "replay"
    return "deepcopy"


def main() -> None:
    """Print the line."""
    path, name = sys.argv[1:3]
    try:
        answer = describe_class(path, f"environment {name!r}")
    except EnvironmentClassError as error:
        answer = {"error": str(error).replace(path, name)}
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
