"""`data.environment: calculator`: exact arithmetic, by a parser of its own and never by eval."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

MAX_CHARS = 1000
MAX_POWER = 64
MAX_BITS = 4096
"""Longer numbers are refused: 9**9**9 would keep a worker busy until its deadline."""

OPERATORS: dict[type[ast.AST], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda left, right: Fraction(left // right),
    ast.Mod: operator.mod,
}


class Calculator:
    """One tool, no state."""

    def reset(self, **row: Any) -> None:
        """Begin with any row of the data."""

    def calculate(self, expression: str) -> str:
        """Work out an arithmetic expression exactly.

        Args:
            expression: Whole numbers and decimals with + - * / // % ** and parentheses, such as (3 + 4) * 2.
        """
        if len(expression) > MAX_CHARS:
            raise ValueError(f"the expression has {len(expression)} characters, at most {MAX_CHARS} are read")
        value = evaluate(ast.parse(expression.strip(), mode="eval").body)
        return str(value.numerator) if value.denominator == 1 else str(value)


def evaluate(node: ast.AST) -> Fraction:
    """The value of an expression of numbers. Raises ValueError for anything else.

    >>> evaluate(ast.parse("1 / 3 + 2", mode="eval").body)
    Fraction(7, 3)
    """
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = Fraction(str(node.value))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        operand = evaluate(node.operand)
        value = -operand if isinstance(node.op, ast.USub) else operand
    elif isinstance(node, ast.BinOp):
        value = _joined(node.op, evaluate(node.left), evaluate(node.right))
    else:
        raise ValueError(f"only numbers and + - * / // % ** ( ) are understood, found {ast.unparse(node)[:40]!r}")
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError(f"a number has more than {MAX_BITS} bits")
    return value


def _joined(kind: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    if isinstance(kind, ast.Pow):
        if right.denominator != 1 or abs(right) > MAX_POWER:
            raise ValueError(f"powers are whole numbers of at most {MAX_POWER}")
        return Fraction(left ** int(right))
    if type(kind) not in OPERATORS:
        raise ValueError(f"the operator {type(kind).__name__} is not understood")
    return OPERATORS[type(kind)](left, right)
