"""What is packed comes back byte for byte, and what is wrong on the way is named."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tools.gpu import parcels


def written(folder: Path, sizes: list[int]) -> list[Path]:
    """Files of these sizes; no two blocks of 32 bytes among them are alike."""
    folder.mkdir()
    paths = []
    for number, size in enumerate(sizes):
        path = folder / f"file{number}.bin"
        words = (hashlib.sha256(f"{number} {place}".encode()).digest() for place in range(size // 32 + 1))
        path.write_bytes(b"".join(words)[:size])
        paths.append(path)
    return paths


@pytest.fixture
def packed(tmp_path):
    """A folder with four parts of 100 bytes and one of 50, of three files."""
    parcels.pack(tmp_path / "parts", written(tmp_path / "in", [120, 0, 330]), 100)
    return tmp_path / "parts"


@examples(60)
@given(sizes=st.lists(st.integers(0, 700), min_size=1, max_size=5), part=st.integers(1, 300), block=st.integers(1, 90))
def test_files_of_any_sizes_come_back(tmp_path_factory, sizes, part, block):
    folder = tmp_path_factory.mktemp("parcels")
    files = written(folder / "in", sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parcels, "BLOCK", block)
        manifest = parcels.pack(folder / "parts", files, part)
        assert all((folder / "parts" / p["name"]).stat().st_size <= part for p in manifest["parts"])
        assert len(manifest["parts"]) == -(-sum(sizes) // part)
        made = parcels.join(folder / "parts", folder / "out")
    assert [path.read_bytes() for path in made] == [path.read_bytes() for path in files]
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(path.name for path in files)
    shutil.rmtree(folder)


def test_real_wheels_come_back_and_their_own_records_agree(tmp_path):
    """The wheels that Python brings for its venv module: their RECORD has a checksum of every file inside."""
    import ensurepip

    wheels = sorted((Path(ensurepip.__file__).parent / "_bundled").glob("*.whl"))
    assert wheels, "ensurepip of this Python brings no wheel"
    wanted = [parcels.WHEEL.fullmatch(path.name) for path in wheels]
    names = [f"{match['name']}=={match['version']}" for match in wanted]
    parts = tmp_path / "parts"
    command = ["pack", str(parts), "--from", str(wheels[0].parent), "--part-mib", "0.5", *names]
    assert parcels.main(command) == 0
    assert len(list(parts.glob("*.parcel"))) >= 3
    assert parcels.main(["join", str(parts), str(tmp_path / "out")]) == 0
    for path in wheels:
        back = tmp_path / "out" / path.name
        assert back.read_bytes() == path.read_bytes()
        with zipfile.ZipFile(back) as archive:
            (record,) = [name for name in archive.namelist() if name.endswith(".dist-info/RECORD")]
            for line in archive.read(record).decode().splitlines():
                inside, checksum, _ = line.rsplit(",", 2)
                if checksum:
                    digest = hashlib.sha256(archive.read(inside)).digest()
                    assert checksum == "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def damage(packed: Path) -> str:
    path = packed / "part-0002.parcel"
    path.write_bytes(path.read_bytes()[:50] + b"!" + path.read_bytes()[51:])
    return r"part-0002\.parcel: damaged$"


def cut(packed: Path) -> str:
    path = packed / "part-0003.parcel"
    path.write_bytes(path.read_bytes()[:40])
    return r"part-0003\.parcel: damaged, with 40 of 100 bytes"


def lose(packed: Path) -> str:
    (packed / "part-0004.parcel").unlink()
    return r"part-0004\.parcel: missing"


def send_twice(packed: Path) -> str:
    shutil.copy(packed / "part-0001.parcel", packed / "part-0003.parcel")
    return r"part-0003\.parcel: a repetition of part-0001\.parcel; its own bytes are missing"


def save_again(packed: Path) -> str:
    shutil.copy(packed / "part-0005.parcel", packed / "part-0005.parcel.1")
    return r"part-0005\.parcel\.1: a repetition of part-0005\.parcel"


def mix(packed: Path) -> str:
    (packed / "part-0009.parcel").write_bytes(b"strange")
    return r"part-0009\.parcel: of another parcel"


def spoil_manifest(packed: Path) -> str:
    text = (packed / "manifest.json").read_text()
    (packed / "manifest.json").write_text(text.replace("file0", "file7"))
    return r"manifest\.json: damaged"


def halve_manifest(packed: Path) -> str:
    text = (packed / "manifest.json").read_text()
    (packed / "manifest.json").write_text(text[: len(text) // 2])
    return r"manifest\.json: damaged"


def lose_manifest(packed: Path) -> str:
    (packed / "manifest.json").unlink()
    return r"manifest\.json: missing"


@pytest.mark.parametrize(
    "spoil", [damage, cut, lose, send_twice, save_again, mix, spoil_manifest, halve_manifest, lose_manifest]
)
def test_what_is_wrong_is_named_and_nothing_is_written(packed, tmp_path, spoil):
    message = spoil(packed)
    with pytest.raises(parcels.ParcelError) as raised:
        parcels.join(packed, tmp_path / "out")
    assert any(re.search(message, line) for line in str(raised.value).splitlines()), raised.value
    assert not (tmp_path / "out").exists()


def test_every_wrong_part_is_named_at_once(packed, tmp_path):
    damage(packed)
    lose(packed)
    with pytest.raises(parcels.ParcelError, match=r"(?s)part-0002\.parcel: damaged.*part-0004\.parcel: missing"):
        parcels.join(packed, tmp_path / "out")


def test_a_sealed_manifest_cannot_write_outside_its_folder(packed, tmp_path):
    manifest = json.loads((packed / "manifest.json").read_text())
    manifest["files"][0]["name"] = "../outside.whl"
    manifest["seal"] = parcels.seal(manifest)
    (packed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(parcels.ParcelError, match="no plain file name"):
        parcels.join(packed, tmp_path / "out")
    assert not (tmp_path / "outside.whl").exists()


def test_joining_twice_is_harmless_and_another_file_is_not_overwritten(packed, tmp_path):
    parcels.join(packed, tmp_path / "out")
    parcels.join(packed, tmp_path / "out")
    (tmp_path / "out" / "file2.bin").write_text("mine")
    with pytest.raises(parcels.ParcelError, match=r"file2\.bin: exists and holds something else"):
        parcels.join(packed, tmp_path / "out")
    assert (tmp_path / "out" / "file2.bin").read_text() == "mine"


@pytest.mark.parametrize(
    "wanted, message",
    [
        ("torch", r"'torch': expected NAME==VERSION"),
        ("megatron-cor==0.16.1", r"which has 3 others \(did you mean 'megatron-core==0\.16\.1'\?\)"),
        ("triton==3.7.1", r"2 wheels in .*cp311.*cp312.*give the path"),
    ],
)
def test_a_wheel_that_is_not_one_wheel(tmp_path, wanted, message):
    for name in (
        *(
            "megatron_core-0.16.1-cp311-cp311-manylinux_2_28_x86_64.whl",
            "torch-2.13.0+cu130-cp311-cp311-linux_x86_64.whl",
        ),
        *("triton-3.7.1-cp311-cp311-linux_x86_64.whl", "triton-3.7.1-cp312-cp312-linux_x86_64.whl"),
    ):
        (tmp_path / name).touch()
    with pytest.raises(parcels.ParcelError, match=message):
        parcels.find_wheel(tmp_path, wanted)
    assert parcels.find_wheel(tmp_path, "Torch==2.13.0").name.startswith("torch-2.13.0+cu130")


def test_bad_commands_end_with_2_and_a_sentence(tmp_path, capsys):
    (tmp_path / "a.whl").write_text("a")
    (tmp_path / "full").mkdir()
    shutil.copy(tmp_path / "a.whl", tmp_path / "full")
    for command, message in (
        ([tmp_path / "new", tmp_path / "b.whl"], "b.whl: no such file"),
        ([tmp_path / "full", tmp_path / "a.whl"], "not empty"),
        ([tmp_path / "new", tmp_path / "a.whl", tmp_path / "full" / "a.whl"], "given 2 times"),
        ([tmp_path / "new", "torch==2.13.0"], "--from FOLDER"),
    ):
        assert parcels.main(["pack", *map(str, command)]) == 2
        assert message in capsys.readouterr().err
