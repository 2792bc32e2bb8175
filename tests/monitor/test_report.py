"""`treepo-mega report`: the figures are right, the page is self-contained, hostile text stays text."""

import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from tokenizers import Tokenizer, models

from treepo_mega.cli import main
from treepo_mega.monitor.metrics import MetricsLogger
from treepo_mega.monitor.report import ReportError, write_report
from treepo_mega.monitor.report.summary import load_run, percentile, phases, summarise
from treepo_mega.monitor.report.svg import MAX_POINTS, line_chart, short, ticks
from treepo_mega.tree.node import Node, Tree


@pytest.fixture
def run(tmp_path):
    """A run of 10 steps: rollout takes 3 s and update 1 s of the 5 s step; steps 5 to 9 have twice the tokens."""
    path = tmp_path / "demo"
    with MetricsLogger(path, tensorboard=False) as logger:
        for step in range(10):
            logger.log(
                step,
                {
                    "timing_s/rollout": 3.0,
                    "timing_s/update": 1.0 if step else 2.0,
                    "timing_s/step": 5.0,
                    "rollout/reward_mean": step / 10,
                    "tree/unique_tokens": 100 if step < 5 else 400,
                    "tree/flat_tokens": 400 if step < 5 else 800,
                    "tree/token_ratio": 0.25 if step < 5 else 0.5,
                    "reshard/gb_per_s": 2.0,
                    "reward/lost": step % 2,
                    "train/kl_loss": float("nan"),
                },
            )
    (path / "config.yaml").write_text(yaml.safe_dump({"model": {"hf_checkpoint": "somewhere"}}))
    (path / "summary.json").write_text(json.dumps({"accuracy_after": 0.75}))
    return path


def test_figures(run):
    figures = summarise(load_run(run))
    assert (figures["steps"], figures["first_step"], figures["last_step"]) == (10, 0, 9)
    assert figures["tokens"] == {"generated": None, "cached": None, "recomputed": None, "unique": 2500, "flat": 6000}
    assert figures["token_ratio"] == pytest.approx(2500 / 6000)
    assert figures["trends"]["rollout/reward_mean"] == {"first": 0.0, "last": 0.9, "best": 0.9, "count": 10}
    assert figures["medians"] == {"reshard/gb_per_s": 2.0}
    assert figures["totals"] == {"reward/lost": 5, "train/nonfinite_metrics": 10}
    assert figures["summary"] == {"accuracy_after": 0.75}


def test_what_the_model_wrote_stands_in_the_report_as_text(run, tmp_path):
    hostile = "<script>alert(1)</script>"
    tokenizer = Tokenizer(models.WordLevel(vocab={"Q:": 0, "fine": 1, hostile: 2, "?": 3}, unk_token="?"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"hf_checkpoint": str(tmp_path)}}))
    alike = Tree("train:1", [Node(0, -1, (), [0]), Node(1, 0, (0,), [3])], [1], [0.5])
    differs = Tree("train:2", [Node(0, -1, (), [0]), *(Node(n, 0, (n - 1,), [n]) for n in (1, 2, 3))], [1, 2, 3])
    differs.rewards, differs.advantages = [1.0, 0.0, 0.5], [0.5, -0.75, 0.25]
    (run / "trees").mkdir()
    (run / "trees" / "step_000001.jsonl").write_text("".join(json.dumps(t.to_dict()) + "\n" for t in (alike, differs)))
    (run / "trees" / "step_000002.jsonl").write_text('{"prompt_id"')
    page = write_report([run], tmp_path)[0].read_text()
    assert hostile not in page and "&lt;script&gt;alert(1)" in page
    rows = re.findall(r"<td>(1)</td><td>([^<]*)</td><td>([^<]*)</td><td><div class=.words.>", page)
    assert rows == [("1", "1", "+0.500"), ("1", "0", "-0.750")], "the best, then the worst, of the tree that differs"
    assert "step_000002.jsonl: cannot be read" in page


def test_phases_are_shares_of_the_step_and_add_up(run):
    found = phases(load_run(run))
    assert [p["name"] for p in found] == ["rollout", "update", "other"]
    assert [p["total"] for p in found] == pytest.approx([30, 11, 9])
    assert sum(p["share"] for p in found) == pytest.approx(1)
    assert (found[1]["p50"], found[1]["p95"]) == (1.0, 2.0)


