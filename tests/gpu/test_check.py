"""The command for a GPU: outcomes, resuming, budget, exit codes, the table. Two small children of pytest."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from tools.gpu import check, children, machine, plan, report
from tools.gpu.children import Outcome
from treepo_mega.runtime.device import has_cuda

ROOT = Path(__file__).resolve().parents[2]
CARD = machine.Machine(("NVIDIA H100 (79 GiB)",), "580.1", {"torch": "2.11.0", "triton": "3.6.0"}, plan.TRAINER)
GOOD = Outcome("passed", "error 0.001", "", 2.0)
BAD = Outcome("failed", "1 of 2 tests passed", "assert 1 == 2", 3.0, "the end of the output")
CHECKS = (
    plan.Check("torch", "tests/a.py::test_a", 2, "a"),
    plan.Check("torch", "tests/b.py::test_b", 4, "b"),
    plan.Check("vllm", "tests/c.py::test_c", 1, "c"),
)


class Recorder:
    """Stands for children: gives each check its outcome and remembers what ran, with which limit."""

    def __init__(self, **outcomes: Outcome) -> None:
        self.outcomes = outcomes
        self.ran: list[str] = []
        self.limits: list[float] = []

    def __call__(self, item: plan.Check, limit: float) -> Outcome:
        self.ran.append(item.settles)
        self.limits.append(limit)
        return self.outcomes.get(item.settles, GOOD)


def session(path: Path, runner: Recorder, *, here=CARD, source="s1", minutes=60.0, again=False) -> int:
    return check.Session(path, here, source, runner).run(CHECKS, 60 * minutes, again)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gpu_report.json"


SMALL = """
import time, pytest

