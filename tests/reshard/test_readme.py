"""The example of the folder's page runs."""

import doctest
from pathlib import Path

import treepo_mega.reshard

PAGE = Path(treepo_mega.reshard.__file__).with_name("README.md")


def test_the_example_of_the_readme():
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.attempted > 8 and result.failed == 0


def test_files_that_the_readme_names_exist():
    for name in ("sides", "plan", "execute", "checksums", "transport/base", "transport/pairs", "transport/p2p"):
        assert (PAGE.parent / f"{name}.py").exists()
        assert f"{name.rpartition('/')[2]}.py" in PAGE.read_text()
