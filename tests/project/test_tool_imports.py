"""What scripts under tools/ and examples/ import is there. Nothing starts most of them, so nobody else would notice."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path.relative_to(ROOT) for folder in ("tools", "examples", "slurm") for path in (ROOT / folder).rglob("*.py")
)


def names_of(path: Path) -> list[tuple[int, str, str | None]]:
    """(line, module, name) of each import of this project, or of a script beside this one; name None: a module."""
    found: list[tuple[int, str, str | None]] = []
    beside = {other.stem for other in path.parent.glob("*.py")} | {
        other.stem for other in path.parent.parent.glob("*.py")
    }
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [(node.lineno, node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [(node.lineno, alias.name, None) for alias in node.names]
        else:
            continue
        found += [name for name in names if name[1].split(".")[0] in {"treepo_mega", *beside}]
    return found


def defined_in(path: Path) -> set[str]:
    """Names that a script defines at its top level, or imports there."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_what_a_script_imports_is_there(script: Path) -> None:
    path = ROOT / script
    for line, module, name in names_of(path):
        where = f"{script}:{line}"
        if module.split(".")[0] != "treepo_mega":
            own = next(
                other
                for folder in (path.parent, path.parent.parent)
                if (other := folder / f"{module.split('.')[0]}.py").exists()
            )
            assert name is None or name in defined_in(own), f"{where}: {own.name} has no {name}"
            continue
        if name is None:
            assert importlib.util.find_spec(module) is not None, f"{where}: no module {module}"
            continue
        home = sys.modules.get(module) or importlib.import_module(module)
        there = hasattr(home, name) or importlib.util.find_spec(f"{module}.{name}") is not None
        assert there, f"{where}: {module} has no {name}"
