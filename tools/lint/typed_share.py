"""The share of the package's lines that mypy checks strictly; exit status 1 below the floor.

    python tools/lint/typed_share.py

A file counts when [tool.mypy] in pyproject.toml names its package or module, and no override sets `ignore_errors` or
`disallow_untyped_defs = false` for it. The floor is a promise to those who import the package: it ships `py.typed`.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
FLOOR_PERCENT = 70


def module_of(path: Path, root: Path) -> str:
    """Dotted name of the file `path` below `root`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_within(module: str, patterns: list[str]) -> bool:
    """Whether one of mypy's patterns means the module: `a.b` is itself, `a.b.*` also all that stands below."""
    return any(module == pattern.removesuffix(".*") or fnmatchcase(module, pattern) for pattern in patterns)


def is_typed(module: str, settings: Mapping[str, Any]) -> bool:
    """Whether mypy checks the module, and wants its functions annotated."""
    below = [name for package in settings.get("packages", []) for name in (package, f"{package}.*")]
    if not is_within(module, [*below, *settings.get("modules", [])]):
        return False
    for override in settings.get("overrides", []):
        patterns = override["module"] if isinstance(override["module"], list) else [override["module"]]
        if is_within(module, patterns) and (
            override.get("ignore_errors") or override.get("disallow_untyped_defs") is False
        ):
            return False
    return bool(settings.get("disallow_untyped_defs"))


def main() -> int:
    """Print the share and what is left out; returns the exit status."""
    settings = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    lines = {module_of(path, REPO): len(path.read_text(encoding="utf-8").splitlines()) for path in package_files()}
    typed = sum(count for module, count in lines.items() if is_typed(module, settings))
    percent = 100 * typed / sum(lines.values())
    print(f"types: mypy checks {percent:.1f} % of {sum(lines.values())} lines, at least {FLOOR_PERCENT} %")
    if left_out := [module for module in lines if not is_typed(module, settings)]:
        print(f"types: not checked: {', '.join(left_out)}")
    return 0 if percent >= FLOOR_PERCENT else 1


def package_files() -> list[Path]:
    """Every Python file of the package."""
    return sorted((REPO / "treepo_mega").rglob("*.py"))


if __name__ == "__main__":
    sys.exit(main())
