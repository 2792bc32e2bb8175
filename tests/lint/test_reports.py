"""The reports of `make lint` count what they say, and a figure beyond its limit ends them with an error."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    """tools/lint/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(f"lint_{name}", ROOT / "tools" / "lint" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A frozen dataclass with slots looks its module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


style_report = load("style_report")
typed_share = load("typed_share")

SAMPLE = '''"""One.

Three lines of page.
"""

# Why: a reason.
x, y = 1, 2
first, second = pair
for i in range(3):
    total = sum(k for k in range(i))
_ = [name for name in "ab"]
'''


def test_the_figures_are_those_of_a_sample():
    style = style_report.measure([SAMPLE, "q = 1\n"])  # a file below ten lines is not counted
    per_1000 = 1000 / 11
    assert style.single_letters_per_1000_lines == pytest.approx(4 * per_1000)  # x, y, i, k
    assert style.packed_assignments_per_1000_lines == pytest.approx(per_1000)  # a value that is a name is not packed
    assert style.comment_lines_percent == pytest.approx(100 / 11)
    assert (style.longest_file_lines, style.longest_module_docstring_lines) == (11, 3)
    with pytest.raises(ValueError, match="no file with at least 10 lines"):
        style_report.measure(["x = 1\n"])


def test_a_limit_is_a_most_or_a_least_and_only_gets_stricter():
    style = style_report.measure([SAMPLE])
    loose = {
        "single_letters_per_1000_lines": 400.0,
        "packed_assignments_per_1000_lines": 100.0,
        "comment_lines_percent": 1.0,
        "longest_file_lines": 450.0,
        "longest_module_docstring_lines": 30.0,
    }
    assert style_report.broken(style, loose) == []
    tight = style_report.stricter(style, loose)
    assert style_report.broken(style, tight) == []
    assert tight["comment_lines_percent"] == 9.0 and tight["single_letters_per_1000_lines"] == 363.7
    assert tight["longest_file_lines"] == 450.0, "a house rule stays"
    worse = {name: (value + 1 if name in style_report.LEAST else value - 1) for name, value in tight.items()}
    assert len(style_report.broken(style, worse)) == 4
    assert style_report.stricter(style, worse) == worse, "never looser"
    with pytest.raises(ValueError, match="needs exactly the keys"):
        style_report.broken(style, {"single_letters": 1.0})


def test_writing_limits_keeps_the_rest_of_the_file(tmp_path: Path):
    file = tmp_path / "pyproject.toml"
    file.write_text((ROOT / "pyproject.toml").read_text())
    before = tomllib.loads(file.read_text())
    limits = before["tool"]["treepo_mega"]["style"]
    style_report.write_limits(file, limits | {"comment_lines_percent": 99.5, "longest_file_lines": 12})
    after = tomllib.loads(file.read_text())
    changed = {"comment_lines_percent": 99.5, "longest_file_lines": 12}
    assert after["tool"]["treepo_mega"].pop("style") == limits | changed
    del before["tool"]["treepo_mega"]["style"]
    assert after == before
    assert "# How the package reads" in file.read_text()


@pytest.mark.parametrize(
    ("module", "typed"),
    [
        ("pkg.tree", True),
        ("pkg.tree.pack", True),
        ("pkg.cli", True),
        ("pkg.data", False),
        ("pkg.tree.kernels", False),
        ("pkg.tree.kernels.rows", False),
        ("pkg.trees", False),
    ],
)
def test_what_counts_as_typed(module: str, typed: bool):
    settings = {
        "packages": ["pkg.tree"],
        "modules": ["pkg.cli"],
        "disallow_untyped_defs": True,
        "overrides": [{"module": ["pkg.tree.kernels.*"], "ignore_errors": True}, {"module": "pkg.other"}],
    }
    assert typed_share.is_typed(module, settings) is typed
    assert not typed_share.is_typed(module, settings | {"disallow_untyped_defs": False})


def test_the_project_meets_its_own_limits(capsys: pytest.CaptureFixture[str]):
    assert typed_share.main() == 0 and style_report.main([]) == 0, "make lint says the same"
    said = capsys.readouterr().out
    assert "types: mypy checks" in said and said.count("style: ") == 5
