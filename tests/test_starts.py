"""The ceiling of process starts that `.ci/run` checks."""

from __future__ import annotations

from tests.starts import CEILING, GRADERS, count_start, report


def test_a_count_above_its_ceiling_is_named_and_graders_have_their_own(tmp_path, monkeypatch, capsys):
    path = tmp_path / "starts"
    monkeypatch.setenv("TREEPO_TEST_STARTS", str(path))
    count_start("python", "-c import\n  torch", CEILING["python"])
    count_start("python", f"{GRADERS[0]} --memory-mb=1024", CEILING["grader"])
    count_start("rank-group", "4 worker.py")
    assert report(path) == []
    assert f"{CEILING['python']:4d} of at most {CEILING['python']} starts of kind python" in capsys.readouterr().out
    count_start("rank-group", "2 worker.py", CEILING["rank-group"])
    (problem,) = report(path)
    assert f"tests start {CEILING['rank-group'] + 1} of kind rank-group" in problem
