"""Imports run one way, torch.cuda is asked for in one place only, and every file has its page and stays short."""

import ast
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SOURCES = sorted((REPO / "treepo_mega").rglob("*.py"))


def test_import_contracts_hold():
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPO,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_the_runtime_asks_about_cuda():
    """Own code asks runtime/device.py. Two files retarget the calls of others, and so must name them."""
    allowed = {"runtime/device.py", "runtime/cpu_megatron.py", "engine/cuda_profile.py"}
    offenders = []
    for path in SOURCES:
        if path.relative_to(REPO / "treepo_mega").as_posix() in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.cuda"):
                offenders.append(f"{path.relative_to(REPO)}:{node.lineno}")
    assert not offenders


def test_every_module_opens_with_its_page_and_stays_short():
    pages = {p.relative_to(REPO).as_posix(): p.read_text() for p in SOURCES}
    assert [name for name, text in pages.items() if not ast.get_docstring(ast.parse(text))] == []
    assert [name for name, text in pages.items() if len(text.splitlines()) > 450] == []


def imported_modules(source: str) -> set[str]:
    """Modules of the package that `source` imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("treepo_mega.")}


def room_of(module: str) -> str:
    """The folder, or the single file, right below the package."""
    return module.split(".")[1]


def rooms_imported(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Room -> the other rooms that its files import."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        room = room_of(module)
        graph.setdefault(room, set()).update({room_of(name) for name in imported_modules(source)} - {room})
    return graph


def test_no_room_imports_back():
    """Unlike the contracts of .importlinter, this needs no list of layers that somebody keeps."""
    sources = {
        ".".join(path.relative_to(REPO).with_suffix("").parts): path.read_text()
        for path in SOURCES
        if path.parent != REPO / "treepo_mega" or path.name != "__init__.py"
    }
    graph = rooms_imported(sources)
    assert graph["rollout"] >= {"tree", "engine"}, "imports are found"
    # static_order raises CycleError, whose message lists the rooms of the circle.
    assert set(TopologicalSorter(graph).static_order()) >= graph.keys()


def test_a_circle_of_rooms_is_noticed():
    sources = {
        "treepo_mega.tree.pack": "def later():\n    from treepo_mega.loss import policy\n",
        "treepo_mega.loss.policy": "import treepo_mega.tree.pack\n",
    }
    with pytest.raises(CycleError, match="cycle"):
        list(TopologicalSorter(rooms_imported(sources)).static_order())