def test_good(record_property): record_property("error", 0.25)
@pytest.mark.skip(reason="no such card")
def test_skipped(): ...
def test_bad(): assert 1 == 2
def test_slow(): time.sleep(60)
"""


def test_outcomes_of_a_real_child(tmp_path):
    """One child goes through all that a node can do; its file is then read again without one case after the other."""
    (tmp_path / "test_small.py").write_text(SMALL)
    item = plan.Check("torch", "test_small.py", 1, "x", keyword="not slow", marked=False)
    got = children.run(item, 60, tmp_path)
    assert (got.status, got.figure, got.reason) == ("failed", "error 0.25", "assert 1 == 2")
    assert "1 failed, 1 passed, 1 skipped" in got.tail
    late = children.run(plan.Check("torch", "test_small.py::test_slow", 1, "x", marked=False), 1.0, tmp_path)
    assert (late.status, late.reason) == ("timed out", "passed its limit of 1 s") and late.seconds < 50


@pytest.mark.parametrize(
    "cases, code, want",
    [
        ("<testcase/><testcase/>", 0, ("passed", "2 of 2 tests passed", "")),
        (
            '<testcase/><testcase><skipped message="no TE"/></testcase>',
            0,
            ("partly run", "1 of 2 tests passed", "no TE"),
        ),
        ('<testcase><skipped message="no TE"/></testcase>', 0, ("not run", "", "no TE")),
        ('<testcase><error message="a\nb"/></testcase>', 1, ("failed", "0 of 1 tests passed", "a b")),
        ("<testcase/>", 1, ("failed", "1 of 1 tests passed", "exit status 1")),
        ("<testcase/>", 5, ("failed", "", "no test of this name was selected")),
        ("", 0, ("not run", "", "no test ran")),
    ],
)
def test_outcomes_by_what_pytest_wrote(tmp_path, cases, code, want):
    (tmp_path / "j.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    got = children.read_junit(tmp_path / "j.xml", code, 1.0, "tail")
    assert (got.status, got.figure, got.reason) == want


def test_a_child_that_died_is_a_failure(tmp_path):
    got = children.read_junit(tmp_path / "none.xml", -11, 1.0, "tail")
    assert (got.status, got.reason, got.tail) == ("failed", "no report from pytest: ended by signal 11", "tail")


def test_results_are_kept_and_what_is_missing_is_said(path, capsys):
    first = Recorder(b=BAD)
    assert session(path, first) == check.SOME_FAILED
    assert first.ran == ["a", "b"]
    entries = report.load(path)
    assert [(entry["status"], entry["reason"]) for entry in entries] == [
        ("passed", ""),
        ("failed", "assert 1 == 2"),
        ("not run", "not installed: vllm"),
    ]
    assert entries[0]["figure"] == "error 0.001" and entries[1]["tail"] == "the end of the output"
    assert entries[0]["device"] == "NVIDIA H100 (79 GiB)" and entries[0]["versions"]["torch"] == "2.11.0"
    second = Recorder()
    # What failed here has its result: the exit code still says so.
    assert session(path, second) == check.SOME_FAILED
    assert second.ran == [] and len(report.load(path)) == 3
    assert "kept  tests/b.py::test_b  failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"source": "s2"},
        {"again": True},
        {"here": machine.Machine(("NVIDIA B200 (178 GiB)",), "580.1", CARD.versions, CARD.present)},
        {"here": machine.Machine(CARD.devices, "590.2", CARD.versions, CARD.present)},
        {"here": machine.Machine(CARD.devices, "580.1", {"torch": "2.13.0"}, CARD.present)},
    ],
)
def test_other_code_card_driver_or_versions_run_again(path, change):
    session(path, Recorder())
    second = Recorder()
    assert session(path, second, **change) == check.OK
    assert second.ran == ["a", "b"]


def test_a_time_out_is_tried_again_and_a_new_package_ends_not_run(path):
    session(path, Recorder(a=Outcome("timed out", "", "passed its limit of 360 s", 360.0)))
    second = Recorder()
    with_engine = machine.Machine(CARD.devices, CARD.driver, CARD.versions, plan.ENGINE)
    assert session(path, second, here=with_engine) == check.OK
    assert second.ran == ["a", "c"]


def test_the_budget_leaves_what_does_not_fit_for_the_next_time(path, capsys):
    first = Recorder()
    assert session(path, first, minutes=3.0) == check.BUDGET_USED
    assert first.ran == ["a"] and first.limits[0] <= 180, "a child never outlives the budget"
    assert "1 checks of 4 min did not fit" in capsys.readouterr().out
    second = Recorder()
    assert session(path, second, minutes=60.0) == check.OK
    assert second.ran == ["b"] and second.limits == [pytest.approx(720)]


def test_a_child_cut_off_by_the_budget_is_said_to_be_and_tried_again(path):
    late = Recorder(a=Outcome("timed out", "", "passed its limit of 150 s", 150.0))
    assert session(path, late, minutes=2.5) == check.SOME_FAILED
    assert report.load(path)[0]["reason"] == "the budget ended after 150 s"
    second = Recorder()
    assert session(path, second) == check.OK and second.ran == ["a", "b"]


def test_a_stopped_run_keeps_what_was_measured(path, monkeypatch, capsys):
    class Killed(Recorder):
        def __call__(self, item: plan.Check, limit: float) -> Outcome:
            if item.settles == "b":
                raise KeyboardInterrupt
            return super().__call__(item, limit)

    monkeypatch.setattr(machine, "look_in_a_child", lambda: CARD)
    monkeypatch.setattr(plan, "CHECKS", CHECKS)
    monkeypatch.setattr(check, "Session", partial(check.Session, runner=Killed()))
    assert check.main(["--report", str(path)]) == check.STOPPED
    assert "the same command goes on with the rest" in capsys.readouterr().err
    assert [entry["check"] for entry in report.load(path)] == ["tests/a.py::test_a"]
    assert [item.name for item in path.parent.iterdir()] == ["gpu_report.json"]


@pytest.mark.skipif(has_cuda(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_one_sentence_and_ends_with_2(path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "look_in_a_child", lambda: machine.look(machine.modules_of_the_plan()))
    assert check.main(["--report", str(path)]) == check.CANNOT_RUN
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("There is no GPU here to check on: torch ") and line.endswith("sees no CUDA device.")
    assert not path.exists()


def test_the_whole_command_on_a_card(path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "look_in_a_child", lambda: CARD)
    monkeypatch.setattr(plan, "CHECKS", CHECKS[2:])
    assert check.main(["--report", str(path), "--stage", "vllm"]) == check.OK
    assert "torch 2.11.0 (pin 2.13.0), triton 3.6.0" in capsys.readouterr().out
    assert report.load(path)[0]["status"] == "not run"


def test_list_needs_no_gpu_and_prints_every_check(monkeypatch, capsys):
    monkeypatch.setattr(machine, "look_in_a_child", lambda: pytest.fail("asked for a GPU"))
    assert check.main(["--list"]) == check.OK
    text = capsys.readouterr().out
    assert all(item.name in text for item in plan.CHECKS)
    assert f"all: {sum(item.minutes for item in plan.CHECKS):g} min" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--stage", "vlm"],
            "--stage vlm: expected one of torch, megatron, vllm, figures, gpus (did you mean 'vllm'?)",
        ),
        (["--budget-minutes", "0"], "--budget-minutes 0: expected more than 0"),
    ],
)
def test_bad_options_end_with_2(arguments, message, capsys):
    assert check.main(arguments) == check.CANNOT_RUN
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("{}", "expected a list of entries"),
        ('[{"check": "a"}]', "entry 1: stage is missing or of the wrong kind"),
    ],
)
def test_a_spoilt_report_is_named_and_left_alone(path, text, message, monkeypatch, capsys):
    path.write_text(text)
    monkeypatch.setattr(machine, "look_in_a_child", lambda: CARD)
    assert check.main(["--report", str(path)]) == check.CANNOT_RUN
    error = capsys.readouterr().err
    assert message in error and str(path) in error
    assert path.read_text() == text


def test_a_status_that_nothing_knows_is_refused(path):
    session(path, Recorder())
    entries = json.loads(path.read_text())
    entries[1]["status"] = "fine"
    path.write_text(json.dumps(entries))
    with pytest.raises(report.ReportError, match="entry 2: status 'fine'; expected passed"):
        report.load(path)


def test_the_table_shows_the_newest_result_of_each_card_with_its_versions(path):
    session(path, Recorder(b=Outcome("failed", "", "a | b <script> `c`", 1.0)))
    session(path, Recorder(), source="s2")
    session(path, Recorder(), here=machine.Machine(("NVIDIA B200 (178 GiB)",), "590", CARD.versions, ()))

    def pinned(python: str) -> dict[str, str]:
        assert python == "", "these entries name none"
        return {"torch": "2.13.0"}

    rows = report.table(CHECKS, report.load(path), pinned).splitlines()
    b_rows = [row for row in rows if "test_b" in row]
    assert len(b_rows) == 2
    assert "**passed**: error 0.001 | NVIDIA H100 (79 GiB) | driver 580.1, torch 2.11.0 (pin 2.13.0)" in b_rows[0]
    assert "**not run**: not installed: torch" in b_rows[1] and "B200" in b_rows[1]
    assert all(row.count("|") == 7 for row in rows)
    spoilt = report.table(CHECKS, [entry for entry in report.load(path) if entry["source"] == "s1"], pinned)
    assert "a &#124; b &lt;script&gt; &#96;c&#96;" in spoilt


def nothing_pinned(python: str) -> dict[str, str]:
    """No pins, whatever the Python."""
    return {}


def test_a_result_is_not_hidden_by_a_later_run_without_the_package(path):
    with_engine = machine.Machine(CARD.devices, CARD.driver, CARD.versions, plan.ENGINE)
    session(path, Recorder(), here=with_engine)
    session(path, Recorder(), source="s2")
    (row,) = [row for row in report.table(CHECKS, report.load(path), nothing_pinned).splitlines() if "test_c" in row]
    assert "**passed**" in row


def test_rendering_changes_the_table_alone(tmp_path, path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    session(path, Recorder())
    report.render(page, CHECKS, report.load(path), nothing_pinned)
    before, table, after = report.block_of(page)
    assert (before, after) == ("above\n", "\nbelow\n")
    assert table == report.table(CHECKS, report.load(path), nothing_pinned)
    page.write_text("no marks")
    with pytest.raises(report.ReportError, match=r"page\.md: expected the lines"):
        report.render(page, CHECKS, [], machine.pins)


def test_the_page_of_the_docs_is_what_the_report_says():
    _, table, _ = report.block_of(report.PAGE)
    want = report.table(plan.CHECKS, report.load(report.REPORT), machine.pins)
    assert table == want, "run python tools/gpu/check.py --render"


def test_pins_are_those_of_setup():
    found = machine.pins()
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert (
        found["torch"] and f'"vllm=={found["vllm"]}"' in text and f'"megatron-core=={found["megatron-core"]};' in text
    )
    megatrons = [machine.pins(python)["megatron-core"] for python in ("3.11", "3.12.1")]
    assert megatrons == ["0.16.1", "0.19.2"], "each Python has its own"
    assert "triton" not in found, "on a GPU it comes with torch"


def test_a_child_that_cannot_ask_torch_is_a_reason(monkeypatch):
    monkeypatch.setattr(machine.sys, "executable", "/bin/false")
    assert machine.look_in_a_child().absence == "asking torch for a GPU failed (exit code 1)"
