"""How the package reads, in five numbers, each with a limit in pyproject.toml that may only get stricter.

    python tools/lint/style_report.py             print figures and limits; exit status 1 beyond a limit
    python tools/lint/style_report.py --update    also write today's figures where they are stricter than the limits

What is counted, over the files of treepo_mega/ with at least ten lines:
- single letters: names of one letter that are assigned, in loops and comprehensions too (`_` is none);
- packed assignments: `a, b = x, y`, which hides two statements in one line;
- comment share: lines that are nothing but a comment, where the reason for a trap stands;
- the longest file, and the longest docstring of a module, worked examples (`>>>` and their answers) apart.
"""

from __future__ import annotations

import argparse
import ast
import math
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SECTION = "[tool.treepo_mega.style]"
SMALLEST_FILE = 10
"""Lines; smaller files say nothing about style."""


@dataclass(frozen=True, slots=True)
class Style:
    """The figures of a set of files, by the names that they have in pyproject.toml."""

    single_letters_per_1000_lines: float
    packed_assignments_per_1000_lines: float
    comment_lines_percent: float
    longest_file_lines: float
    longest_module_docstring_lines: float


LEAST = {"comment_lines_percent"}
"""Figures whose limit is the least that is allowed; of all others it is the most."""

HOUSE_RULES = {"longest_file_lines"}
"""Limits that are chosen, not reached: `--update` leaves them."""


def measure(sources: Iterable[str]) -> Style:
    """The figures of `sources`, the texts of Python files. Raises ValueError when no file is long enough to count."""
    lines = letters = packed = comments = longest = docstring = 0
    for source in sources:
        length = len(source.splitlines())
        if length < SMALLEST_FILE:
            continue
        tree = ast.parse(source)
        lines += length
        longest = max(longest, length)
        page = ast.get_docstring(tree, clean=False)
        docstring = max(docstring, lines_of_prose(page or ""))
        comments += sum(line.lstrip().startswith("#") for line in source.splitlines())
        letters += sum(map(is_single_letter, ast.walk(tree)))
        packed += sum(map(is_packed, ast.walk(tree)))
    if not lines:
        raise ValueError(f"no file with at least {SMALLEST_FILE} lines")
    return Style(
        single_letters_per_1000_lines=1000 * letters / lines,
        packed_assignments_per_1000_lines=1000 * packed / lines,
        comment_lines_percent=100 * comments / lines,
        longest_file_lines=longest,
        longest_module_docstring_lines=docstring,
    )


def lines_of_prose(docstring: str) -> int:
    """Lines of a docstring that are no worked example; an example reaches from its prompt to the next blank line."""
    count = 0
    example = False
    for line in docstring.strip().splitlines():
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        count += not example
    return count


def is_single_letter(node: ast.AST) -> bool:
    """Whether the node gives a value to a name of one letter."""
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and len(node.id) == 1 and node.id != "_"


def is_packed(node: ast.AST) -> bool:
    """Whether the node assigns several written-out values to several targets in one statement."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    )


def broken(style: Style, limits: dict[str, float]) -> list[str]:
    """Figures beyond their limits, as sentences. Raises ValueError when limits and figures have different names."""
    figures = asdict(style)
    if figures.keys() != limits.keys():
        raise ValueError(f"pyproject.toml {SECTION} needs exactly the keys {', '.join(figures)}")
    return [
        f"{name} is {figure:.1f}, and its limit is {limits[name]:g}"
        for name, figure in figures.items()
        if (figure < limits[name] if name in LEAST else figure > limits[name])
    ]


def stricter(style: Style, limits: dict[str, float]) -> dict[str, float]:
    """The limits, each replaced by today's figure where that is stricter; rates keep one digit, rounded to be met."""
    out = dict(limits)
    for name, figure in asdict(style).items():
        if name in HOUSE_RULES:
            continue
        if name in LEAST:
            out[name] = max(limits[name], math.floor(figure * 10) / 10)
        else:
            out[name] = min(limits[name], math.ceil(figure * 10) / 10)
    return out


def write_limits(pyproject: Path, limits: dict[str, float]) -> None:
    """Replace the values of the limits in the file; its comments stay."""
    head, section, rest = pyproject.read_text(encoding="utf-8").partition(SECTION)
    for name, value in limits.items():
        rest = re.sub(rf"^({name} = )[0-9.]+", rf"\g<1>{value:g}", rest, count=1, flags=re.MULTILINE)
    pyproject.write_text(head + section + rest, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Count how the package reads, and hold it against its limits.")
    parser.add_argument("--update", action="store_true", help="make limits stricter where the figures allow it")
    args = parser.parse_args(argv)
    pyproject = REPO / "pyproject.toml"
    limits = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["treepo_mega"]["style"]
    style = measure(path.read_text(encoding="utf-8") for path in sorted((REPO / "treepo_mega").rglob("*.py")))
    problems = broken(style, limits)
    for name, figure in asdict(style).items():
        word = "at least" if name in LEAST else "at most"
        print(f"style: {name:<34} {figure:>6.1f}   {word} {limits[name]:g}")
    if args.update:
        write_limits(pyproject, stricter(style, limits))
    for problem in problems:
        print(f"style: {problem} (pyproject.toml {SECTION}; a limit only gets stricter)", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
