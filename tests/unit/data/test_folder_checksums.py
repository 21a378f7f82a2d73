"""checksums.json beside files of formats that have no place for checksums."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3_megatron.data.folder_checksums import CHECKSUMS, read_folder_checksums, require_whole, write_folder_checksums
from dsv3_megatron.data.signed_json import with_signature


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(f'{{"{name}": 1}}')
    write_folder_checksums(tmp_path)
    return tmp_path


def test_whole_files_are_taken(folder: Path) -> None:
    assert sorted(read_folder_checksums(folder)) == ["a.json", "b.json"]
    require_whole(folder / "a.json", ["b.json", "never there.json"])
    (folder / "c.json").write_text("{}")
    require_whole(folder / "c.json")  # nobody knows its checksum
    assert read_folder_checksums(folder / "nowhere") == {}


def test_changed_files_are_refused(folder: Path) -> None:
    (folder / "a.json").write_text('{"a.json": 3}')
    (folder / "b.json").write_text("{}")
    with pytest.raises(ValueError, match=(
            rf"a\.json is damaged: .*\. Not as .*{CHECKSUMS} has them: a\.json \(other content\); b\.json \(2 bytes, "
            rf"not 13\)\. .* or you changed files on purpose, remove {CHECKSUMS}\. Otherwise get the files again")):
        require_whole(folder / "a.json")
    (folder / "b.json").write_text('{"b.json": 1}')
    (folder / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a\.json is damaged: it has 2 bytes, 13 were written"):
        require_whole(folder / "a.json")
    (folder / "b.json").unlink()
    with pytest.raises(ValueError, match=r"b\.json is missing\. .* has them: a\.json \(.*\); b\.json \(missing\)\."):
        require_whole(folder / "a.json", ["b.json"])
    (folder / CHECKSUMS).unlink()
    require_whole(folder / "a.json", ["b.json"])


@pytest.mark.parametrize("change", [
    {"version": 2}, {"files": []}, {"files": {"a.json": 3}}, {"files": {"a.json": {"algorithm": "md5"}}},
    {"files": {"../a.json": {}}}, {"files": {"a\x1b.json": {}}}])
def test_checksums_that_are_none(folder: Path, change: dict[str, object]) -> None:
    content = json.loads((folder / CHECKSUMS).read_text())
    (folder / CHECKSUMS).write_text(json.dumps(with_signature(content | change, "signature")))
    with pytest.raises(ValueError, match="does not hold checksums of this folder's files: "):
        require_whole(folder / "a.json")
    (folder / CHECKSUMS).write_text(json.dumps(content | {"files": {}}))
    with pytest.raises(ValueError, match="its content does not have its checksum"):
        require_whole(folder / "a.json")
