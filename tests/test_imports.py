"""The import contracts of .importlinter hold, and torch.cuda is asked for in one place only."""

import ast
import subprocess
import sys
from pathlib import Path

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
    """Own code asks runtime/device.py; cpu_megatron.py retargets Megatron's calls and so must name them."""
    allowed = {"runtime/device.py", "runtime/cpu_megatron.py"}
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
    assert [name for name, text in pages.items() if len(text.splitlines()) > 600] == []
