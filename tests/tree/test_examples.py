"""The examples in the docstrings of the tree package hold."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["node", "pack", "segments"])
def test_docstring_examples(name):
    module = importlib.import_module(f"treepo_mega.tree.{name}")
    failed, attempted = doctest.testmod(module)
    assert attempted >= 3
    assert failed == 0
