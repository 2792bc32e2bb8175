"""Files of records: cut short anywhere, what was whole is read; changed anywhere, nothing else is ever read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from treepo_mega.journal import folder
from treepo_mega.journal.file import FRAME, JournalError, RecordFile, framed, read_records

HEADER = {"step": 3, "fingerprint": "ab"}
RECORDS: list[Any] = [
    {"index": 4, "tokens": list(range(40)), "logprobs": [-0.1 * place for place in range(20)]},
    {"index": 5, "text": "é"},
    {"index": 6, "tokens": [1, 2, 3]},
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("records") / "rank_00000_0.trees"
    with RecordFile.create(path, HEADER) as file:
        sizes = [file.append(record) for record in RECORDS]
    assert path.stat().st_size == len(framed(HEADER)) + sum(sizes)
    return path.read_bytes()


def ends() -> list[int]:
    """Where the header and each record end."""
    at = 0
    out = []
    for record in (HEADER, *RECORDS):
        at += len(framed(record))
        out.append(at)
    return out


def test_what_was_written_is_read(written: bytes, tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(written)
    found = read_records(path)
    assert (found.header, found.records, found.torn) == (HEADER, RECORDS, 0)


def test_cut_after_any_byte_the_whole_records_are_read(written: bytes, tmp_path: Path):
    path = tmp_path / "file"
    for size in range(len(written)):
        for tail in (b"", bytes(7), bytes(FRAME.size + 100)):
            path.write_bytes(written[:size] + tail)
            whole = sum(end <= size for end in ends())
            # Zeros that happen to be those of the record are no loss, and cannot be told from it.
            found = read_records(path)
            assert found.records == RECORDS[: max(0, len(found.records))]
            assert len(found.records) >= whole - 1
            if not tail:
                assert len(found.records) == max(0, whole - 1), size
                assert (found.header is None) == (whole == 0)
                assert found.torn == size - ([0, *ends()][whole])


@examples(400)
@given(st.data())
def test_changed_in_any_byte_a_file_is_refused_or_ends_before_its_last_record(written: bytes, tmp_path_factory, data):
    at = data.draw(st.integers(0, len(written) - 1))
    mask = data.draw(st.integers(1, 255))
    changed = bytearray(written)
    changed[at] ^= mask
    path = tmp_path_factory.mktemp("changed") / "file"
    path.write_bytes(changed)
    last = ends()[-2]
    if at >= last + FRAME.size:
        found = read_records(path)
        assert (found.records, found.torn) == (RECORDS[:-1], len(written) - last)
        return
    start = max([0, *(end for end in ends() if end <= at)])
    with pytest.raises(JournalError) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}, byte {start}: ")
    assert "Remove it, and its trees are sampled again" in str(error.value)


def test_a_file_that_is_there_is_never_written_to(tmp_path: Path):
    first = folder.new_file(tmp_path, 12, 3)
    assert first == tmp_path / "rollouts/step_000012/rank_00003_0.trees"
    RecordFile.create(first, HEADER).close()
    assert folder.new_file(tmp_path, 12, 3).name == "rank_00003_1.trees"
    assert folder.new_file(tmp_path, 12, 4).name == "rank_00004_0.trees"
    with pytest.raises(FileExistsError):
        RecordFile.create(first, HEADER)
    assert folder.files_of(tmp_path, 12) == [first] and folder.steps_kept(tmp_path) == [12]
    folder.forget(tmp_path, [12])
    assert folder.steps_kept(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full, a disk that is always full")
def test_a_full_disk_is_told(tmp_path: Path):
    file = RecordFile.create(tmp_path / "file", HEADER)
    with Path("/dev/full").open("wb", buffering=0) as full:
        os.dup2(full.fileno(), file._file.fileno())
    with pytest.raises(OSError, match="No space left"):
        file.append(RECORDS[0])
    file.close()
