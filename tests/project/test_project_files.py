"""The files around the code agree with it: workflows call the Makefile's targets, and every version is one version."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import treepo_mega
from treepo_mega.runtime.megatron_versions import PINS

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
VARIABLES = set(re.findall(r"\$\(([A-Z_]+)\)", MAKEFILE))
HOOKS = ROOT / ".pre-commit-config.yaml"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
YAML_FILES = [*sorted((ROOT / ".github").rglob("*.yml")), HOOKS, ROOT / "CITATION.cff"]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def setup_argument(name: str) -> Any:
    """What setup.py hands to setuptools as `name`."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == name:
            return ast.literal_eval(node.value)
    raise KeyError(name)


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_parses(path):
    assert isinstance(read(path), dict)


def test_every_lane_has_a_workflow_and_every_command_is_a_target_of_the_makefile():
    action = read(ROOT / ".github/actions/setup/action.yml")["runs"]["steps"]
    called = set()
    for step in [*action, *(step for path in WORKFLOWS for step in steps(path))]:
        if "run" not in step:
            continue
        command = re.sub(r"\$\{\{.*?\}\}", "1", step["run"])
        make, target, *assignments = command.split()
        assert make == "make" and target in TARGETS, command
        assert {text.partition("=")[0] for text in assignments} <= VARIABLES, command
        called.add(target)
    assert called == {"setup", "lint", "docs", "test", "test-slow", "test-matrix", "test-cuda-profile", "test-curves"}


def test_every_job_sets_up_the_project_and_ends_by_itself():
    for path in WORKFLOWS:
        for name, job in read(path)["jobs"].items():
            used = [step.get("uses", "") for step in job["steps"]]
            assert used[:2] == ["actions/checkout@v4", "./.github/actions/setup"], name
            assert job["timeout-minutes"] <= 180, name


def test_the_slow_lane_is_divided_without_a_rest():
    (job,) = [job for path in WORKFLOWS for job in read(path)["jobs"].values() if "strategy" in job]
    shards = job["strategy"]["matrix"]["shard"]
    (command,) = [step["run"] for step in job["steps"] if "SHARD" in step.get("run", "")]
    assert shards == list(range(1, len(shards) + 1))
    assert f"SHARD=${{{{ matrix.shard }}}}/{len(shards)}" in command


def test_python_is_said_once():
    action = read(ROOT / ".github/actions/setup/action.yml")
    (used,) = [step["with"]["python-version"] for step in action["runs"]["steps"] if "setup-python" in str(step)]
    version = action["inputs"]["python"]["default"]
    assert used == "${{ inputs.python }}" and version == "3.11"
    jobs = [job for path in WORKFLOWS for job in read(path)["jobs"].values()]
    asked = {str(step["with"]["python"]) for job in jobs for step in job["steps"] if "python" in step.get("with", {})}
    assert {version, *asked} == {".".join(map(str, python)) for python in PINS}, "each lane runs"
    for other in asked:
        (job,) = [job for job in jobs if other in str(job["steps"])]
        assert f"PYTHON=python{other}" in job["steps"][-1]["run"], "or make would find the other one"
    assert setup_argument("python_requires") == ">=3.11,<3.13"
    assert "(3, 11) <= sys.version_info < (3, 13)" in (ROOT / "tools/setup_env.py").read_text(encoding="utf-8")
    assert f"Programming Language :: Python :: {version}" in setup_argument("classifiers")
    assert read(HOOKS)["default_language_version"]["python"] == f"python{version}"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_has_what_the_site_asks_for(path):
    form = read(path)
    assert {"name", "description", "body"} <= form.keys()
    names = [field["id"] for field in form["body"]]
    assert len(set(names)) == len(names)
    for field in form["body"]:
        assert field["type"] in {"textarea", "input", "dropdown", "checkboxes"}
        assert field["attributes"]["label"]
        assert field["type"] != "dropdown" or field["attributes"]["options"]


def test_hooks_run_the_tools_of_make_lint():
    hooks = {hook["id"]: hook for repo in read(HOOKS)["repos"] for hook in repo["hooks"]}
    assert {"ruff", "ruff-format", "mypy", "import-contracts", "end-of-file-fixer", "shellcheck"} <= hooks.keys()
    for hook in hooks.values():
        if hook.get("language") == "system":
            tool = Path(hook["entry"].split()[0]).name
            assert re.search(rf"^\t\$\(BIN\)/{tool}\b", MAKEFILE, re.MULTILINE), f"{tool} is not part of make lint"
    scripts = [*(ROOT / "slurm").glob("*.sh"), *(ROOT / ".ci").iterdir()]
    wanted = re.compile(hooks["shellcheck"]["files"])
    assert scripts and all(wanted.search(path.relative_to(ROOT).as_posix()) for path in scripts)


def test_the_citation_names_this_version_and_the_paper():
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == treepo_mega.__version__
    assert citation["license"] == setup_argument("license")
    (paper,) = citation["references"]
    assert paper["url"] in setup_argument("project_urls").values()
    assert paper["url"] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_changelog_has_a_section_for_this_version_and_one_for_what_comes():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert heads[:2] == ["Unreleased", treepo_mega.__version__]
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.fixture
def gpu_static() -> ModuleType:
    """tools/bench/gpu_static.py, which is no package's module."""
    path = ROOT / "tools" / "bench" / "gpu_static.py"
    spec = importlib.util.spec_from_file_location("gpu_static", path)
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = bench
    spec.loader.exec_module(bench)
    return bench


def test_a_proof_that_was_skipped_or_failed_in_one_case_proves_nothing(gpu_static: ModuleType) -> None:
    output = """PASSED tests/x.py::good
PASSED tests/x.py::cases[with - a dash]
PASSED tests/x.py::mixed[first]
SKIPPED [1] tests/x.py:7: no index
ERROR tests/x.py::broken - fixture
FAILED tests/x.py::mixed[second] - assert 1 == 2"""
    proofs = [f"tests/x.py::{name}" for name in ("good", "cases", "mixed", "skipped", "broken")]
    assert gpu_static.not_proven(proofs, output) == proofs[2:]


def test_every_finding_about_gpus_has_a_proof_that_exists(gpu_static: ModuleType) -> None:
    bench = gpu_static
    assert bench.unknown_proofs() == []
    for finding in bench.FINDINGS:
        assert finding.status in ("mended", "answered", "open")
        assert bool(finding.proof) == (finding.status != "open"), finding.id


def test_every_script_finds_tools_without_the_repository_on_the_path():
    """`python tools/bench/x.py` puts that folder on the path, where a test run has the repository's root."""
    for path in sorted((ROOT / "tools").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' not in text or not re.search(r"^from tools[. ]", text, re.MULTILINE):
            continue
        before = text[: re.search(r"^from tools[. ]", text, re.MULTILINE).start()]
        assert "sys.path.insert(0," in before or "sys.path[:0] =" in before, (
            f"{path.relative_to(ROOT)} imports `tools` before it can be found"
        )