def test_evaluation_and_checkpoints_lie_outside_the_step(run):
    with (run / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"step": 10, "timing_s/eval": 30.0, "timing_s/checkpoint": 20.0}) + "\n")
    share = {p["name"]: p["share"] for p in phases(load_run(run))}
    # 10 steps of 5 s, and 50 s beside them.
    assert share == pytest.approx({"rollout": 0.3, "eval": 0.3, "checkpoint": 0.2, "update": 0.11, "other": 0.09})


def test_percentile_is_nearest_rank():
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [percentile(values, s) for s in (0.0, 0.5, 0.95, 1.0)] == [1.0, 3.0, 5.0, 5.0]
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


class Page(HTMLParser):
    """Collects what could load or run something, and checks that every tag is closed."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_self_contained_and_well_formed(run, capsys):
    html, data = write_report([run], run)
    page = Page(html.read_text())
    assert page.open == []
    assert not page.tags & {"script", "link", "img", "iframe", "object", "a"}
    assert not {a for a in page.attributes if a.startswith("on") or a in ("src", "href")}
    assert "http://" not in html.read_text()
    assert "https://" not in html.read_text()
    assert json.loads(data.read_text())["runs"][0]["token_ratio"] == pytest.approx(2500 / 6000)
    assert "0.000 → 0.900" in capsys.readouterr().out


def test_hostile_text_stays_text(run):
    evil = run.parent / "<img src=x onerror=alert(1)> [bold]"
    run.rename(evil)
    attack = "</pre><script>alert(1)</script>"
    (evil / "config.yaml").write_text(yaml.safe_dump({attack: attack}))
    (evil / "summary.json").write_text(json.dumps({"note": attack}))
    with (evil / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"step": 10, f"timing_s/{attack}": 1.0}) + "\n")
    html, _ = write_report([evil], evil)
    page = Page(html.read_text())
    assert page.open == []
    assert not page.tags & {"script", "img"}
    assert "&lt;script&gt;" in html.read_text()


def test_several_runs_share_a_page(run, tmp_path):
    other = tmp_path / "other"
    with MetricsLogger(other, tensorboard=False) as logger:
        logger.log(3, {"grad-norm": 1.0, "rollout/reward_mean": 1.0})
    html, data = write_report([run, other], tmp_path / "both")
    assert html == tmp_path / "both" / "report.html"
    assert [r["steps"] for r in json.loads(data.read_text())["runs"]] == [10, 1]
    # The second run keeps its colour in a chart that the first has no part in.
    assert 'class="dot c1"' in html.read_text().split("grad-norm")[1]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.jsonl", '{"step": 0}\n{nonsense\n{"step": 1}\n', r"metrics\.jsonl:2: not valid JSON"),
        ("metrics.jsonl", "", "no step was logged yet"),
        ("config.yaml", "a: [1", r"config\.yaml: cannot be read"),
        ("config.yaml", "- 1", r"config\.yaml: expected a mapping"),
        ("summary.json", "{", r"summary\.json: cannot be read"),
    ],
)
def test_a_malformed_file_is_named_and_nothing_is_written(run, capsys, file, text, message):
    (run / file).write_text(text)
    with pytest.raises(ReportError, match=message):
        write_report([run], run)
    assert not (run / "report.html").exists()
    assert main(["report", str(run)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ReportError, match=r"holds no metrics\.jsonl"):
        load_run(tmp_path)


def test_command_writes_where_it_is_told(run, tmp_path, capsys):
    assert main(["report", str(run), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").exists()
    assert "report.json" in capsys.readouterr().out


@pytest.mark.parametrize("bounds", [(0, 1), (0.31, 0.37), (-5, 5000), (2, 2), (0, 0), (1e-9, 3e-9), (-3, -3)])
def test_ticks_span_the_values_and_are_few(bounds):
    marks = ticks(*bounds)
    assert marks[0] <= bounds[0] + 1e-12
    assert marks[-1] >= bounds[1] - 1e-12
    assert 2 <= len(marks) <= 8


def test_short_numbers():
    assert [short(x) for x in (0, 0.5, 1234, 12345, 1234567, 2.5e9, 0.00012, -20000)] == [
        "0",
        "0.5",
        "1234",
        "12.3k",
        "1.23M",
        "2.5G",
        "1.2e-04",
        "-20k",
    ]


def test_a_long_series_is_thinned_but_keeps_its_ends():
    n = 5 * MAX_POINTS
    svg = line_chart([("a", range(n), [float(i % 7) for i in range(n)])])
    assert svg.count("<circle") <= MAX_POINTS
    assert "step 0," in svg
    assert f"step {n - 1}," in svg
