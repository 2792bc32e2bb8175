"""The documentation agrees with the code: generated pages are fresh; the keys, metrics, files, recipes it names exist.

The site itself is built, strictly, by `make docs`.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.keys import ALL_KEYS, KEY, is_key
from treepo_mega.config import check, parse_config
from treepo_mega.monitor.registry import METRICS, known_names

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("configuration.md", "metrics.md")
WRITTEN = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.name not in GENERATED)]
MINIMAL = {"model": {"hf_checkpoint": "DIR"}, "data": {"train": [{"path": "my.jsonl"}]}}
NOT_KEYS = re.compile(r"\.(py|json|jsonl|html|yaml|safetensors)$|^train\.lrr$|^rollout\.segment_length$")
"""Files that are named like keys, and the mistakes that the page of errors explains."""

every_page = pytest.mark.parametrize("page", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))


def load_generator() -> ModuleType:
    """tools/docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "tools" / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def merged(base: dict[str, object], change: dict[str, object]) -> dict[str, object]:
    """`base` with the keys of `change` put over it, section by section."""
    out = dict(base)
    for key, value in change.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("name", [*GENERATED, "errors.md"])
def test_a_generated_page_is_what_the_code_says(name):
    pages = {path.name: text for path, text in load_generator().pages().items()}
    page = ROOT / "docs" / name
    assert page.read_text(encoding="utf-8") == pages[name], "run python tools/docs/generate.py"


def test_the_generator_notices_an_old_page(tmp_path, monkeypatch, capsys):
    generator = load_generator()
    monkeypatch.setattr(generator, "DOCS", tmp_path)
    assert generator.main(["--check"]) == 1
    assert "metrics.md is out of date" in capsys.readouterr().out
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0


def test_every_metric_stands_on_the_page_once():
    text = load_generator().render_metrics_markdown()
    assert [m.name for m in METRICS if text.count(f"| `{m.name}` |") != 1] == []


def test_every_configuration_key_stands_on_the_page():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")

    names = [key.rpartition(".")[2] for key in ALL_KEYS]
    assert [name for name in names if name not in text] == []


def test_every_page_is_in_the_navigation():
    """The strict build refuses a page that nobody can reach; this says so without building."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in navigation] == [], "add it to nav in mkdocs.yml"


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


@every_page
def test_every_key_it_names_exists(page):
    found = set(KEY.findall(page.read_text(encoding="utf-8")))
    assert sorted(key for key in found if not is_key(key) and not NOT_KEYS.search(key)) == []


@every_page
def test_every_metric_it_names_exists(page):
    prefixes = sorted({m.name.partition("/")[0] for m in METRICS if "/" in m.name})
    text = page.read_text(encoding="utf-8")
    found = set(re.findall(rf"`((?:{'|'.join(prefixes)})/[a-z0-9_]+)`", text))
    metrics = known_names()
    assert sorted(name for name in found if name not in metrics and not (ROOT / "treepo_mega" / name).exists()) == []


@every_page
def test_every_file_it_names_exists(page):
    text = page.read_text(encoding="utf-8")
    found = set(re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]*(?:\.(?:py|sh|md))?)`", text))
    found = {name for name in found if "." in name or name.endswith("/")}
    tops = ("", "treepo_mega")
    prefixes = {m.name.partition("/")[0] + "/" for m in METRICS}
    examples = {"path/to/file.py", "path/to/reward.py"}
    missing = {n for n in found - prefixes - examples if not any((ROOT / top / n).exists() for top in tops)}
    assert sorted(missing) == []
    if page.name == "README.md":
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        assert links, "the README points somewhere"
        assert [link for link in links if not (ROOT / link).exists()] == []


@every_page
def test_every_recipe_it_shows_loads(page):
    for text in blocks(page, "yaml"):
        raw = yaml.safe_load(text)
        whole = "model" in raw and "data" in raw and "rollout" in raw
        cfg = parse_config(raw if whole else merged(MINIMAL, raw))
        if whole:
            assert check(cfg, 1), "a recipe that can be copied obeys the rules that join keys"


@every_page
def test_every_override_it_shows_is_one(page):
    shown = [word for text in blocks(page, "bash") for word in text.split() if re.match(r"'?[a-z]+\.[a-z_.]+=", word)]
    assert [word for word in shown if not is_key(word.strip("'").partition("=")[0])] == []


def test_every_recipe_stands_on_the_page_of_examples():
    text = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    recipes = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
    assert [path.name for path in recipes if f"`examples/recipes/{path.name}`" not in text] == []


@every_page
def test_every_file_it_includes_is_one(page):
    """A mark that a formatter took apart would be shown as it stands, and the build would not say so."""
    text = page.read_text(encoding="utf-8")
    marks = [line for line in text.splitlines() if re.match(r"-+\s*8\s*<", line)]
    names = [re.fullmatch(r'--8<-- "([^":]+)(:\w+)?"', line) for line in marks]
    assert [line for line, name in zip(marks, names, strict=True) if not name or not (ROOT / name[1]).exists()] == []
