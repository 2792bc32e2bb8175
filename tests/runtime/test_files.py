"""Files and directories that appear whole or not at all."""

import pytest

from treepo_mega.runtime.files import OutputExistsError, atomic_directory, atomic_file


def failing():
    yield "second"
    raise ValueError("no second line")


def test_a_file_is_replaced_at_the_end_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "summary.json"
    with atomic_file(path) as file:
        file.write("first")
    with pytest.raises(ValueError, match="second line"), atomic_file(path) as file:
        file.writelines(failing())
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


def test_a_stale_partial_directory_is_replaced(tmp_path):
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "left.over").write_text("x")
    (tmp_path / "out").mkdir()  # an empty directory may be the target
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "new").write_text("y")
        assert list((tmp_path / "out").iterdir()) == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "other"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_exists_is_refused_or_replaced_when_its_successor_is_whole(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("x")
    with pytest.raises(OutputExistsError, match="out: exists already"), atomic_directory(target):
        raise AssertionError("the block is not entered")
    with pytest.raises(KeyboardInterrupt), atomic_directory(target, replace=True):
        raise KeyboardInterrupt
    assert [path.name for path in target.iterdir()] == ["old"]
    with atomic_directory(target, replace=True) as partial:
        (partial / "new").write_text("y")
        assert (target / "old").exists()
    assert [path.name for path in target.iterdir()] == ["new"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputExistsError, match="file: exists already"), atomic_directory(tmp_path / "file"):
        raise AssertionError("the block is not entered")


def test_only_the_leading_process_makes_and_renames(tmp_path):
    waited = []
    with atomic_directory(tmp_path / "out", leads=False, meet=waited.append) as partial:
        assert not partial.exists()
    assert [what.split()[0] for what in waited] == ["preparing", "writing", "publishing"]
    assert list(tmp_path.iterdir()) == []
