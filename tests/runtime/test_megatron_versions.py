"""Two versions of megatron-core: pins, and one file that knows where they differ."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from treepo_mega.runtime import megatron_versions
from treepo_mega.runtime.megatron_versions import PINS, environment_problems, mark_shard, mlp_submodules

REPO = Path(__file__).parents[2]
HOME = REPO / "treepo_mega" / "runtime" / "megatron_versions.py"
ASKED_OF_MEGATRON = {"__version__", "package_info", "get_mcore_version", "is_mcore_min_version"}


def version_tests(source: str) -> list[int]:
    """Lines of `source` that ask which Python or which Megatron this is; comments and docstrings do not count."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        asks_python = isinstance(node, ast.Attribute) and node.attr in ("version_info", "hexversion")
        names_version = isinstance(node, ast.Constant) and re.fullmatch(r"0\.1[69](\.\d+)?", str(node.value))
        asks_metadata = (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).rpartition(".")[2] in ("version", "_version")
            and [ast.unparse(argument) for argument in node.args] == ["'megatron-core'"]
        )
        asks_megatron = (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("megatron")
            and ASKED_OF_MEGATRON.intersection(alias.name for alias in node.names)
        )
        if asks_python or names_version or asks_metadata or asks_megatron:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nx = sys.version_info >= (3, 12)",
        "from importlib import metadata\nx = metadata.version('megatron-core')",
        "from megatron.core import __version__",
        "from megatron.core.utils import is_mcore_min_version",
        "x = '0.19.2' in y",
    ],
)
def test_a_test_of_the_version_is_found(source):
    assert version_tests(source)
    assert not version_tests('"""Megatron-Core 0.16.1."""\nfrom megatron.core import parallel_state')


def test_no_other_file_asks_for_the_version():
    assert version_tests(HOME.read_text(encoding="utf-8"))
    others = [path for path in sorted((REPO / "treepo_mega").rglob("*.py")) if path != HOME]
    found = [f"{path}:{line}" for path in others for line in version_tests(path.read_text(encoding="utf-8"))]
    assert found == []


def test_setup_chooses_the_pin_by_python():
    body = ast.parse((REPO / "setup.py").read_text(encoding="utf-8")).body
    values = {ast.unparse(node.targets[0]): node.value for node in body if isinstance(node, ast.Assign)}
    required = ast.literal_eval(values["REQUIRED"])
    every = [Requirement(text) for text in required if text.startswith("megatron-core")]
    assert all(needs.marker for needs in every)
    for python, pin in PINS.items():
        here = {"python_version": ".".join(map(str, python))}
        assert [str(needs.specifier) for needs in every if needs.marker.evaluate(here)] == [f"=={pin}"]
    assert metadata.version("megatron-core") == PINS[sys.version_info[:2]]
    assert f'"{megatron_versions.TRITON}"' in (REPO / "setup.py").read_text(encoding="utf-8")


def test_the_megatron_of_another_python_is_named(monkeypatch):
    assert environment_problems() == []
    wrong, right = ("0.19.2", "0.16.1") if PINS[sys.version_info[:2]] == "0.16.1" else ("0.16.1", "0.19.2")
    monkeypatch.setattr(megatron_versions.metadata, "version", lambda name: wrong)
    (problem,) = environment_problems()
    assert f"megatron-core {wrong} is installed" in problem
    assert f"pip install megatron-core=={right}" in problem


@pytest.mark.parametrize("later", [False, True])
def test_only_the_later_one_cannot_do_without_triton(monkeypatch, later):
    monkeypatch.setattr(megatron_versions, "_is_later", lambda: later)
    assert environment_problems() == []
    monkeypatch.setattr(megatron_versions.importlib.util, "find_spec", lambda name: None)
    problems = environment_problems()
    assert len(problems) == later
    assert all("imports triton" in problem and "pip install triton==" in problem for problem in problems)


def marks(weight: torch.Tensor) -> dict[str, object]:
    return {name: value for name, value in vars(weight).items() if "partition" in name or "parallel" in name}


def test_a_shard_is_marked_on_the_earlier_version_and_found_marked_on_the_later(monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    monkeypatch.setattr(megatron_versions, "_is_later", lambda: True)
    with pytest.raises(RuntimeError, match=r"shard along 1 as .* \(None, None\)"):
        mark_shard(weight, dim=1)
    monkeypatch.setattr(megatron_versions, "_is_later", lambda: False)
    mark_shard(weight, dim=1)
    assert marks(weight) == {"tensor_model_parallel": True, "partition_dim": 1, "partition_stride": 1}
    monkeypatch.setattr(megatron_versions, "_is_later", lambda: True)
    mark_shard(weight, dim=1)
    with pytest.raises(RuntimeError, match=r"shard along 0 as .* \(True, 1\)"):
        mark_shard(weight, dim=0)


@pytest.mark.parametrize("experts", [None, 4])
def test_the_modules_of_an_mlp_are_found_in_the_spec_of_a_layer(experts):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    layer = get_gpt_layer_local_spec(num_experts=experts)
    of_mlp = mlp_submodules(layer)
    assert hasattr(of_mlp, "router" if experts else "linear_fc1")
    assert mlp_submodules(layer) is of_mlp, "what is changed there stays"
